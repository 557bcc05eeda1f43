"""What a Hugging Face checkpoint holds, also one that no family covers or that a conversion refuses."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from slicecast.configs import families
from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.constant import Constant
from slicecast.convert.codecs.joined import Joined
from slicecast.convert.codecs.plain import Integers, Plain
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import PlanErrors, SlicecastError
from slicecast.convert.inspection.weights import Weight, find_weights
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.resolve import Ignored, ResolvedLeaf
from slicecast.convert.mapping.target import Layout
from slicecast.convert.source.checkpoint import Checkpoint, read_checkpoint
from slicecast.convert.source.storage import Storage


@dataclass(frozen=True)
class SourceContents:
    """What a Hugging Face checkpoint holds.

    Attributes:
        checkpoint: What could be read.
        complete: Whether all of it could be read.
        quantization: What it announces.
        weights: Its weights, with their formats and partners.
        model: What its config describes, if a family covers it.
        leaves: How many leaves a conversion would make; None if it would refuse.
        ignored: What a conversion would leave out.
        odd: Whatever keeps it from being converted, or could not be understood.
    """

    checkpoint: Checkpoint
    complete: bool
    quantization: QuantizationConfig | None
    weights: tuple[Weight, ...]
    model: str | None
    leaves: int | None
    ignored: tuple[Ignored, ...]
    odd: tuple[SlicecastError, ...]

    @property
    def path(self) -> str:
        """Where it is."""
        return self.checkpoint.path


def read_source(storage: Storage) -> SourceContents:
    """Reads configs and headers, and nothing of the tensors' data.

    Raises:
        MissingFileError, ReadError: There is no such directory, or it cannot be listed.
        PlanErrors: Neither config nor headers can be read.
    """
    checkpoint, odd = read_checkpoint(storage)
    if not checkpoint.tensors and not checkpoint.config:
        raise PlanErrors(odd)
    complete = not odd  # Otherwise most of what else could be said follows from what is missing.
    quantization = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    model = None
    resolved, ignored = list[ResolvedLeaf](), list[Ignored]()
    try:
        if checkpoint.config:
            model = families.recognize(checkpoint.config)
        if model is not None and complete:
            layout = Layout(scan_layers=not model.unscanned_only)
            resolved, ignored = resolve.resolve(checkpoint, model, layout, quantization)
    except PlanErrors as errors:
        odd += errors.errors
    except SlicecastError as error:
        odd.append(error)
    weights, failures = find_weights(checkpoint.tensors, quantization, _quantized(resolved))
    if model is None and complete:
        odd += failures
    return SourceContents(
        checkpoint=checkpoint,
        complete=complete,
        quantization=quantization,
        weights=tuple(weights),
        model=None if model is None else model.description,
        leaves=None if odd else len(resolved),
        ignored=tuple(ignored),
        odd=tuple(odd),
    )


def _quantized(resolved: Iterable[ResolvedLeaf]) -> list[StoredTensor]:
    """The quantized weights among the sources of leaves, each as it is stored."""
    others = (Constant, Integers, Joined, Plain)
    return [stored for item in resolved for stored in item.sources.values() if not isinstance(stored.codec, others)]


def notes(contents: SourceContents) -> dict[str, str]:
    """What to say of each tensor beside its name, dtype and shape."""
    said = {}
    for weight in contents.weights:
        first, *partners = weight.tensors
        module = first.rpartition(".")[0] + "."
        if weight.quantized:
            with_partners = f" with {', '.join(name.removeprefix(module) for name in partners)}" if partners else ""
            said[first] = f"{weight.format}: {list(weight.shape)}{with_partners}"
        for partner in partners:
            said[partner] = f"of {first.removeprefix(module)}"
    named = {name for weight in contents.weights for name in weight.tensors}
    for name in contents.checkpoint.tensors:
        if name not in named:
            said[name] = detect.RUNTIME_ONLY_REASON if detect.is_runtime_only(name) else "no weight of a known format"
    return said


def as_json(contents: SourceContents) -> dict[str, Any]:
    """Everything, for scripts."""
    checkpoint = contents.checkpoint
    return {
        "kind": "source",
        "path": contents.path,
        "model": contents.model,
        "leaves": contents.leaves,
        "ignored": [{"why": i.why, "tensors": i.count, "bytes": i.nbytes} for i in contents.ignored],
        "odd": [{"kind": type(error).__name__, "message": str(error)} for error in contents.odd],
        "quantization": contents.quantization.description if contents.quantization else None,
        "parameters": parameters(contents),
        "bytes": checkpoint.total_bytes,
        "dtypes": {name: asdict(total) for name, total in dtypes(contents).items()},
        "formats": {name: asdict(total) for name, total in formats(contents).items()},
        "files": dict(checkpoint.file_sizes),
        "config": dict(checkpoint.config),
        "side_configs": dict(checkpoint.side_configs),
        "tensors": [asdict(tensor) for tensor in checkpoint.tensors.values()],
        "weights": [asdict(weight) for weight in contents.weights],
    }


def parameters(contents: SourceContents) -> int:
    """How many values its weights have."""
    return sum(weight.parameters for weight in contents.weights)


@dataclass(frozen=True, slots=True)
class Total:
    """Tensors, or weights, of one kind together.

    Attributes:
        count: How many.
        nbytes: Their stored bytes, partners included.
    """

    count: int
    nbytes: int


def dtypes(contents: SourceContents) -> dict[str, Total]:
    """The tensors of each stored dtype, those with most bytes first."""
    return totals((tensor.dtype, tensor.nbytes) for tensor in contents.checkpoint.tensors.values())


def formats(contents: SourceContents) -> dict[str, Total]:
    """The weights of each format, those with most bytes first."""
    tensors = contents.checkpoint.tensors
    return totals((weight.format, sum(tensors[name].nbytes for name in weight.tensors)) for weight in contents.weights)


def totals(items: Iterable[tuple[str, int]]) -> dict[str, Total]:
    """Counts and bytes by kind, those with most bytes first."""
    counts, nbytes = Counter[str](), Counter[str]()
    for kind, size in items:
        counts[kind] += 1
        nbytes[kind] += size
    return {kind: Total(counts[kind], size) for kind, size in nbytes.most_common()}
