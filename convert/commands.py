"""What the subcommands do, from settings to results."""

import contextlib
import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from slicecast.configs import families, maxtext, slices
from slicecast.convert import hosts, orbax_checkpoint, plan, requantize, verify
from slicecast.convert.codecs import quantization_config
from slicecast.convert.device import choose_implementation
from slicecast.convert.errors import OutputError, TargetError, UsageError, VerificationError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import Ignore, ModelOptions
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import GB, Machine, available_host_bytes
from slicecast.convert.pipeline import Pipeline, array_spec
from slicecast.convert.plan import Plan
from slicecast.convert.progress import ProgressDisplay, peak_resident_bytes
from slicecast.convert.requantize import Requantized
from slicecast.convert.settings import Settings
from slicecast.convert.source.checkpoint import open_checkpoint, sample_contents

# The part of free memory that is used where the user gives no budget; the rest is for the program itself and for
# others.
_DEFAULT_SHARE = 0.75

# The file in the output directory that holds the digest of source and plan. It matters while the checkpoint is
# unfinished.
_PLAN_FILE = "slicecast-plan"

# Settings that say what the result is; `verify` finds them in the checkpoint's metadata.
_RECORDED = (
    "param_scan_axis",
    "save_dtype",
    "model_name",
    "rope_type",
    "enable_mtp",
    "use_multimodal",
    "vocab_size",
    "maxtext_version",
    "ignore_extra",
)

# Boxes compared at once by `verify`; NumPy lets go of the interpreter for most of the work.
_VERIFY_WORKERS = 2


@dataclass(frozen=True)
class Summary:
    """What a conversion did, on this process.

    Attributes:
        items: The directory to give to MaxText as `load_parameters_path`.
        waves: How many waves the process had.
        resumed: How many of them an earlier run had finished.
        in_bytes: Source bytes read.
        requests: Read requests.
        seconds: Time taken.
        peak_bytes: The most memory that the process held.
    """

    items: str
    waves: int
    resumed: int
    in_bytes: int
    requests: int
    seconds: float
    peak_bytes: int


def make_plan(settings: Settings, machine: Machine) -> Plan:
    """The plan for these settings, from headers only.

    Raises:
        SlicecastError: Whatever keeps the checkpoint from being converted.
    """
    checkpoint = open_checkpoint(settings.hf_model_path, settings.revision)
    options = ModelOptions(
        model_name=settings.model_name,
        rope_type=settings.rope_type,
        enable_mtp=settings.enable_mtp,
        use_multimodal=settings.use_multimodal,
        vocab_size=settings.vocab_size,
    )
    model = families.recognize(checkpoint.config, options)
    if settings.ignore_extra is not None:
        extra = Ignore(settings.ignore_extra, f"--ignore_extra={settings.ignore_extra}")
        model = dataclasses.replace(model, ignores=(*model.ignores, extra))
    layout = Layout(settings.scan_layers, settings.param_scan_axis, settings.save_dtype)
    if layout.scan_layers and model.unscanned_only:
        raise TargetError(
            f"{model.description}: MaxText has this model unscanned only, for {model.unscanned_only}. "
            "Add --scan_layers=false."
        )
    quantization = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    version = settings.maxtext_version or maxtext.VERSION
    maxtext.model_names(version)  # Refuses a release that is not known, whether or not a model is named.
    resolved, ignored = resolve.resolve(checkpoint, model, layout, quantization)
    if settings.model_name is not None and not settings.override_model_config:
        maxtext.check(
            settings.model_name,
            layout,
            [item.leaf for item in resolved],
            enable_mtp=settings.enable_mtp,
            use_multimodal=settings.use_multimodal,
            version=version,
        )
    description = quantization.description if quantization else "not quantized"
    return plan.make(checkpoint, model, layout, description, resolved, ignored, machine)


def machine_for_planning(settings: Settings) -> Machine:
    """The machines that `plan` plans for: those of `--slice` and `--hosts`, or this one."""
    if settings.slice is not None:
        described = slices.parse(settings.slice)
        generation = described.generation
        return Machine(
            hosts=settings.hosts or described.hosts,
            devices=described.chips_of_each_host,
            host_bytes=_bytes(settings.host_memory_gb, generation.host_gb * GB),
            device_bytes=_bytes(settings.device_memory_gb, generation.chip_gb * GB),
        )
    here = this_machine(settings)
    return Machine(settings.hosts or here.hosts, here.devices, here.host_bytes, here.device_bytes)


