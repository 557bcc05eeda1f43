"""What `plan` does, from settings to results; `convert` is in `conversion.py`, others have folders."""

import dataclasses
import os

import jax

from slicecast.configs import families, maxtext, slices
from slicecast.configs.hosts import CPU_HOSTS, Host
from slicecast.convert import plan
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import Ignore, ModelOptions
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import GB, Machine, available_host_bytes, budget
from slicecast.convert.plan import Plan
from slicecast.convert.settings import Settings
from slicecast.convert.sharding import Sharding, axis_rules, mesh
from slicecast.convert.source.checkpoint import open_checkpoint

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
    "parallelism",
    "ignore_extra",
)


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
    sharding = None
    if settings.parallelism is not None:
        rules = axis_rules(version, settings.model_name)
        sharding = Sharding(mesh(settings.parallelism), rules)
        sharding.check(item.leaf for item in resolved)
    description = quantization.description if quantization else "not quantized"
    return plan.make(checkpoint, model, layout, description, resolved, ignored, machine, sharding)


def machine_for_planning(settings: Settings) -> Machine:
    """The machines that `plan` plans for: those of `--slice` and `--hosts`, or this one."""
    if settings.slice is None:
        here = this_machine(settings)
        described = Host("this machine", os.cpu_count() or 1, round(available_host_bytes() / GB, 1), None)
        if here.device_bytes is not None:
            # Which chips they are matters little: they and PCIe are the fastest stages.
            described = dataclasses.replace(described, chips=here.devices, chip=slices.GENERATIONS["v5e"].host.chip)
        return dataclasses.replace(here, hosts=settings.hosts or here.hosts, host=described)
    if settings.slice in CPU_HOSTS:
        machine = Machine.of(CPU_HOSTS[settings.slice], settings.hosts or 1)
    else:
        described_slice = slices.parse(settings.slice)
        machine = Machine.of(described_slice.host, settings.hosts or described_slice.hosts)
    if settings.host_memory_gb is not None:
        machine = dataclasses.replace(machine, host_bytes=int(settings.host_memory_gb * GB))
    if settings.device_memory_gb is not None and machine.device_bytes is not None:
        machine = dataclasses.replace(machine, device_bytes=int(settings.device_memory_gb * GB))
    return machine


def this_machine(settings: Settings) -> Machine:
    """The machines that this process runs on."""
    devices = jax.local_devices()
    device_bytes = None
    if devices[0].platform != "cpu":
        statistics = devices[0].memory_stats() or {}
        device_bytes = budget(settings.device_memory_gb, int(statistics.get("bytes_limit", 16 * GB)))
    return Machine(
        hosts=jax.process_count(),
        devices=len(devices),
        host_bytes=budget(settings.host_memory_gb, available_host_bytes()),
        device_bytes=device_bytes,
    )
