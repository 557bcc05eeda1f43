"""Bad input: the command line ends with one clear error, and writes nothing."""

import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import samples

from slicecast.convert import cli
from slicecast.convert.errors import UsageError
from slicecast.convert.source.safetensors_header import DTYPE_BITS

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1}

# Tensors of the tiny Kimi-K2.6, and the leaf that the first one goes to.
LAYER = "language_model.model.layers.1"
PROJECTION = f"{LAYER}.mlp.experts.3.gate_proj"
PROJECTION_LEAF = "params/params/decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"
OUTPUT_PROJECTION = f"{LAYER}.self_attn.o_proj"


@dataclass
class Tensor:
    """A tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def assemble(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file, `length` being what it says of its header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    header, data = parse(path)
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, each tensor behind the one before."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        assert len(tensor.data) == math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype], name
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    assemble(path, header, data)


class Source:
    """A copy of a checkpoint, to be spoiled.

    Attributes:
        path: Its directory.
    """

    def __init__(self, original: Path, path: Path):
        shutil.copytree(original, path)
        self.path = path

    @property
    def files(self) -> list[Path]:
        """Its safetensors files."""
        return sorted(self.path.glob("*.safetensors"))

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return next(path for path in self.files if name in parse(path)[0])

    def edit(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Changes the tensors of each file in place, and the index with them."""
        weight_map = {}
        for path in self.files:
            tensors = load(path)
            change(tensors)
            save(path, tensors)
            weight_map.update(dict.fromkeys(tensors, path.name))
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def edit_header(self, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes a file's header in place, and leaves its data as they are."""
        header, data = parse(path)
        change(header)
        assemble(path, header, data)

    def edit_config(self, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        """Changes `config.json` in place; `change` gets all of it, and its part for the text model."""
        path = self.path / "config.json"
        config = json.loads(path.read_text())
        change(config, config.get("text_config", config))
        path.write_text(json.dumps(config))


def drop(*names: str) -> Callable[[Source], None]:
    """Spoils a checkpoint: without these tensors."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors.pop(name, None)

    return lambda source: source.edit(change)


def add(name: str, tensor: Tensor, beside: str) -> Callable[[Source], None]:
    """Spoils a checkpoint: with one more tensor, in the file of another one."""

    def change(tensors: dict[str, Tensor]) -> None:
        if beside in tensors:
            tensors[name] = tensor

    return lambda source: source.edit(change)


def bf16(*shape: int) -> Tensor:
    """A tensor of ones."""
    return Tensor("BF16", shape, np.ones(shape, ml_dtypes.bfloat16).tobytes())


def configure(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Source], None]:
    """Spoils a checkpoint: with another `config.json`."""
    return lambda source: source.edit_config(change)


def text_field(**fields: Any) -> Callable[[Source], None]:
    """Spoils a checkpoint: with other fields of the text model's config; None removes one."""

    def change(_: dict[str, Any], text: dict[str, Any]) -> None:
        text.update(fields)
        for name, value in fields.items():
            if value is None:
                del text[name]

    return configure(change)


def scheme(**fields: Any) -> Callable[[Source], None]:
    """Spoils a checkpoint: announces another quantization of the weights."""
    return configure(lambda _, text: text["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields))


def remove_a_file(source: Source) -> None:
    source.files[1].unlink()


def cut(keep: Callable[[int], int]) -> Callable[[Source], None]:
    """Spoils a checkpoint: the second file has another length."""

    def spoil(source: Source) -> None:
        content = source.files[1].read_bytes()
        source.files[1].write_bytes(content[: keep(len(content))])

    return spoil


def overlap(source: Source) -> None:
    def change(header: dict[str, Any]) -> None:
        moved = header[f"{PROJECTION}.weight_packed"]
        moved["data_offsets"] = [offset - 64 for offset in moved["data_offsets"]]

    source.edit_header(source.file_of(f"{PROJECTION}.weight_packed"), change)


def beyond_the_end(source: Source) -> None:
    def change(header: dict[str, Any]) -> None:
        moved = header[f"{PROJECTION}.weight_packed"]
        moved["data_offsets"] = [offset + 10**9 for offset in moved["data_offsets"]]

    source.edit_header(source.file_of(f"{PROJECTION}.weight_packed"), change)


def larger_than_the_file(source: Source) -> None:
    def change(header: dict[str, Any]) -> None:
        last = max(
            (entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1]
        )
        last["shape"][0] *= 2
        begin, end = last["data_offsets"]
        last["data_offsets"] = [begin, 2 * end - begin]

    source.edit_header(source.files[1], change)


def disagreeing_offsets(source: Source) -> None:
    source.edit_header(
        source.file_of(f"{PROJECTION}.weight_packed"),
        lambda header: header[f"{PROJECTION}.weight_packed"]["shape"].append(2),
    )


def header_of(text: bytes, length: int | None = None) -> Callable[[Source], None]:
    """Spoils a checkpoint: the second file's header is this text, and says to be `length` bytes long."""
    return lambda source: assemble(source.files[1], text, parse(source.files[1])[1], length)


def repeat_in_a_header(source: Source) -> None:
    header, data = parse(source.files[1])
    name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
    text = json.dumps(header).encode()
    assemble(source.files[1], b"{" + json.dumps({name: entry}).encode()[1:-1] + b"," + text[1:], data)


def repeat_in_two_files(source: Source) -> None:
    tensors = load(source.files[1])
    name = next(iter(tensors))
    save(source.files[0], {**load(source.files[0]), name: tensors[name]})


def fp8(source: Source) -> None:
    """As DeepSeek-V3 is published, but with scales for other blocks than those announced."""

    def quantization(config: dict[str, Any], text: dict[str, Any]) -> None:
        text.pop("quantization_config")
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            rows, words = tensors.pop(name).shape
            base = name.removesuffix(".weight_packed")
            tensors[f"{base}.weight"] = Tensor("F8_E4M3", (rows, 8 * words), bytes(rows * 8 * words))
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[f"{name}_inv"] = Tensor("F32", (3, 3), bytes(36))
        for name in [name for name in tensors if name.endswith((".weight_scale", ".weight_shape"))]:
            del tensors[name]

    source.edit_config(quantization)
    source.edit(change)


def scale_of(dtype: str, groups: int) -> Callable[[Source], None]:
    """Spoils a checkpoint: one scale is stored otherwise."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{PROJECTION}.weight_scale"
        if name in tensors:
            rows = tensors[name].shape[0]
            tensors[name] = Tensor(dtype, (rows, groups), bytes(rows * groups * ITEM_BYTES[dtype]))

    return lambda source: source.edit(change)


@dataclass(frozen=True)
class Case:
    """A way to spoil a checkpoint.

    Attributes:
        name: What is wrong.
        spoil: Does it.
        kind: The error that is expected.
        words: What the message must say: file, tensor, remedy.
        errors: How many errors are expected; None for any number.
    """

    name: str
    spoil: Callable[[Source], None]
    kind: str
    words: tuple[str, ...]
    errors: int | None = 1


SECOND = "model-00002-of-000003.safetensors"
CASES = [
    Case("missing file", remove_a_file, "MissingFileError", (SECOND, INDEX, "Download it")),
    Case(
        "last byte missing", cut(lambda n: n - 1), "TruncatedFileError", (SECOND, "1 bytes too short", "Download"), None
    ),
    Case("cut in the data", cut(lambda n: n // 2), "TruncatedFileError", (SECOND, "too short", "Download"), None),
    Case("cut in the header", cut(lambda n: 100), "TruncatedFileError", (SECOND, "100 bytes", "Download"), None),
    Case("empty file", cut(lambda n: 0), "TruncatedFileError", (SECOND, "0 bytes", "Download"), None),
    Case("overlap", overlap, "OffsetError", (f"{PROJECTION}.weight_packed", "overlap", "Download"), None),
    Case("beyond the end", beyond_the_end, "OffsetError", (".safetensors: tensor", "a hole", "Download"), None),
    Case("larger than the file", larger_than_the_file, "TruncatedFileError", (SECOND, "too short", "Download"), None),
    Case("offsets and shape", disagreeing_offsets, "OffsetError", (f"{PROJECTION}.weight_packed", "Download"), None),
    Case("header of noise", header_of(b"\x93NUMPY\x00\xff" * 9), "HeaderError", (SECOND, "JSON", "Download"), None),
    Case("header cut short", header_of(b'{"a": {"dtype"'), "HeaderError", (SECOND, "JSON", "Download"), None),
    Case("header of 2**63", header_of(b"{}", 2**63), "HeaderError", (SECOND, str(2**63), "Download"), None),
    Case("header over 100 MB", header_of(b"{}", 10**8 + 1), "HeaderError", (SECOND, str(10**8 + 1), "Download"), None),
    Case("name twice in a file", repeat_in_a_header, "DuplicateTensorError", (SECOND, "more than once"), None),
    Case(
        "name in two files",
        repeat_in_two_files,
        "DuplicateTensorError",
        (SECOND, "model-00001-of-000003.safetensors", "in both", "Remove"),
        None,
    ),
    Case(
        "wrong shape",
        text_field(moe_intermediate_size=96),
        "ShapeError",
        (SECOND, "weight_packed", "[96, 32]", "config.json that was published"),
        None,
    ),
    Case(
        "missing scale",
        drop(f"{PROJECTION}.weight_scale"),
        "MissingPartnerError",
        ("safetensors", f"{PROJECTION}.weight_scale", "Download"),
    ),
    Case(
        "missing weight of a scale",
        drop(f"{PROJECTION}.weight_packed"),
        "MissingPartnerError",
        ("safetensors", f"{PROJECTION}.weight_packed", "Download"),
    ),
    Case(
        "unused scale",
        add(f"{OUTPUT_PROJECTION}.weight_scale", bf16(256, 4), beside=f"{OUTPUT_PROJECTION}.weight"),
        "UnusedTensorError",
        ("safetensors", f"{OUTPUT_PROJECTION}.weight_scale", "no weight uses"),
    ),
    Case(
        "scale of an expert too many",
        add(f"{LAYER}.mlp.experts.8.gate_proj.weight_scale", bf16(128, 8), beside=f"{PROJECTION}.weight_scale"),
        "UnusedTensorError",
        ("safetensors", "experts.8.gate_proj.weight_scale"),
    ),
    Case(
        "layer too many",
        text_field(num_hidden_layers=2),
        "UnusedTensorError",
        ("safetensors", "layers.2.", "config.json does not belong"),
        None,
    ),
    Case(
        "missing tensor",
        drop(f"{OUTPUT_PROJECTION}.weight"),
        "MissingTensorError",
        (f"{OUTPUT_PROJECTION}.weight", "no file", "Download"),
    ),
    Case(
        "stored twice",
        add(f"{PROJECTION}.weight", bf16(128, 256), beside=f"{PROJECTION}.weight_packed"),
        "DuplicateTensorError",
        ("safetensors", f"{PROJECTION}.weight", "Remove"),
        None,
    ),
    Case("FP8 in other blocks", fp8, "ShapeError", ("safetensors", "_proj.weight_scale_inv", "128 x 128"), None),
    Case("8 bits in words of 4", scheme(num_bits=8), "ShapeError", ("safetensors", "weight_packed", "8 bits"), None),
    Case("asymmetric", scheme(symmetric=False), "MissingPartnerError", ("weight_packed", "weight_zero_point"), None),
    Case("reordered", scheme(actorder="group"), "UnsupportedFormatError", ("weight_packed", "actorder 'group'"), None),
    Case(
        "other format",
        configure(lambda _, text: text["quantization_config"].update(format="marlin-24")),
        "UnsupportedFormatError",
        ("weight_packed", "marlin-24"),
        None,
    ),
    Case(
        "quantized without notice",
        configure(lambda _, text: text.pop("quantization_config")),
        "UnsupportedFormatError",
        ("weight_packed", "quantization_config", "published"),
        None,
    ),
    Case(
        "zero points of another weight",
        add(
            f"{PROJECTION}.weight_zero_point",
            Tensor("I32", (8, 8), bytes(256)),
            beside=f"{PROJECTION}.weight_packed",
        ),
        "ShapeError",
        (f"{PROJECTION}.weight_zero_point", "I32[16, 8]"),
    ),
    Case("other group size", scheme(group_size=64), "ShapeError", ("weight_scale", "group size of 32", "64"), None),
    Case("uneven groups", scale_of("BF16", 7), "ShapeError", (f"{PROJECTION}.weight_scale", "divisor of 256")),
    Case("scale of bytes", scale_of("I8", 8), "ShapeError", (f"{PROJECTION}.weight_scale", "I8", "BF16")),
    Case(
        "unknown architecture",
        configure(lambda config, _: config.update(architectures=["GPT2LMHeadModel"])),
        "UnsupportedArchitectureError",
        ("config.json", "GPT2LMHeadModel", "DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration", "LlamaFor"),
    ),
    Case(
        "architecture that is no list",
        configure(lambda config, _: config.update(architectures=7)),
        "",
        ("config.json", "architecture"),
    ),
    Case("missing field", text_field(kv_lora_rank=None), "ConfigError", ("config.json", "kv_lora_rank", "published")),
    Case("field of text", text_field(hidden_size="256"), "ConfigError", ("config.json", "hidden_size", "published")),
    Case("no experts", text_field(n_routed_experts=0), "ConfigError", ("config.json", "n_routed_experts", "published")),
    Case(
        "missing config",
        lambda source: (source.path / "config.json").unlink(),
        "MissingFileError",
        ("config.json", "Download"),
    ),
]


def digest(directory: Path) -> dict[str, str]:
    """A hash of each file of a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_refused(done: subprocess.CompletedProcess[str], kind: str, *words: str, code: int = 1) -> list[str]:
    """Checks that a command ended with one clear error, of this kind and with these words; returns its lines."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    lines = done.stderr.splitlines()
    assert lines[0].startswith("slicecast: "), done.stderr
    assert all(line.startswith("  ") for line in lines[1:]), done.stderr
    message = "\n".join(lines)
    assert kind in message
    for word in words:
        assert word in message
    return lines


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_checkpoint(slicecast: Any, kimi: Path, tmp_path: Path, case: Case) -> None:
    source = Source(kimi, tmp_path / "source")
    case.spoil(source)
    output = tmp_path / "output"
    done = slicecast.run("convert", f"--hf_model_path={source.path}", f"--base_output_directory={output}", check=False)
    lines = assert_refused(done, case.kind, *case.words)
    assert case.errors is None or len(lines) == case.errors
    # Hundreds of tensors may be wrong for one reason; nobody reads hundreds of lines.
    assert len(lines) <= 25
    assert not output.exists()


# For each format, a partner that is missing, surplus or misshapen; what the message must say; and the kind of error.
MODULE = "model.layers.1.mlp.up_proj"
BAD_PARTNERS: list[tuple[str, str, tuple[str, tuple[int, ...]] | None, str, str]] = [
    ("bf16", "weight_scale", ("F32", (24, 1)), "UnusedTensorError", "no weight uses"),
    ("bf16", "weight_scale_inv", ("F32", (1, 1)), "UnusedTensorError", "no weight uses"),
    ("fp8 blocks", "weight_scale_inv", None, "MissingPartnerError", "weight_scale_inv"),
    ("fp8 blocks", "weight_scale_inv", ("F32", (4, 2)), "ShapeError", "blocks of 16 x 16"),
    ("fp8 a row", "weight_scale", ("BF16", (1, 24)), "ShapeError", "[24, 1]"),
    ("fp8 a tensor", "weight_scale", ("F32", (0,)), "ShapeError", "F32[0]"),
    ("mxfp8", "weight_zero_point", ("I8", (24, 1)), "UnusedTensorError", "read by no rule"),
    ("int8 asymmetric", "weight_zero_point", None, "MissingPartnerError", "asymmetric"),
    ("int4 asymmetric", "weight_zero_point", None, "MissingPartnerError", "asymmetric"),
    ("int6 asymmetric", "weight_scale", ("BF16", (24, 3)), "ShapeError", "divisor of 64"),
    ("mxfp4 packed", "weight_scale", ("U8", (24, 4)), "ShapeError", "groups of 32"),
    ("mxfp4 i8", "scale", None, "MissingPartnerError", "weight_scale"),
    ("nvfp4", "weight_global_scale", None, "MissingPartnerError", "second one for the whole tensor"),
    ("nvfp4", "weight_scale_2", ("F32", ()), "UnusedTensorError", "no weight uses"),
    ("nvfp4 modelopt", "pre_quant_scale", ("BF16", (64,)), "UnsupportedFormatError", "AWQ"),
    ("gptq v1", "qzeros", None, "MissingPartnerError", "qzeros"),
    ("gptq desc_act", "g_idx", None, "MissingPartnerError", "desc_act"),
    ("gptq desc_act", "g_idx", ("I64", (64,)), "ShapeError", "I32[64]"),
    ("awq", "scales", ("F16", (24, 2)), "ShapeError", "groups"),
    ("bnb nf4", "weight.absmax", ("F32", (25,)), "ShapeError", "a factor for each block"),
    ("bnb nested", "weight.nested_quant_map", None, "MissingPartnerError", "nested_quant_map"),
    ("mlx", "biases", None, "MissingPartnerError", "biases"),
]


@pytest.mark.parametrize(("name", "partner", "stored", "kind", "word"), BAD_PARTNERS)
def test_bad_partner(
    slicecast: Any,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    name: str,
    partner: str,
    stored: tuple[str, tuple[int, ...]] | None,
    kind: str,
    word: str,
) -> None:
    """A checkpoint in any format of which one weight has a bad partner: one error, before anything is written."""

    def spoil(tensors: dict[str, Any]) -> None:
        if stored is None:
            del tensors[f"{MODULE}.{partner}"]
        else:
            dtype, shape = stored
            tensors[f"{MODULE}.{partner}"] = dtype, np.zeros(shape, f"V{DTYPE_BITS[dtype] // 8}")

    llama = make_checkpoint(**samples.LLAMA)
    source, output = samples.in_a_llama(llama, name, tmp_path / "source", spoil=spoil), tmp_path / "output"
    done = slicecast.run("convert", f"--hf_model_path={source}", f"--base_output_directory={output}", check=False)
    (_,) = assert_refused(done, kind, "model.safetensors: tensor", f"'{MODULE}.", word)
    assert not output.exists()


def test_helpers_alone_spoil_nothing(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """What the cases above are refused for is what they say, not how they are written."""
    source = Source(kimi, tmp_path / "source")
    source.edit(lambda tensors: None)
    source.edit_config(lambda config, text: None)
    for path in source.files:
        source.edit_header(path, lambda header: None)
    slicecast.run("plan", f"--hf_model_path={source.path}")


def test_all_errors_come_together(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    source = Source(kimi, tmp_path / "source")
    drop(f"{PROJECTION}.weight_scale", f"{OUTPUT_PROJECTION}.weight")(source)
    add(f"{LAYER}.mlp.extra.weight", bf16(2), beside=f"{PROJECTION}.weight_packed")(source)
    done = slicecast.run("plan", f"--hf_model_path={source.path}", check=False)
    kinds = ("MissingPartnerError", "MissingTensorError", "UnusedTensorError")
    assert len(assert_refused(done, "", *kinds)) == len(kinds)


def test_no_checkpoint(slicecast: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = slicecast.run("convert", "--hf_model_path=/nowhere", f"--base_output_directory={output}", check=False)
    assert_refused(done, "MissingFileError", "/nowhere", "Give the directory")
    assert not output.exists()


def test_budget_below_one_tile(slicecast: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The error names a budget that is enough, and hardly more than that."""
    source = make_checkpoint(family="llama", hidden=1024, intermediate=16384, layers=1, files=1)
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}"]
    done = slicecast.run("convert", *arguments, "--host_memory_gb=0.05", check=False)
    assert_refused(done, "BudgetError", "params/params/", "the budget is 0.05 GB")
    assert not output.exists()
    enough = re.search(r"--host_memory_gb=([\d.]+) or more", done.stderr)
    assert enough is not None
    slightly_less = float(enough[1]) - 0.1
    assert_refused(slicecast.run("plan", *arguments, f"--host_memory_gb={slightly_less}", check=False), "BudgetError")
    slicecast.run("convert", *arguments, f"--host_memory_gb={enough[1]}")


def test_chip_budget_below_one_box(slicecast: Any, make_checkpoint: Callable[..., Path]) -> None:
    source = make_checkpoint(family="llama", hidden=1024, intermediate=16384, layers=1, files=1)
    arguments = ["plan", f"--hf_model_path={source}", "--slice=v5e-16"]
    done = slicecast.run(*arguments, "--device_memory_gb=0.001", check=False)
    assert_refused(done, "BudgetError", "params/params/", "chip")
    enough = re.search(r"--device_memory_gb=\s*([\d.]+) or more", done.stderr)
    assert enough is not None
    slicecast.run(*arguments, f"--device_memory_gb={enough[1]}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save_dtyp=float32"], "--save_dtype"),
        (["save_dtyp=float32"], "--save_dtype"),
        (["--scan_layer=true"], "--scan_layers"),
        (["--host_memory_GB=4"], "--host_memory_gb"),
        (["--quantization=int8"], "see slicecast convert --help"),
        (["--save_dtype=float16"], "float16"),
        (["--scan_layers=maybe"], "maybe"),
        (["--param_scan_axis=2"], "2"),
        (["--host_memory_gb=0"], "above zero"),
        (["--host_memory_gb=-1"], "above zero"),
        (["--host_memory_gb=nan"], "above zero"),
        (["--host_memory_gb=much"], "above zero"),
        (["--num_processes=two"], "two"),
        (["stray"], "stray"),
    ],
)
def test_flag_that_is_not_understood(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        cli.parse(["convert", "--hf_model_path=in", "--base_output_directory=out", *words])


def test_unknown_flag(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"base_output_directory={output}", "--save_dtyp=float32"]
    done = slicecast.run("convert", *arguments, check=False)
    assert_refused(done, "UsageError", "'--save_dtyp=float32'", "did you mean --save_dtype?", code=2)
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "--coordinator_address=127.0.0.1:1", "--num_processes=2"],
        ["convert", "--coordinator_address=127.0.0.1:1", "--num_processes=0", "--process_id=0"],
        ["convert", "--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
        ["convert", "--simulated_cpu_devices_count=0"],
        ["plan", "--hosts=-1"],
        ["plan", "--slice=v5e-15"],
        ["plan", "--slice=v99-16"],
    ],
    ids=" ".join,
)
def test_numbers_that_make_no_sense(slicecast: Any, kimi: Path, tmp_path: Path, arguments: list[str]) -> None:
    output = tmp_path / "output"
    model = [f"--hf_model_path={kimi}", f"--base_output_directory={output}"]
    assert_refused(slicecast.run(*arguments, *model, check=False), "UsageError", "--", code=2)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("kimi-k2-1t", ("kimi-k2-1t", "--override_model_config")), ("kimi-k3", ("kimi-k3", "kimi-k2-1t", "llama3.1-8b"))],
    ids=["of-other-sizes", "unknown"],
)
def test_model_name_that_does_not_fit(
    slicecast: Any, kimi: Path, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", f"--model_name={name}"]
    assert_refused(slicecast.run("convert", *arguments, check=False), "TargetError", *words)
    assert not output.exists()
    slicecast.run("plan", *arguments, "--override_model_config")


def test_output_that_is_no_directory(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_text("mine")
    for path in (output, output / "below"):
        arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={path}"]
        done = slicecast.run("convert", *arguments, check=False)
        assert_refused(done, "OutputError", str(path))
    assert output.read_text() == "mine"


def test_output_in_storage_that_is_not_supported(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """A URL must not become a directory of that name on this machine."""
    (tmp_path / "here").mkdir()
    prelude = f"import os; os.chdir({str(tmp_path / 'here')!r})"
    arguments = [f"--hf_model_path={kimi}", "--base_output_directory=s3://bucket/model"]
    done = slicecast.run("convert", *arguments, prelude=prelude, check=False)
    assert not list((tmp_path / "here").iterdir())
    assert_refused(done, "UsageError", "s3://bucket/model", "gs://", code=2)


@pytest.fixture(scope="module")
def finished(module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with a finished checkpoint of `kimi`. Not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", "--host_memory_gb=0.01"]
    module_slicecast.run("convert", *arguments)
    return output


def test_another_finished_checkpoint_in_the_output(slicecast: Any, kimi: Path, finished: Path) -> None:
    before = digest(finished)
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={finished}", "--save_dtype=float32"]
    done = slicecast.run("convert", *arguments, check=False)
    assert_refused(done, "OutputError", str(finished / "0"), "Give another --base_output_directory")
    assert digest(finished) == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_the_same_finished_checkpoint_in_the_output(
    slicecast: Any, kimi: Path, finished: Path, flags: tuple[str, ...]
) -> None:
    """A scheduler may start a run again that is done."""
    before = digest(finished)
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={finished}", *flags]
    done = slicecast.run("convert", *arguments)
    assert "the checkpoint was finished before" in done.stderr
    assert done.stdout == f"load_parameters_path={finished}/0/items\n"
    assert digest(finished) == before


def test_verify_accepts_what_is_right(slicecast: Any, kimi: Path, finished: Path) -> None:
    before = digest(finished / "0")
    done = slicecast.run("verify", finished, f"--hf_model_path={kimi}")
    assert "all equal to the source, bit for bit" in done.stdout
    assert digest(finished / "0") == before


@pytest.mark.parametrize("state", ["nothing", "unfinished"])
def test_verify_without_a_checkpoint(slicecast: Any, kimi: Path, finished: Path, tmp_path: Path, state: str) -> None:
    output = tmp_path / "output"
    if state == "unfinished":
        shutil.copytree(finished / "0", output / "0.orbax-checkpoint-tmp")
    words = ["found nothing"] if state == "nothing" else ["unfinished", "run convert again"]
    done = slicecast.run("verify", output, f"--hf_model_path={kimi}", check=False)
    assert_refused(done, "OutputError", str(output / "0"), *words)


def test_verify_finds_a_changed_value(slicecast: Any, kimi: Path, finished: Path, tmp_path: Path) -> None:
    """The leaf is named, and the position of the first value in it."""
    source = Source(kimi, tmp_path / "source")
    row, column = 77, 130
    name = f"{PROJECTION}.weight_packed"
    path = source.file_of(name)
    tensors = load(path)
    data = bytearray(tensors[name].data)
    data[row * 128 + column // 2] ^= 0x01  # A byte holds two values, the first in its lower half.
    tensors[name].data = bytes(data)
    save(path, tensors)
    done = slicecast.run("verify", finished, f"--hf_model_path={source.path}", check=False)
    # Expert 3 of layer 1, which is the first that has experts; the leaf is [experts, layers, in, out].
    words = [PROJECTION_LEAF, "1 values differ", f"the first is at [3, 0, {column}, {row}]", "1 of 32 leaves"]
    assert len(assert_refused(done, "VerificationError", *words)) == 2


def test_verify_against_another_model(slicecast: Any, llama: Path, finished: Path) -> None:
    done = slicecast.run("verify", finished, f"--hf_model_path={llama}", check=False)
    assert_refused(done, "VerificationError", PROJECTION_LEAF, "is not expected", "is missing")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for part in range(7):  # Between the chunks lie nodes of the database, some of which nobody needs any more.
        content[part * len(content) // 7] ^= 0x10
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "truncated": halve, "removed": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["values", "tree", "database", "metadata"])
def test_verify_finds_damage(
    slicecast: Any, kimi: Path, finished: Path, tmp_path: Path, part: str, damage: str
) -> None:
    """Wherever a checkpoint is damaged, verify says so; where values are, it names the leaf."""
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    items = output / "0" / "items"
    values = max((path for path in items.glob("ocdbt.process_*/d/*")), key=lambda path: path.stat().st_size)
    paths = {
        "values": values,
        "tree": next((items / "d").iterdir()),
        "database": items / "manifest.ocdbt",
        "metadata": items / "_METADATA",
    }
    DAMAGES[damage](paths[part])
    done = slicecast.run("verify", output, f"--hf_model_path={kimi}", check=False)
    assert_refused(done, "Error", str(output))
    if part == "values":
        assert_refused(done, "VerificationError", "params/params/", "cannot be read")