def this_machine(settings: Settings) -> Machine:
    """The machines that this process runs on."""
    devices = jax.local_devices()
    device_bytes = None
    if devices[0].platform != "cpu":
        statistics = devices[0].memory_stats() or {}
        device_bytes = _bytes(settings.device_memory_gb, int(statistics.get("bytes_limit", 16 * GB)))
    return Machine(
        hosts=jax.process_count(),
        devices=len(devices),
        host_bytes=_bytes(settings.host_memory_gb, available_host_bytes()),
        device_bytes=device_bytes,
    )


def _bytes(gigabytes: float | None, available: int) -> int:
    return int(available * _DEFAULT_SHARE) if gigabytes is None else int(gigabytes * GB)


def convert(settings: Settings, console: Console, *, describe: Callable[[Plan], None]) -> Summary:
    """Converts a checkpoint; called by all processes.

    Args:
        settings: What the user asked for.
        console: Where process 0 shows what happens.
        describe: Called with the plan on process 0, before anything is written.

    Raises:
        SlicecastError: If something keeps the checkpoint from being converted, or from being finished.
    """
    start = time.monotonic()
    if settings.base_output_directory is None:
        raise OutputError("convert needs --base_output_directory.")
    output = output_directory(settings.base_output_directory)
    made = make_plan(settings, hosts.smallest(this_machine(settings)))
    process = jax.process_index()
    digest = hashlib.sha256(f"{made.digest} {sample_contents(made.checkpoint)}".encode()).hexdigest()
    hosts.check_agreement(digest)
    hosts.check_shared(output)
    _check_output(output, digest)
    _begin(output, digest)
    if process == 0:
        describe(made)

    waves = made.waves[process]
    display_console = console if process == 0 else Console(quiet=True)
    label = f"host 0 of {made.machine.hosts}: " if made.machine.hosts > 1 else ""
    out_bytes = sum(wave.out_bytes for wave in waves)
    with ProgressDisplay(display_console, len(waves), out_bytes, made.machine.host_bytes, label) as display:
        implementation, warning = choose_implementation(jax.local_devices()[0], made.kernels)
        if warning is not None:
            display_console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
        pipeline = Pipeline(made, process, jax.local_devices(), display.report, implementation)
        arrays = {planned.leaf.path: array_spec(planned) for planned in made.leaves}
        with _on_interrupt(pipeline.stop):
            orbax_checkpoint.save(output, arrays, pipeline.run, _custom_metadata(settings, made))
    return Summary(
        items=str(output / orbax_checkpoint.STEP / orbax_checkpoint.ITEM),
        waves=display.waves,
        resumed=display.resumed,
        in_bytes=pipeline.reader.bytes_read,
        requests=pipeline.reader.requests,
        seconds=time.monotonic() - start,
        peak_bytes=peak_resident_bytes(),
    )


@contextlib.contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the first Ctrl-C, whatever the main thread waits for then; the second has its usual effect.

    An exception in the main thread would not do: Orbax would wait for the conversion, which would not know of it.
    """

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def output_directory(path: str) -> Path:
    """The local directory that a flag names.

    Raises:
        OutputError: If it is a URL.
    """
    if "://" in path:
        raise OutputError(f"{path}: only directories can be written. Mount the bucket, and give the directory.")
    return Path(os.path.abspath(path))


def _custom_metadata(settings: Settings, made: Plan) -> dict[str, Any]:
    """The step's custom metadata: `scan_layers` for MaxText, the rest for `verify` and for resuming."""
    return {
        "scan_layers": settings.scan_layers,
        "slicecast": {
            "version": metadata.version("slicecast"),
            "plan": made.digest,
            "source": made.checkpoint.path,
            **{name: getattr(settings, name) for name in _RECORDED},
        },
    }


def _check_output(output: Path, digest: str) -> None:
    """Refuses an output directory that holds a finished checkpoint, or an unfinished one with another plan."""
    finished = orbax_checkpoint.finished_checkpoint(output)
    if finished is not None:
        raise OutputError(
            f"{finished}: there is a finished checkpoint already. Give another --base_output_directory, or remove it."
        )
    unfinished = orbax_checkpoint.unfinished_checkpoint(output)
    if unfinished is None or not orbax_checkpoint.has_data(unfinished):
        return
    begun = _begun_plan(output)
    if begun != digest:
        raise OutputError(
            f"{unfinished}: an unfinished checkpoint of another source, with other flags, or of another version of "
            f"slicecast is there (begun as {str(begun)[:12]}, this is {digest[:12]}). Run the "
            "command that began it, give another --base_output_directory, or remove it."
        )


