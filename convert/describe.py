"""A plan as people read it, and as scripts do."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from slicecast.configs import families, maxtext, slices
from slicecast.convert import estimate as estimating
from slicecast.convert.codecs.formats import FORMATS
from slicecast.convert.estimate import Estimate
from slicecast.convert.memory import GB
from slicecast.convert.plan import Plan, PlannedLeaf

# Leaves shown in full; an unscanned Kimi-K2 has a thousand.
_LARGEST = 8

# The generation whose slices are searched where the plan is for none: that with the smallest hosts and chips.
_SMALLEST_GENERATION = "v5e"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the plan decides, in numbers and names, for scripts."""
    machine = plan.machine
    return {
        "source": plan.checkpoint.path,
        "model": plan.model.description,
        "quantization": plan.quantization,
        "formats": _formats(plan),
        "notes": list(plan.model.notes),
        "files": len(plan.checkpoint.file_sizes),
        "tensors": len(plan.checkpoint.tensors),
        "ignored": [{"why": i.why, "tensors": i.count, "bytes": i.nbytes} for i in plan.ignored],
        "scan_layers": plan.layout.scan_layers,
        "leaves": len(plan.leaves),
        "parameters": sum(leaf.nbytes // leaf.itemsize for leaf in plan.leaves),
        "chunks": sum(leaf.chunk_count for leaf in plan.leaves),
        "boxes": sum(1 for _ in plan.boxes),
        "in_bytes": plan.in_bytes,
        "out_bytes": plan.out_bytes,
        "hosts": machine.hosts,
        "devices_per_host": machine.devices,
        "waves_per_host": [len(waves) for waves in plan.waves],
        "waves_in_flight": plan.waves_in_flight,
        "host_budget_bytes": machine.host_bytes,
        "host_bytes_in_flight": plan.host_bytes_in_flight,
        "device_budget_bytes": machine.device_bytes,
        "device_bytes_in_flight": None if machine.device_bytes is None else plan.device_bytes_in_flight,
        "digest": plan.digest,
        "estimate": None if machine.host is None else _estimate_as_json(plan, estimating.estimate(plan)),
    }


def _estimate_as_json(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    """What the plan will take, and which machines would do."""
    slowest = estimate.slowest
    generation = _generation(estimate)
    return {
        "host": estimate.host.name,
        "measured": False,
        "seconds": round(estimate.seconds, 1),
        "start_seconds": round(estimate.start_seconds, 1),
        "bottleneck": slowest.bottleneck,
        "stages_of_slowest_host": [
            {"stage": stage.name, "resource": stage.resource, "seconds": round(stage.seconds, 2)}
            for stage in slowest.stages
        ],
        "requests": estimate.requests,
        "stored_bytes": estimate.stored_bytes,
        "objects": estimate.objects,
        "peak_host_bytes": estimate.peak_host_bytes,
        "base_host_bytes": estimating.BASE_HOST_BYTES,
        "traffic": _traffic(plan.checkpoint.path),
        "chip_hours": round(estimate.chip_hours, 3),
        "host_hours": round(estimate.host_hours, 3),
        "per_host": [
            {
                "in_bytes": host.in_bytes,
                "out_bytes": host.out_bytes,
                "stored_bytes": host.stored_bytes,
                "requests": host.requests,
                "waves": host.waves,
                "seconds": round(host.seconds, 1),
            }
            for host in estimate.hosts
        ],
        "smallest_slice": _smallest_as_json(estimating.smallest_slice(plan, generation)),
        "smallest_slice_to_load": estimating.smallest_slice_to_load(plan, generation),
        "smallest_cpu_host": _smallest_as_json(estimating.smallest_cpu_host(plan)),
    }


def _smallest_as_json(found: tuple[str, Estimate] | None) -> dict[str, Any] | None:
    return None if found is None else {"name": found[0], "seconds": round(found[1].seconds, 1)}


def _generation(estimate: Estimate) -> str:
    """The generation whose slices are searched."""
    chip = estimate.host.chip
    if chip is None:
        return _SMALLEST_GENERATION
    return next(name for name, generation in slices.GENERATIONS.items() if generation.host.chip == chip)


def _traffic(source: str) -> str:
    """What kind of traffic reading the source is, for its price."""
    match source.partition("://")[0]:
        case "hf" | "https" | "http":
            return "from the internet"
        case "gs":
            return "from a bucket; from another region it has a price"
    return "from a file system"


def show(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    for name, text in _facts(plan):
        _print(console, f"{name:<12} {text}")
    for ignored in plan.ignored:
        _print(console, f"{'left out':<12} {ignored.count} tensors, {_size(ignored.nbytes)}: {ignored.why}")
    for note in plan.model.notes:
        _print(console, f"{'note':<12} {note}")
    _print(console, f"{'leaves':<12} the largest of {len(plan.leaves)}:")
    for planned in sorted(plan.leaves, key=lambda leaf: -leaf.nbytes)[:_LARGEST]:
        _print(console, f"  {_leaf(planned)}")


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    facts, machine = as_json(plan), plan.machine
    per_host = [sum(wave.out_bytes for wave in waves) for waves in plan.waves]
    devices = f"{machine.devices} device{'s' if machine.devices > 1 else ''}"
    yield "model", plan.model.description
    yield "source", f"{facts['files']} files, {facts['tensors']} tensors; {plan.quantization}"
    yield "formats", ", ".join(f"{count} x {name}" for name, count in facts["formats"].items())
    yield "read", f"{_size(plan.in_bytes)}, by ranges, {_how_often(plan)}"
    yield (
        "write",
        (
            f"{_size(plan.out_bytes)} before compression: {len(plan.leaves)} leaves, {facts['chunks']} chunks, "
            f"layers {'scanned' if plan.layout.scan_layers else 'unscanned'}"
        ),
    )
    yield "hosts", f"{machine.hosts} with {devices} each; {_range(per_host, _size)} of output a host"
    yield (
        "work",
        (
            f"{facts['boxes']} boxes in {_range(facts['waves_per_host'], str)} waves a host, "
            f"up to {plan.waves_in_flight} in flight"
        ),
    )
    yield (
        "host memory",
        f"{_size(plan.host_bytes_in_flight)} in flight at most; the budget is {_size(machine.host_bytes)}",
    )
    yield "chip memory", _chip_memory(plan)
    if facts["estimate"] is not None:
        yield from _expectations(facts["estimate"])
    yield "plan", plan.digest[:12]


def _expectations(estimate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the plan will take, from its JSON."""
    per_host = estimate["per_host"]
    incoming = _range([host["in_bytes"] for host in per_host], _size)
    outgoing = _range([host["stored_bytes"] for host in per_host], _size)
    yield "traffic", f"{incoming} in and about {outgoing} out a host, compressed; {estimate['requests']} reads"
    yield (
        "peak memory",
        f"about {_size(estimate['peak_host_bytes'])} a host, of which {_size(estimate['base_host_bytes'])} for the "
        "program itself",
    )
    yield (
        "time",
        f"about {duration(estimate['seconds'])} on {len(per_host)} x {estimate['host']}, an estimate"
        f"{', not measured on a TPU' if estimate['chip_hours'] else ''}; the bottleneck: {estimate['bottleneck']}",
    )
    stages = [f"{stage['stage']} {duration(stage['seconds'])}" for stage in estimate["stages_of_slowest_host"]]
    yield "stages", f"start {duration(estimate['start_seconds'])}; then, overlapping, {', '.join(stages)}"
    kind = "chip" if estimate["chip_hours"] else "host"
    yield (
        "cost",
        f"{estimate[f'{kind}_hours']:.2f} {kind}-hours; {estimate['requests']} reads {estimate['traffic']}; "
        f"about {estimate['objects']} objects written",
    )
    smallest = [
        f"{found['name']} in about {duration(found['seconds'])}"
        for found in (estimate["smallest_slice"], estimate["smallest_cpu_host"])
        if found is not None
    ]
    loads = estimate["smallest_slice_to_load"]
    fits = f"the weights fit the chips of {loads}" if loads else "no slice's chips hold the weights"
    yield "smallest", f"{' or '.join(smallest) or 'no known machine suffices'}; {fits}"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _how_often(plan: Plan) -> str:
    """How often source bytes are read: once, but for tensors that become several leaves, as gpt-oss' experts do."""
    parts = (part for leaf in plan.leaves for tensor in leaf.sources.values() for part in tensor.parts)
    once = sum({part.tensor.name: part.tensor.nbytes for part in parts}.values())
    again = plan.in_bytes - once
    # Scales that lie on the border of two boxes are read for both: next to nothing.
    if again < once // 100:
        return "each byte by one host"
    return f"of which {_size(again)} again, for a second leaf that comes from the same tensors"


def _chip_memory(plan: Plan) -> str:
    if plan.machine.device_bytes is None:
        return "none: the devices are this host's CPU, and count as host memory"
    return f"{_size(plan.device_bytes_in_flight)} at most; the budget is {_size(plan.machine.device_bytes)} a chip"


def _leaf(planned: PlannedLeaf) -> str:
    leaf, tiling = planned.leaf, planned.tiling
    return (
        f"{_size(planned.nbytes):>9}  {leaf.dtype}{list(leaf.shape)}, chunks {list(tiling.chunk)} of "
        f"{list(tiling.inner)}  {leaf.path}"
    )


def _formats(plan: Plan) -> dict[str, int]:
    """How many source tensors each codec decodes."""
    return dict(Counter(_codecs(plan)).most_common())


def _codecs(plan: Plan) -> Iterator[str]:
    return (stored.codec.description for planned in plan.leaves for stored in planned.sources.values())


def _range(values: list[int], text: Callable[[int], str]) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def _size(nbytes: int) -> str:
    """A size in GB, or in MB where that would be nothing."""
    return f"{nbytes / GB:.1f} GB" if nbytes >= GB else f"{nbytes / 1e6:.1f} MB"


def formats_as_table() -> str:
    """The supported formats as a Markdown table, which the README shows too."""
    return _table(
        ("format", "stored as", "decoded by", "for example"), [(f.name, f.stored, f.decoder, f.models) for f in FORMATS]
    )


def families_as_table(version: str) -> str:
    """The families as a Markdown table, which the README shows too.

    Args:
        version: The MaxText release whose models are listed.
    """
    rows = [
        (f["family"], ", ".join(f["models"]), f["layouts"], ", ".join(f["extras"]) or "-", ", ".join(f["compared"]))
        for f in families_as_records(version)
    ]
    return _table(("family", f"models of MaxText {version}", "layers", "and", "compared"), rows)


def families_as_records(version: str) -> list[dict[str, Any]]:
    """The families, for scripts: what `config.json` says, MaxText's models, their layouts, and what was compared."""
    records = []
    # Prefixes overlap: the longest one tells which family a model belongs to.
    prefixes = {prefix: family.title for family in families.FAMILIES for prefix in family.models}
    for family in families.FAMILIES:
        models = [
            name
            for name in maxtext.model_names(version)
            if prefixes[max((p for p in prefixes if name.startswith(p)), key=len)] == family.title
        ]
        features = [maxtext.features(name, version) for name in models]
        scanned = sum("scanned" in each for each in features)
        extras = [name for name in ("multimodal", "mtp") if any(f"{name}_unscanned" in each for each in features)]
        records.append(
            {
                "family": family.title,
                "architectures": list(family.rules.ARCHITECTURES),
                "models": models,
                "layouts": "both" if scanned == len(models) else "both, or unscanned only" if scanned else "unscanned",
                "extras": extras,
                "compared": ["tree", *family.compared],
            }
        )
    return records


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def formats_as_json() -> str:
    """The supported formats, for scripts."""
    return json.dumps([dataclasses.asdict(f) for f in FORMATS], indent=2)
