"""What a checkpoint announces about its quantization.

The announcement only supplies what stored shapes and dtypes cannot: block sizes, widths of packed integers, the version
of a format. Whether a tensor is quantized is decided by what is stored, for lists of modules left out are unreliable.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slicecast.convert.source.safetensors_header import clip

# Methods whose tensors the codecs know. What each announces beside its name is read by the functions below.
_AUTO_ROUND = "auto-round"
_BITSANDBYTES = "bitsandbytes"
_COMPRESSED_TENSORS = "compressed-tensors"
_MLX = "mlx"
_MODELOPT = "modelopt"

# Layouts of compressed-tensors that its codecs cover. `mixed-precision` names one of them for each group of modules.
_COMPRESSED_TENSORS_FORMATS = frozenset(
    (
        "dense",
        "float-quantized",
        "int-quantized",
        "mixed-precision",
        "mxfp4-pack-quantized",
        "mxfp8-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    )
)

# Algorithms of ModelOpt whose weights are multiplied by their scales and nothing else.
_MODELOPT_ALGORITHMS = frozenset(
    (
        "FP8",
        "FP8_BLOCK_SCALES",
        "FP8_PB_WO",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "MIXED_PRECISION",
        "MXFP8",
        "NVFP4",
        "W4A16_NVFP4",
    )
)
_MODELOPT_BLOCKS = {"FP8_BLOCK_SCALES": (128, 128), "FP8_PB_WO": (128, 128), "MXFP8": (1, 32)}

# Widths of packed integers that the codecs unpack.
_BITS = frozenset(range(2, 9))

# Packed integers are no wider than the words that hold them. Announcements may give 16 for modules left as they are.
_WORD_BITS = 32

# The group size with which GPTQ and AWQ announce that all columns share one scale.
ONE_GROUP = -1

# The group of the micro-scaling formats, where an announcement leaves it out.
_MX_BLOCK = (1, 32)

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The announced format, as far as it matters for decoding.

    Attributes:
        method: The library or format: `fp8`, `compressed-tensors`, `gptq`, ...
        description: What the plan calls it, for example `compressed-tensors pack-quantized`.
        block: The rows and columns of a block that shares a scale, or None.
        bits: The announced widths of packed integers; several where modules differ.
        group_sizes: The announced group sizes; several where modules differ. `ONE_GROUP` stands for all columns.
        zero_stored_less_one: Whether GPTQ's zero points are stored less one.
        asymmetric: Whether all integer weights have zero points, so that one without any lacks a part.
        reordered: Whether GPTQ's inputs are ordered by activation, so that a weight without their groups lacks a part.
        refusal: If the format is one that no codec covers: its description for the error message.
    """

    method: str
    description: str
    block: Block | None = None
    bits: frozenset[int] = frozenset()
    group_sizes: frozenset[int] = frozenset()
    zero_stored_less_one: bool = False
    asymmetric: bool = False
    reordered: bool = False
    refusal: str | None = None


def read(config: Mapping[str, Any], side_configs: Mapping[str, Any] | None = None) -> QuantizationConfig | None:
    """The announcement of a checkpoint, from wherever publishers put it; None if it announces no quantization.

    Args:
        config: The parsed `config.json`.
        side_configs: The contents of the files beside it that announce a quantization, by file name.
    """
    return next((_understand(method, found) for method, found in _announcements(config, side_configs or {})), None)


