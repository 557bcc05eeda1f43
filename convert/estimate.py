"""What a plan will take: bytes, requests, and seconds by stage, on the machines that it is for. Pure.

The stages of a conversion overlap, so that it takes as long as the most loaded resource of the most loaded host: the
bottleneck. Beside it the first wave has to come through the other stages, and the program has to start.

Bytes read and requests are those that will be made. Compression, memory and seconds are estimates. Rates of processors
were measured on two cores; those of storage are what Orbax publishes for checkpoints in buckets; those of networks,
PCIe and chips are what `configs/` says. Nothing was measured on a TPU.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from slicecast.configs import slices
from slicecast.configs.hosts import CPU_HOSTS, Chip, Host
from slicecast.convert.errors import BudgetError
from slicecast.convert.memory import GB, MAX_WAVES_IN_FLIGHT, Machine
from slicecast.convert.plan import Plan, Wave, WorkBox, for_machine
from slicecast.convert.source.reader import plan_requests

Resource: TypeAlias = Literal["network in", "processors", "PCIe", "chips", "network out"]

# What one host gets out of a bucket and into it. Orbax's documentation ("Maximizing Orbax performance", Llama 3.1 on
# v5p) has 0.85 to 1.7 GB/s a host for loading and 0.55 to 1.1 GB/s for saving, as bfloat16 and as float32; the lower
# ends are taken. The reader's eight requests at 0.1 GB/s each come to the same.
_READ_BYTES_PER_SECOND = 0.85e9
_WRITE_BYTES_PER_SECOND = 0.55e9

# Core-seconds a byte: of input, for reading and copying it into place; of output, for decoding and transposing without
# a TPU (0.8 to 1.3 by format), and for compressing and writing. Their proportions are those that
# `scripts/bench_plan.py --stages` finds, and together they take about as long as `scripts/bench_throughput.py` on two
# quiet cores: 2.4 for a GB of Kimi-K2.6's output. On cores that other programs use too it is up to half as much again.
_PREPARE_SECONDS = 0.4 / GB
_DECODE_SECONDS = 0.9 / GB
_COMPRESS_SECONDS = 1.4 / GB

# A kernel reads its input and writes its output; XLA may hold one intermediate, written and read (`Costs`).
_CHIP_PASSES = 3

# Seconds for imports, for JAX to start and for the first programs to compile; and those for a tensor, from its header
# to its boxes (8 seconds for the 208,550 tensors of Kimi-K2.6).
_START_SECONDS = 5.0
_SECONDS_PER_TENSOR = 8 / 208_550

# What Python, JAX and TensorStore take before the first wave.
BASE_HOST_BYTES = 220_000_000

# How much of the bytes that are expected in flight is in memory at the peak: never are all waves at their fullest at
# once. Fitted to the five models of `scripts/bench_plan.py`: 0.88 to 0.99 in the mean of three runs.
_PEAK_SHARE = 0.94

# Objects that a conversion leaves in a bucket beside one for each wave: metadata and the log; and those of each host:
# its databases' manifests and nodes, and its part of the log.
_OBJECTS = 10
_OBJECTS_PER_HOST = 8

# What zstd level 1 leaves of bfloat16 values, by the beginning of a codec's description: normally distributed weights,
# quantized and decoded. What is not listed is not far from unquantized weights. FP8 that is kept shrinks least.
_STORED_SHARES = {
    "mxfp4": 0.385,  # Its scales are powers of two, so there are few different values.
    "nvfp4": 0.56,
    "float8_e4m3, blocks": 0.70,
    "int4": 0.74,
    "awq int4": 0.74,
    "gptq int4": 0.74,
    "constant": 0.0,
}
_STORED_SHARE = 0.78
_STORED_SHARE_OF_FP8 = 0.82


@dataclass(frozen=True)
class Stage:
    """A stage of the conversion on one host.

    Attributes:
        name: Its name.
        resource: What it keeps busy. Stages that share a resource do not overlap.
        seconds: How long it takes in all.
    """

    name: str
    resource: Resource
    seconds: float


@dataclass(frozen=True)
class HostEstimate:
    """What one host does.

    Attributes:
        in_bytes: Bytes that it reads.
        out_bytes: Bytes of its output, before compression.
        stored_bytes: Those that it writes, after compression.
        requests: Reads from the source's storage.
        waves: How many waves it has.
        stages: Its stages, in order.
    """

    in_bytes: int
    out_bytes: int
    stored_bytes: int
    requests: int
    waves: int
    stages: tuple[Stage, ...]

    @property
    def bottleneck(self) -> Resource:
        """The most loaded resource."""
        return max((stage.resource for stage in self.stages), key=self._busy_seconds)

    @property
    def seconds(self) -> float:
        """How long its waves take."""
        busy = self._busy_seconds(self.bottleneck)
        rest = sum(stage.seconds for stage in self.stages) - busy
        return busy + rest / max(self.waves, 1)

    def _busy_seconds(self, resource: Resource) -> float:
        return sum(stage.seconds for stage in self.stages if stage.resource == resource)


@dataclass(frozen=True)
class Estimate:
    """What a plan will take.

    Attributes:
        machine: The machines.
        host: Each of them.
        hosts: What each does.
        start_seconds: How long it takes until the first wave begins.
        peak_host_bytes: About the most memory that a host will use, the program's own included. The bound is
            `Plan.host_bytes_in_flight` and the program's own.
    """

    machine: Machine
    host: Host
    hosts: tuple[HostEstimate, ...]
    start_seconds: float
    peak_host_bytes: int

    @property
    def slowest(self) -> HostEstimate:
        """The host that all wait for."""
        return max(self.hosts, key=lambda host: host.seconds)

    @property
    def seconds(self) -> float:
        """How long the conversion takes."""
        return self.start_seconds + self.slowest.seconds

    @property
    def requests(self) -> int:
        """Reads from the source's storage, by all hosts."""
        return sum(host.requests for host in self.hosts)

    @property
    def stored_bytes(self) -> int:
        """The size of the result."""
        return sum(host.stored_bytes for host in self.hosts)

    @property
    def objects(self) -> int:
        """About how many objects the result has in a bucket, with OCDBT."""
        return _OBJECTS + sum(_OBJECTS_PER_HOST + host.waves for host in self.hosts)

    @property
    def host_hours(self) -> float:
        """Hours of all hosts together."""
        return self.machine.hosts * self.seconds / 3600

    @property
    def chip_hours(self) -> float:
        """Hours of all chips together."""
        return self.host.chips * self.host_hours