def _begun_plan(output: Path) -> str | None:
    """The digest of source and plan that the unfinished checkpoint in an output directory follows."""
    try:
        return (output / _PLAN_FILE).read_text()
    except FileNotFoundError:
        return None


def _begin(output: Path, digest: str) -> None:
    """Makes the output directory, and notes in it which source and plan it is for."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            # Renamed into place, so that it is whole whenever the run is killed.
            written = output / f"{_PLAN_FILE}.new"
            written.write_text(digest)
            written.replace(output / _PLAN_FILE)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}). Give another directory.") from error


def _own_metadata(step: Path) -> Mapping[str, Any]:
    own = orbax_checkpoint.read_custom_metadata(step).get("slicecast")
    return own if isinstance(own, dict) else {}


def settings_of(output: Path, hf_model_path: str, revision: str | None = None) -> Settings:
    """The settings that a finished checkpoint was made with, from its metadata.

    Raises:
        OutputError: If there is no finished checkpoint, or slicecast did not make it.
    """
    step = orbax_checkpoint.require_finished(output)
    own = _own_metadata(step)
    if not own:
        raise OutputError(f"{step}: this checkpoint was not written by slicecast; verify can only check its own.")
    recorded = str(own.get("source"))
    if revision is None and recorded.startswith(f"hf://{hf_model_path.removeprefix('hf://')}@"):
        hf_model_path = recorded  # The commit, wherever its branch is by now.
    return Settings(
        hf_model_path=hf_model_path,
        revision=revision,
        base_output_directory=str(output),
        scan_layers=bool(orbax_checkpoint.read_custom_metadata(step)["scan_layers"]),
        override_model_config=True,
        **{name: own[name] for name in _RECORDED if name in own},
    )


def verify_checkpoint(
    settings: Settings, host_memory_gb: float | None, console: Console, *, requantize_too: bool = False
) -> Sequence[str]:
    """Compares a finished checkpoint with its source.

    Args:
        settings: The settings that it was made with; see `settings_of`.
        host_memory_gb: Memory to use, in GB; None for a part of what is free.
        console: Where something is shown meanwhile.
        requantize_too: Whether to quantize INT4 leaves again too, and to compare codes and scales.

    Returns:
        A line for each thing that was checked and found right.

    Raises:
        VerificationError: Naming each leaf that differs.
        OutputError: If there is no finished checkpoint of ours.
        UsageError: If there is nothing to quantize again.
    """
    output = Path(str(settings.base_output_directory))
    machine = Machine(1, 1, _bytes(host_memory_gb, available_host_bytes()), None)
    made = make_plan(settings, machine)
    arrays = orbax_checkpoint.open_arrays(output)
    differences = verify.compare_trees(made, arrays)
    if not differences:
        with console.status("comparing"):
            differences = verify.compare_values(made, arrays, lambda _: None, _VERIFY_WORKERS)
    if differences:
        raise VerificationError(
            f"{output}: {len(differences)} of {len(made.leaves)} leaves differ from the source:\n"
            + "\n".join(map(str, differences))
        )
    values = sum(planned.nbytes // planned.itemsize for planned in made.leaves)
    lines = [f"{len(made.leaves)} leaves, {values} values: all equal to the source, bit for bit"]
    if requantize_too:
        with console.status("quantizing again"):
            lines.append(_requantized(requantize.compare(made, arrays, _VERIFY_WORKERS), output))
    return lines


def _requantized(found: Requantized, output: Path) -> str:
    if not found.leaves:
        raise UsageError("--requantize: no leaf of this checkpoint comes from symmetric INT4 weights alone.")
    if found.differences:
        raise VerificationError(
            f"{output}: {len(found.differences)} of {found.leaves} INT4 leaves do not give the source's codes and "
            "scales when they are quantized again:\n" + "\n".join(map(str, found.differences))
        )
    alike = ""
    if found.ambiguous:
        alike = f"; the scales of {found.ambiguous} groups have a neighbor that gives the same values"
    return (
        f"{found.leaves} INT4 leaves, {found.groups} groups: quantized again, they give the source's codes and scales"
        f"{alike}"
    )