def _announcements(
    config: Mapping[str, Any], side_configs: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each announcement with the name of its method, those that say most first."""
    text = config.get("text_config")
    sections = [config] + ([text] if isinstance(text, Mapping) else [])
    for key in ("quantization_config", "compression_config"):
        for section in sections:
            found = section.get(key)
            if isinstance(found, Mapping) and found:
                yield _method(found), found
    modelopt = side_configs.get("hf_quant_config.json")
    if isinstance(modelopt, Mapping) and isinstance(modelopt.get("quantization"), Mapping):
        yield _MODELOPT, modelopt["quantization"]
    for section in sections:
        found = section.get("quantization")
        if isinstance(found, Mapping) and found:
            yield (_COMPRESSED_TENSORS if "config_groups" in found else _MLX), found
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        found = side_configs.get(file)
        if isinstance(found, Mapping) and found:
            yield _method({"quant_method": method, **found}), found


def _method(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if method is not None:
        # Old releases of compressed-tensors spell it with an underscore; ModelOpt may add what it is for.
        name = str(method).lower().replace("_", "-")
        return _MODELOPT if name.startswith(_MODELOPT) else name
    producer = found.get("producer")
    if isinstance(producer, Mapping) and producer.get("name") == _MODELOPT:
        return _MODELOPT
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return _BITSANDBYTES
    if "bits" in found and "config_groups" not in found:
        return _MLX  # mlx-lm writes its announcement under this key too.
    return _COMPRESSED_TENSORS


def _understand(method: str, found: Mapping[str, Any]) -> QuantizationConfig:
    match method:
        case "fp8" | "fbgemm-fp8" | "mxfp8":
            block = _block(found.get("weight_block_size")) or (_MX_BLOCK if method == "mxfp8" else None)
            return QuantizationConfig(method, method, block=block)
        case "mxfp4":
            return QuantizationConfig(method, method)
        case "compressed-tensors":
            return _compressed_tensors(found)
        case "modelopt":
            return _modelopt(found)
        case "gptq" | "awq" | "auto-round":
            return _packed_words(method, found)
        case "bitsandbytes":
            if found.get("load_in_8bit") or found.get("_load_in_8bit"):
                return _refused(method, "bitsandbytes 8-bit")
            return QuantizationConfig(method, f"{method} 4-bit")
        case "mlx":
            return _mlx(found)
        case _:
            return _refused(method, method)


def _compressed_tensors(found: Mapping[str, Any]) -> QuantizationConfig:
    layout = str(found.get("format"))
    description = f"{_COMPRESSED_TENSORS} {layout}"
    groups = found.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    layouts = {layout} | {str(g["format"]) for g in groups if isinstance(g, Mapping) and g.get("format")}
    unknown = sorted(layouts - _COMPRESSED_TENSORS_FORMATS)
    if unknown or not groups:
        return _refused(_COMPRESSED_TENSORS, f"{_COMPRESSED_TENSORS} {', '.join(unknown) or layout}")
    sparsity = found.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return _refused(_COMPRESSED_TENSORS, f"{description} with sparsity_config {sparsity['format']}")
    if found.get("transform_config"):
        return _refused(_COMPRESSED_TENSORS, f"{description} with transform_config: its weights are rotated")
    schemes = [_weights(group) for group in groups]
    if any(scheme.get("actorder") == "group" for scheme in schemes):
        return _refused(_COMPRESSED_TENSORS, f"{description} with actorder 'group'")
    integers = [scheme for scheme in schemes if scheme.get("type", "int") == "int"]
    bits = frozenset(_integers(scheme.get("num_bits") for scheme in integers))
    if bits - _BITS:
        return _refused(_COMPRESSED_TENSORS, f"{description} with {_either(bits - _BITS)} bits")
    sizes = frozenset(_sizes(scheme.get("group_size") for scheme in schemes if scheme.get("strategy") != "channel"))
    blocks = [_block(scheme.get("block_structure")) for scheme in schemes]
    # Groups of FP8 are blocks of one row.
    blocks += [(1, size) for size in sorted(sizes)]
    return QuantizationConfig(
        _COMPRESSED_TENSORS,
        description,
        block=next((block for block in blocks if block is not None), None),
        bits=bits,
        group_sizes=sizes,
        asymmetric=bool(integers) and all(scheme.get("symmetric") is False for scheme in integers),
    )


def _modelopt(found: Mapping[str, Any]) -> QuantizationConfig:
    # ModelOpt 0.47 writes some of its names in lower case.
    algorithm = str(found.get("quant_algo")).upper()
    layers = found.get("quantized_layers")
    algorithms = {algorithm} | (
        {str(layer.get("quant_algo")).upper() for layer in layers.values() if isinstance(layer, Mapping)}
        if isinstance(layers, Mapping)
        else set()
    )
    unknown = sorted(algorithms - _MODELOPT_ALGORITHMS)
    if unknown:
        return _refused(_MODELOPT, f"{_MODELOPT} {', '.join(unknown)}")
    block = next((_MODELOPT_BLOCKS[name] for name in sorted(algorithms) if name in _MODELOPT_BLOCKS), None)
    return QuantizationConfig(_MODELOPT, f"{_MODELOPT} {algorithm}", block=block)


def _packed_words(method: str, found: Mapping[str, Any]) -> QuantizationConfig:
    """GPTQ and AWQ, and AutoRound, which writes either."""
    layout = str(found.get("checkpoint_format") or found.get("format") or "gptq").lower()
    version = str(found.get("version", "gemm")).lower()
    if method == _AUTO_ROUND:
        packing = str(found.get("packing_format", ""))
        method = "awq" if "auto_awq" in packing else "gptq"
        # AutoRound's own layout, and the one that it calls `gptqmodel`, are GPTQ's with zero points as they are.
        layout, version = ("gptq" if "auto_gptq" in packing else "gptq_v2"), "gemm"
    if method == "gptq" and layout not in ("gptq", "gptq_v2"):
        return _refused(method, f"gptq in the layout '{layout}'")
    if method == "awq" and version != "gemm":
        return _refused(method, f"awq in the layout '{version}'")
    dynamic = found.get("dynamic")
    overrides = dynamic.values() if isinstance(dynamic, Mapping) else ()
    schemes = [found, *(override for override in overrides if isinstance(override, Mapping))]
    bits = frozenset(_integers(scheme.get("bits", scheme.get("w_bit")) for scheme in schemes))
    if method == "awq" and bits - {4}:
        return _refused(method, f"awq with {_either(bits - {4})} bits")
    sizes = [scheme.get("group_size", scheme.get("q_group_size")) for scheme in schemes]
    return QuantizationConfig(
        method,
        f"{method} {layout if method == 'gptq' else version}",
        bits=frozenset(width for width in bits if 0 < width <= _WORD_BITS),
        group_sizes=frozenset(_sizes(sizes)) | ({ONE_GROUP} if ONE_GROUP in sizes else frozenset()),
        zero_stored_less_one=method == "gptq" and layout == "gptq",
        reordered=method == "gptq" and found.get("desc_act") is True,
    )


def _mlx(found: Mapping[str, Any]) -> QuantizationConfig:
    schemes = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    modes = {str(scheme.get("mode", "affine")) for scheme in schemes}
    if modes != {"affine"}:
        return _refused(_MLX, f"mlx in the mode {', '.join(sorted(modes - {'affine'}))}")
    bits = frozenset(_integers(scheme.get("bits") for scheme in schemes))
    if bits - _BITS:
        return _refused(_MLX, f"mlx affine with {_either(bits - _BITS)} bits")
    return QuantizationConfig(
        _MLX,
        "mlx affine",
        bits=bits,
        group_sizes=frozenset(_sizes(scheme.get("group_size") for scheme in schemes)),
    )


def _refused(method: str, what: str) -> QuantizationConfig:
    refusal = clip(what)
    return QuantizationConfig(method, refusal[1:-1], refusal=refusal)


def _weights(group: Any) -> Mapping[str, Any]:
    """What a group says about weights; nothing where it makes no sense."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _integers(values: Iterable[Any]) -> Iterator[int]:
    """The integers among the values; JSON's true and false are integers to Python, and are none here."""
    return (value for value in values if type(value) is int)


def _sizes(values: Iterable[Any]) -> Iterator[int]:
    """The sizes among the values: from 1 to the longest axis that there is."""
    return (value for value in _integers(values) if 0 < value < 1 << 31)


def _block(value: Any) -> Block | None:
    """A block size `[rows, columns]`."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    sizes = tuple(_sizes(value))
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(values)))