def estimate(plan: Plan) -> Estimate:
    """What a plan will take; its machine must say what its hosts are."""
    host = plan.machine.host
    assert host is not None, "The plan is for no machine that is known."
    return Estimate(
        machine=plan.machine,
        host=host,
        hosts=tuple(_of_host(waves, host) for waves in plan.waves),
        start_seconds=_START_SECONDS + _SECONDS_PER_TENSOR * len(plan.checkpoint.tensors),
        peak_host_bytes=BASE_HOST_BYTES + round(_PEAK_SHARE * _compressed_share(plan) * plan.host_bytes_in_flight),
    )


def smallest_slice(plan: Plan, generation: str) -> tuple[str, Estimate] | None:
    """The smallest slice of a TPU generation whose memory suffices, and what the plan takes there."""
    found = slices.of_generation(generation)
    return _first_sufficient(plan, ((each.name, Machine.of(each.host, each.hosts)) for each in found))


def smallest_slice_to_load(plan: Plan, generation: str) -> str | None:
    """The smallest slice of a TPU generation whose chips can hold the result, with nothing beside it."""
    found = slices.of_generation(generation)
    return next((each.name for each in found if each.memory_gb * GB >= plan.out_bytes), None)


def smallest_cpu_host(plan: Plan) -> tuple[str, Estimate] | None:
    """The smallest machine without chips whose memory suffices, and what the plan takes there."""
    return _first_sufficient(plan, ((host.name, Machine.of(host, 1)) for host in CPU_HOSTS.values()))


