"""TPU slices that a conversion can be planned for by name.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x: memory and its bandwidth, virtual machines, shapes
of slices, and the network of a pod or a chip: 25 Gbps a chip for v5e, 50 for v4 and v5p, 100 for v6e and tpu7x. PCIe:
jax-ml.github.io/scaling-book/tpus ("around 1.5e10 bytes a second per chip", 32 GB/s for v6e); for tpu7x none is
published, so v6e's. Memory that Google counts in GiB counts here as so many GB, for a margin.

In slice names, v4, v5p and tpu7x count TensorCores (two a chip), the others chips.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slicecast.configs.hosts import Chip, Host
from slicecast.convert.errors import UsageError


@dataclass(frozen=True)
class TpuGeneration:
    """One generation of TPUs.

    Attributes:
        host: The virtual machine in slices of several.
        single_hosts: Other virtual machines, each of which is a slice by itself.
        chips: Chips of the slices there are, ascending. Where every whole number of hosts is a slice, those of the
            slices that are tried when the smallest one is searched, up to the largest slice.
        any_size: Whether every whole number of hosts is a slice, up to the largest.
        cores_per_chip: How much a chip counts in the name of a slice.
    """

    host: Host
    single_hosts: tuple[Host, ...]
    chips: tuple[int, ...]
    any_size: bool = False
    cores_per_chip: int = 1


_V4 = Chip(32, 1228, 15)
_V5E = Chip(16, 819, 15)
_V5P = Chip(95, 2765, 15)
_V6E = Chip(32, 1638, 32)
_TPU7X = Chip(192, 7380, 32, devices=2)

_V5E_GENERATION = TpuGeneration(
    Host("ct5lp-hightpu-4t", 112, 192, 12.5, 4, _V5E),
    (Host("ct5lp-hightpu-1t", 24, 48, 3.125, 1, _V5E), Host("ct5lp-hightpu-8t", 224, 384, 25, 8, _V5E)),
    (1, 4, 8, 16, 32, 64, 128, 256),
)

# By the beginning of a slice's name.
GENERATIONS = {
    "v4": TpuGeneration(
        Host("ct4p-hightpu-4t", 240, 400, 25, 4, _V4), (), tuple(4 << i for i in range(11)), any_size=True,
        cores_per_chip=2,
    ),
    "v5e": _V5E_GENERATION,
    "v5litepod": _V5E_GENERATION,
    "v5p": TpuGeneration(
        Host("ct5p-hightpu-4t", 208, 448, 25, 4, _V5P), (), (*(4 << i for i in range(11)), 6144), any_size=True,
        cores_per_chip=2,
    ),
    "v6e": TpuGeneration(
        Host("ct6e-standard-4t", 180, 720, 50, 4, _V6E),
        (Host("ct6e-standard-1t", 44, 176, 12.5, 1, _V6E), Host("ct6e-standard-8t", 180, 1440, 100, 8, _V6E)),
        (1, 4, 8, 16, 32, 64, 128, 256),
    ),
    "tpu7x": TpuGeneration(
        Host("tpu7x-standard-4t", 224, 960, 50, 4, _TPU7X), (), (*(4 << i for i in range(12)), 9216), any_size=True,
        cores_per_chip=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
        name: Its name, such as `v5e-16`.
        host: Each of its virtual machines.
        hosts: How many there are.
    """

    name: str
    host: Host
    hosts: int

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return self.hosts * self.host.chips

    @property
    def memory_gb(self) -> int:
        """The memory of all chips together, in GB."""
        return self.chips * self.host.chip.memory_gb if self.host.chip is not None else 0

    @property
    def chips_of_each_host(self) -> int:
        """Chips of each host."""
        return self.host.chips


def parse(name: str) -> Slice:
    """The slice of a name such as `v5e-16`, `v5litepod-16` or `v5p-128`.

    Raises:
        UsageError: If there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    if match is None or match[1] not in GENERATIONS:
        raise UsageError(
            f"--slice={name} is no TPU slice; an example is v5e-16. Generations: {', '.join(sorted(GENERATIONS))}."
        )
    generation = GENERATIONS[match[1]]
    chips, rest = divmod(int(match[2]), generation.cores_per_chip)
    possible = chips in generation.chips or (
        generation.any_size and chips % generation.host.chips == 0 and 0 < chips <= generation.chips[-1]
    )
    if rest or not possible:
        numbers = ", ".join(str(size * generation.cores_per_chip) for size in generation.chips)
        if generation.any_size:
            numbers += f", and other multiples of {generation.host.chips * generation.cores_per_chip}"
        raise UsageError(f"--slice={name} is no TPU slice; an example is v5e-16. {match[1]} has {numbers}.")
    return _slice(match[1], chips)


def of_generation(name: str) -> Sequence[Slice]:
    """The slices of a generation, from the smallest."""
    return [_slice(name, chips) for chips in GENERATIONS[name].chips]


def _slice(generation_name: str, chips: int) -> Slice:
    generation = GENERATIONS[generation_name]
    host = next((host for host in generation.single_hosts if host.chips == chips), generation.host)
    return Slice(f"{generation_name}-{chips * generation.cores_per_chip}", host, chips // host.chips)
