"""What `plan` and `verify` do, from settings to results; `convert` is in `conversion.py`."""

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath
from rich.console import Console

from slicecast.configs import families, maxtext, slices
from slicecast.convert import orbax_checkpoint, plan, requantize, verify
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import OutputError, TargetError, UsageError, VerificationError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import Ignore, ModelOptions
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import GB, Machine, available_host_bytes
from slicecast.convert.output import open_output
from slicecast.convert.plan import Plan
from slicecast.convert.requantize import Requantized
from slicecast.convert.settings import Settings
from slicecast.convert.source.checkpoint import open_checkpoint

# The part of free memory that is used where the user gives no budget; the rest is for the program itself and for
# others.
_DEFAULT_SHARE = 0.75

# Settings that say what the result is; `verify` finds them in the checkpoint's metadata.
RECORDED = (
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


def settings_of(output: epath.Path, hf_model_path: str, revision: str | None = None) -> Settings:
    """The settings that a finished checkpoint was made with, from its metadata.

    Raises:
        OutputError: If there is no finished checkpoint, or slicecast did not make it.
    """
    step = orbax_checkpoint.require_finished(output)
    own = orbax_checkpoint.read_own_metadata(step)
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
        **{name: own[name] for name in RECORDED if name in own},
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
    output = open_output(str(settings.base_output_directory))
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


def _requantized(found: Requantized, output: epath.Path) -> str:
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