def _first_sufficient(plan: Plan, machines: Iterable[tuple[str, Machine]]) -> tuple[str, Estimate] | None:
    for name, machine in machines:
        with contextlib.suppress(BudgetError):
            return name, estimate(for_machine(plan, machine))
    return None


def _compressed_share(plan: Plan) -> float:
    """How much of the bytes in flight is left where output compresses as expected; the bound expects nothing of it."""
    bound = saved = 0.0
    for work in plan.boxes:
        bound += work.costs.host_bytes(plan.machine)
        if work.costs.on_device:  # Of the others no compressed copy is counted.
            saved += work.costs.out_bytes * (1 - _stored_share(work))
    return 1 - saved / bound if bound else 1.0


def _of_host(waves: tuple[Wave, ...], host: Host) -> HostEstimate:
    boxes = [work for wave in waves for work in wave.boxes]
    in_bytes = sum(work.costs.in_bytes for work in boxes)
    out_bytes = sum(work.costs.out_bytes for work in boxes)
    stored_bytes = round(sum(work.costs.out_bytes * _stored_share(work) for work in boxes))
    # Work on the devices, which copies are not.
    device_in_bytes = sum(work.costs.prepared_bytes for work in boxes if work.costs.on_device)
    device_out_bytes = sum(work.costs.out_bytes for work in boxes if work.costs.on_device)
    # Waves prepare their input in one thread each; TensorStore compresses in as many as there are processors.
    seconds = _PREPARE_SECONDS * in_bytes / min(host.vcpus, MAX_WAVES_IN_FLIGHT)
    stages = [
        Stage("read", "network in", in_bytes / _capped(_READ_BYTES_PER_SECOND, host)),
        Stage("prepare", "processors", seconds),
        *_decoding(device_in_bytes, device_out_bytes, host),
        Stage("compress", "processors", _COMPRESS_SECONDS * out_bytes / host.vcpus),
        Stage("write", "network out", stored_bytes / _capped(_WRITE_BYTES_PER_SECOND, host)),
    ]
    requests = sum(_requests(work) for work in boxes)
    return HostEstimate(in_bytes, out_bytes, stored_bytes, requests, len(waves), tuple(stages))


def _decoding(in_bytes: int, out_bytes: int, host: Host) -> list[Stage]:
    chip: Chip | None = host.chip
    if chip is None:
        return [Stage("decode", "processors", _DECODE_SECONDS * out_bytes / host.vcpus)]
    over_pcie = (in_bytes + out_bytes) / (host.chips * chip.pcie_gb_per_second * GB)
    in_memory = _CHIP_PASSES * (in_bytes + out_bytes) / (host.chips * chip.memory_gb_per_second * GB)
    return [Stage("transfer", "PCIe", over_pcie), Stage("decode", "chips", in_memory)]


def _capped(bytes_per_second: float, host: Host) -> float:
    if host.network_gb_per_second is None:
        return bytes_per_second
    return min(bytes_per_second, host.network_gb_per_second * GB)


def _requests(work: WorkBox) -> int:
    """How many reads a box takes."""
    start, stop = work.leaf.rows(work.box)
    tensors = work.leaf.tensors(work.box)
    return len(plan_requests([span for tensor in tensors for part in tensor.parts for span in part.spans(start, stop)]))


def _stored_share(work: WorkBox) -> float:
    """What compression leaves of a box."""
    if work.leaf.itemsize == 1:
        return _STORED_SHARE_OF_FP8
    first = next(work.leaf.leaf.coordinates(work.box))
    codec = work.leaf.sources[first].codec
    share = next((share for name, share in _STORED_SHARES.items() if codec.description.startswith(name)), _STORED_SHARE)
    # float32 values that bfloat16 can hold end in two bytes of zeros.
    return share * 2 / work.leaf.itemsize
