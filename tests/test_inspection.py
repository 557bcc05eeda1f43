"""`slicecast inspect`: what it says of checkpoints, damaged and hostile ones too, from headers and metadata only."""

import contextlib
import functools
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import stored
import tensorstore as ts
import tiny_models
from absl import logging
from bucket_server import BucketServer
from headers import info, infos
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import COLUMNS, LLAMA, OUT, SAMPLES, in_a_llama

from slicecast.convert import cli, commands
from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.errors import SlicecastError
from slicecast.convert.inspection import text
from slicecast.convert.inspection.weights import find_weights
from slicecast.convert.memory import GB, Machine
from slicecast.convert.settings import Settings
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.safetensors_header import DTYPE_BITS
from slicecast.convert.source.storage import ByteRange

BF16 = stored.BF16

# What a metadata file, or a header, of the checkpoints here has at most.
METADATA_BYTES = 100_000


@dataclass(frozen=True)
class Shown:
    """What a command has done.

    Attributes:
        exit_code: Its exit code.
        out: Its standard output.
        error: Its standard error.
    """

    exit_code: int
    out: str
    error: str

    @property
    def json(self) -> dict[str, Any]:
        """The standard output, parsed."""
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Takes back what the command line does to absl's logging."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def inspect(*words: object) -> Shown:
    """Runs `slicecast inspect` in this process."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            exit_code = cli.main(cli.parse(["inspect", *map(str, words)]))
        except SlicecastError as raised:
            exit_code = raised.exit_code
    return Shown(exit_code, out.getvalue(), error.getvalue())


# ---- Names


NAMES = st.lists(
    st.builds(
        lambda parts, end: "".join(f"{part}{joint}" for part, joint in parts) + end,
        st.lists(
            st.tuples(st.sampled_from(["layers", "0", "1", "2", "3", "7", "12", "01", "x4"]), st.sampled_from("._/")),
            max_size=4,
        ),
        st.sampled_from(["weight", "scale", "3"]),
    ),
    min_size=1,
    max_size=60,
    unique=True,
)


def unfolded(name: str) -> set[str]:
    """The names that a folded one stands for."""
    parts = re.split(r"\{([\d,-]+)\}", name)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
            continue
        runs = [list(map(int, run.split("-"))) for run in part.split(",")]
        choices.append([str(number) for run in runs for number in range(run[0], run[-1] + 1)])
    return {"".join(choice) for choice in itertools.product(*choices)}


@given(names=NAMES)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_folding_loses_nothing_and_invents_nothing(names: list[str]) -> None:
    """Each name is in one line, which stands for its members and no others, all of which mean the same."""
    meanings = {name: len(name) % 2 for name in names}
    lines = text.fold(meanings)
    assert sorted(member for line in lines for member in line.members) == sorted(names)
    for line in lines:
        assert unfolded(line.name) == set(line.members)
        assert len({meanings[member] for member in line.members}) == 1


def test_alike_names_become_one() -> None:
    experts = {f"model.layers.{layer}.mlp.experts.{expert}.w": "" for layer in range(1, 61) for expert in range(384)}
    others = {"model.layers.0.mlp.experts.0.w": "", "model.layers.0.mlp.experts.5.w": "", "model.layers.61.w": "x"}
    assert [line.name for line in text.fold(experts | others)] == [
        "model.layers.0.mlp.experts.{0,5}.w",
        "model.layers.{1-60}.mlp.experts.{0-383}.w",
        "model.layers.61.w",
    ]


# ---- Formats, without a family


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_is_found_from_headers_alone(name: str, backwards: bool) -> None:
    """As a family that knows name and shape finds it; bitsandbytes has the shape in a tensor's data."""
    sample = SAMPLES[name]
    tensors, announced = infos(sample), quantization_config.read(sample.config)
    if backwards:  # Partners come first, some of which look like weights.
        tensors = dict(reversed(tensors.items()))
    weights, failures = find_weights(tensors, announced)
    assert not failures
    (weight,) = weights
    known = detect.find(sample.name, sample.shape, tensors, announced)
    assert weight.name == sample.name
    assert weight.tensors == known.names
    assert set(weight.tensors) == set(tensors)
    assert weight.format == known.codec.description
    assert weight.parameters == math.prod(sample.shape)
    assert weight.shape == (sample.shape if not name.startswith("bnb") else (weight.parameters, 1))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weight_without_a_partner_is_odd(name: str) -> None:
    """Whatever tensor is missing, what is left of it is no quantized weight, unless it has a value without."""
    sample = SAMPLES[name]
    tensors, announced = infos(sample), quantization_config.read(sample.config)
    known = detect.find(sample.name, sample.shape, tensors, announced)
    for partner in known.names[1:]:
        rest = {key: tensor for key, tensor in tensors.items() if key != partner}
        try:
            detect.find(sample.name, sample.shape, rest, announced)
        except SlicecastError:
            weights, failures = find_weights(rest, announced)
            assert failures, partner
            assert not any(weight.quantized for weight in weights), partner


@given(
    name=st.sampled_from(sorted(SAMPLES)),
    config=st.sampled_from(sorted(SAMPLES)),
    widths=st.sampled_from([{}, {"bits": 0}, {"bits": -1}, {"bits": 64}, {"bits": 3, "group_size": 0}]),
    changes=st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.sampled_from([0, 1, 2, 32]), max_size=4)
        ),
        max_size=2,
    ),
)
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_nothing_that_headers_say_ends_an_inspection(
    name: str, config: str, widths: dict[str, int], changes: list[tuple[int, str, list[int]]]
) -> None:
    """Each tensor belongs to one weight, or to none, whatever dtypes and shapes it and its partners have."""
    announced = dict(SAMPLES[config].config)
    for key, found in announced.items():
        announced[key] = {**found, **widths} if isinstance(found, dict) else found
    tensors = infos(SAMPLES[name])
    for number, dtype, shape in changes:
        key = sorted(tensors)[number % len(tensors)]
        tensors[key] = info(key, dtype, *shape)
    weights, failures = find_weights(tensors, quantization_config.read(announced))
    stored_names = [tensor for weight in weights for tensor in weight.tensors]
    assert set(stored_names) <= set(tensors)
    assert len(stored_names) == len(set(stored_names))
    assert all(isinstance(failure, SlicecastError) for failure in failures)


# ---- Sources


LAYER = "model.layers.{}.mlp"

TINY_CONFIG = {"architectures": ["StrangeForCausalLM"], "quantization_config": {"quant_method": "fp8"}}


def tiny(**changes: tuple[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors of a model that no family covers: two layers, two experts, FP8 with a scale a tensor."""
    tensors: dict[str, tuple[str, np.ndarray]] = {"embed.weight": ("BF16", np.zeros((8, 4), BF16))}
    for layer, expert in itertools.product(range(2), range(2)):
        name = f"{LAYER.format(layer)}.experts.{expert}.up_proj.weight"
        tensors[name] = ("F8_E4M3", np.zeros((6, 4), np.uint8))
        tensors[f"{name}_scale"] = ("F32", np.ones((), np.float32))
        tensors[f"{name.removesuffix('weight')}input_scale"] = ("F32", np.ones((), np.float32))
    return tensors | changes


GOLDEN_SOURCE = """\
source       {path}
model        not one that slicecast knows
converts     no, see below
quantization fp8
stored       13 tensors in 1 file, 192 bytes
parameters   128
dtypes       F8_E4M3: 4 tensors, 96 bytes
             BF16: 1 tensor, 64 bytes
             F32: 8 tensors, 32 bytes
formats      float8_e4m3, one scale: 4 weights, 112 bytes
             bfloat16: 1 weight, 64 bytes
tensors
  embed.weight                                               BF16 [8, 4]     64 bytes
  model.layers.{{0-1}}.mlp.experts.{{0-1}}.up_proj.input_scale   F32 []          4 x 4 bytes   {runtime}
  model.layers.{{0-1}}.mlp.experts.{{0-1}}.up_proj.weight        F8_E4M3 [6, 4]  4 x 24 bytes  {weight}
  model.layers.{{0-1}}.mlp.experts.{{0-1}}.up_proj.weight_scale  F32 []          4 x 4 bytes   of weight
odd          1 thing
  UnsupportedArchitectureError: config.json: architecture StrangeForCausalLM is not supported. Supported: {supported}
"""


def test_what_people_read_of_a_source(tmp_path: Path) -> None:
    path = stored.write(tmp_path / "source", tiny(), TINY_CONFIG)
    shown = inspect(path)
    supported = shown.out.partition("Supported: ")[2].rstrip("\n")
    assert "LlamaForCausalLM" in supported
    assert shown == Shown(
        0,
        GOLDEN_SOURCE.format(
            path=path,
            runtime=detect.RUNTIME_ONLY_REASON,
            weight="float8_e4m3, one scale: [6, 4] with weight_scale",
            supported=supported,
        ),
        "",
    )


def test_all_has_a_line_for_each_tensor_with_its_file(kimi: Path) -> None:
    tensors = inspect(kimi, "--json").json["tensors"]
    lines = inspect(kimi, "--all").out.splitlines()
    rows = {line.split()[0]: line for line in lines if ".safetensors" in line}
    assert len(rows) == len(tensors)
    for tensor in tensors:
        assert f"  {tensor['dtype']} {tensor['shape']}  " in rows[tensor["name"]]
        assert tensor["file"] in rows[tensor["name"]]


def test_json_agrees_with_the_plan(kimi: Path) -> None:
    """Where a family covers a model, the formats are those that the plan finds, and what the plan leaves out beside."""
    plan = commands.make_plan(Settings(hf_model_path=str(kimi)), Machine(1, 1, 4 * GB, None))
    found = inspect(kimi, "--json").json
    assert found["model"] == plan.model.description
    assert found["leaves"] == len(plan.leaves)
    assert found["odd"] == []
    assert found["bytes"] == plan.checkpoint.total_bytes
    assert found["ignored"] == [{"why": i.why, "tensors": i.count, "bytes": i.nbytes} for i in plan.ignored]
    sources = [source for leaf in plan.leaves for source in leaf.sources.values()]
    weights = {weight["name"]: weight for weight in found["weights"]}
    for source in sources:
        assert weights[source.name]["format"] == source.codec.description
        assert weights[source.name]["shape"] == list(source.shape)
        assert weights[source.name]["tensors"] == list(source.names)
    left_out = len(weights) - len(sources)
    assert left_out == sum(ignored.count for ignored in plan.ignored)


@pytest.mark.parametrize("name", ["bnb nested", "bnb nf4"])
def test_a_family_tells_the_shape_where_headers_do_not(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path = in_a_llama(make_checkpoint(**LLAMA), name, tmp_path / "source")
    found = inspect(path, "--json").json
    assert found["odd"] == []
    quantized = [weight for weight in found["weights"] if weight["quantized"]]
    assert quantized
    assert all(weight["shape"] == [OUT, COLUMNS] for weight in quantized)


def test_only_headers_and_configs_are_read(kimi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[ByteRange] = []
    whole = Directory.read

    def counted(self: Directory, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        read.append(wanted)
        whole(self, wanted, targets)

    monkeypatch.setattr(Directory, "read", counted)
    starts: dict[str, int] = {}
    for tensor in inspect(kimi, "--json").json["tensors"]:
        starts[tensor["file"]] = min(tensor["offset"], starts.get(tensor["file"], tensor["offset"]))
    assert len(starts) == 3
    assert {wanted.file for wanted in read} == {*starts, "config.json", "model.safetensors.index.json"}
    for wanted in read:
        assert wanted.file not in starts or wanted.offset + wanted.nbytes <= starts[wanted.file]


def damage_truncate(source: Path) -> None:
    file = source / "model-00002-of-000003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def damage_remove_shard(source: Path) -> None:
    (source / "model-00002-of-000003.safetensors").unlink()


def damage_header(source: Path) -> None:
    file = source / "model-00002-of-000003.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def damage_no_config(source: Path) -> None:
    (source / "config.json").unlink()


def damage_config(source: Path) -> None:
    (source / "config.json").write_text("[1]")


DAMAGES = {
    "TruncatedFileError": damage_truncate,
    "MissingFileError": damage_remove_shard,
    "HeaderError": damage_header,
    "MissingFileError: config.json": damage_no_config,
    "ConfigError": damage_config,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_a_plan_refuses_is_shown_as_far_as_it_can_be_read(kimi: Path, tmp_path: Path, kind: str) -> None:
    source = shutil.copytree(kimi, tmp_path / "source")
    DAMAGES[kind](source)
    with pytest.raises(SlicecastError) as refused:
        commands.make_plan(Settings(hf_model_path=str(source)), Machine(1, 1, 4 * GB, None))
    shown = inspect(source)
    assert shown.exit_code == 0
    assert "converts     no, see below" in shown.out
    assert "  language_model.model.norm.weight  " in shown.out
    assert f"  {kind}" in shown.out
    found = inspect(source, "--json").json
    assert [f"[{odd['kind']}] {odd['message']}" for odd in found["odd"]] == str(refused.value).splitlines()


def test_a_missing_tensor_is_odd(tmp_path: Path) -> None:
    """A model that is known, with files that are in order, of which one tensor is missing."""
    path = tiny_models.write(tmp_path / "source", "llama")
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))
    shown = inspect(path)
    assert shown.exit_code == 0
    assert "MissingTensorError: tensor 'model.layers." in shown.out
    assert "converts     no, see below" in shown.out


@pytest.mark.parametrize("content", ["nothing", "empty directory", "other weights", "no JSON", "an empty step"])
def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "source"
    if content != "nothing":
        path.mkdir()
    if content == "other weights":
        (path / "pytorch_model.bin").write_bytes(b"abc")
    if content == "an empty step":
        (path / "0").mkdir()
    if content == "no JSON":
        (path / "config.json").write_text("{")
    shown = inspect(path)
    assert shown.exit_code == 1
    assert shown.out == ""
    assert str(path) in shown.error


HOSTILE = "model.\x1b[2J\x1b]0;owned\x07.\r\n\u202e\u200b\x9b31m.weight"


@pytest.mark.parametrize("where", ["a tensor's name", "a value", "a key"])
def test_nothing_that_a_terminal_obeys_is_shown(tmp_path: Path, where: str) -> None:
    tensors = tiny(**{HOSTILE: ("BF16", np.zeros(3, BF16))}) if where == "a tensor's name" else tiny()
    config = TINY_CONFIG | {"a value": {"architectures": [HOSTILE]}, "a key": {HOSTILE: 1}}.get(where, {})
    hostile = stored.write(tmp_path / "hostile", tensors, config)
    harmless = stored.write(tmp_path / "harmless", tiny(), TINY_CONFIG)
    shown = [inspect(hostile), inspect(hostile, "--all"), inspect("--diff", harmless, hostile)]
    for each in shown:
        assert all(character.isprintable() or character == "\n" for character in each.out + each.error)
    shown_escaped = ["owned" in each.out + each.error for each in shown]
    assert shown_escaped == [where != "a key", where != "a key", True]  # Of a config, the architecture alone is shown.
    assert inspect(hostile, "--json").out.isascii()


def test_a_repository_of_the_hub(tmp_path: Path) -> None:
    """By ranges: of the file with the weights no more than the header."""
    local = tiny_models.write(tmp_path / "hub" / "org" / "tiny" / "aaaa", "llama")
    hub = Hub(tmp_path / "hub")
    try:
        hub.faults(branches={"org/tiny@main": "aaaa"})
        done = hub.run("inspect", "org/tiny", "--json")
        other = hub.run("inspect", "org/tiny", "--revision=bbbb")
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), inspect(local, "--json").json
    assert found.pop("path") == "hf://org/tiny@aaaa"
    assert expected.pop("path") == str(local)
    assert found == expected
    assert other.returncode == 1
    assert "there is no revision 'bbbb'" in other.stderr


# ---- Checkpoints of Orbax


def tree(kernel: Any = None, **others: Any) -> dict[str, Any]:
    """A tree as MaxText's: two layers that are not stacked, and what other programs may have beside arrays."""
    kernel = jnp.ones((4, 6), jnp.bfloat16) if kernel is None else kernel
    decoder = {f"layers_{i}": {"mlp": {"wo": {"kernel": kernel}}} for i in range(2)}
    return {"params": {"params": {"decoder": decoder}}, "step": 7, **others}


def save(path: Path, content: Any, **options: Any) -> Path:
    """Saves a tree as an item without a step."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(content))
    return path


def save_as_maxtext(path: Path, content: Any, steps: Sequence[int] = (0,)) -> Path:
    """Saves a tree as MaxText's converter does: as `items` of a step."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("items", ocp.args.PyTreeSave, handler)
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(path, options=options, handler_registry=registry) as manager:
        for step in steps:
            arguments = ocp.args.Composite(items=ocp.args.PyTreeSave(content))
            manager.save(step, args=arguments, custom_metadata={"note": "a\x1b[31m"}, force=True)
    return path


GOLDEN_CHECKPOINT = """\
checkpoint   {path}
finished     yes
storage      zarr3 in an OCDBT database
stored       3 arrays, 104 bytes before compression
values       49
dtypes       bfloat16: 2 arrays, 96 bytes
             int64: 1 array, 8 bytes
codecs       sharding_indexed (bytes, zstd 3): 3 arrays, 104 bytes
digests      none
arrays
  name                                              string
  params/params/decoder/layers_{{0-1}}/mlp/wo/kernel  bfloat16 [4, 6]  chunks [4, 6]  inner [4, 6]  2 x 48 bytes
  rest                                              an empty dict
  step                                              int64 []         chunks []      inner []      8 bytes
"""


def test_what_people_read_of_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", tree(rest={}, name="x"), use_ocdbt=True, use_zarr3=True)
    assert inspect(path) == Shown(0, GOLDEN_CHECKPOINT.format(path=path), "")


@pytest.mark.parametrize(
    ("options", "storage", "inner", "codecs"),
    [
        ({"use_ocdbt": True, "use_zarr3": False}, "zarr 2 in an OCDBT database", None, "zstd 1"),
        ({"use_ocdbt": False, "use_zarr3": False}, "zarr 2, each chunk a file", None, "zstd 1"),
        (
            {"use_ocdbt": False, "use_zarr3": True},
            "zarr3, each chunk a file",
            [4, 6],
            "sharding_indexed (bytes, zstd 3)",
        ),
    ],
)
def test_every_storage_of_orbax(
    tmp_path: Path, options: dict[str, bool], storage: str, inner: list[int] | None, codecs: str
) -> None:
    found = inspect(save(tmp_path / "saved", tree(), **options), "--json").json
    assert found["finished"] is True
    assert found["odd"] == []
    assert found["storage"] == storage
    array = found["arrays"]["params/params/decoder/layers_1/mlp/wo/kernel"]
    assert array.pop("metadata")
    assert array == {
        "shape": [4, 6],
        "dtype": "bfloat16",
        "bytes": 48,
        "chunk": [4, 6],
        "inner_chunk": inner,
        "codecs": codecs,
        "digest": None,
    }


def test_as_maxtext_saves(tmp_path: Path) -> None:
    """The last step is meant; what strangers wrote into the metadata does not reach the terminal."""
    path = save_as_maxtext(tmp_path / "saved", tree(), steps=[2, 10])
    found = inspect(path, "--json").json
    assert found["path"] == str(path / "10" / "items")
    assert found["finished"] is True
    assert set(found["arrays"]) == {*(f"params/params/decoder/layers_{i}/mlp/wo/kernel" for i in range(2)), "step"}
    assert found["custom_metadata"] == {"note": "a\x1b[31m"}
    for part in ("10", "10/items"):
        assert inspect(path / part, "--json").json == found
    assert inspect(path / "2", "--json").json["path"] == str(path / "2" / "items")
    assert "\x1b" not in inspect(path).out


@pytest.fixture(scope="module", params=[(True, True), (False, False)], ids=["ocdbt zarr3", "files zarr2"])
def output(request: pytest.FixtureRequest, module_slicecast: Any, kimi: Path, tmp_path_factory: Any) -> Path:
    """The output of a conversion. Not to be changed."""
    path: Path = tmp_path_factory.mktemp("output") / "out"
    ocdbt, zarr3 = request.param
    module_slicecast.run(
        "convert",
        f"--hf_model_path={kimi}",
        f"--base_output_directory={path}",
        "--simulated_cpu_devices_count=2",
        f"--checkpoint_storage_use_ocdbt={ocdbt}",
        f"--checkpoint_storage_use_zarr3={zarr3}",
    )
    return path


def test_an_item_of_another_name(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "saved") as manager:
        manager.save(3, args=ocp.args.PyTreeSave(tree()))
    found = inspect(tmp_path / "saved", "--json").json
    assert found["path"] == str(tmp_path / "saved" / "3" / "default")
    assert len(found["arrays"]) == 3


def test_codecs_are_shown_where_they_differ(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", tree(), use_ocdbt=False, use_zarr3=False)
    metadata = path / "step" / ".zarray"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"compressor": None}))
    shown = inspect(path).out
    assert re.search(r"layers_\{0-1\}/mlp/wo/kernel +bfloat16 \[4, 6\] +chunks \[4, 6\] +zstd 1 +2 x 48 bytes\n", shown)
    assert re.search(r"step +int64 \[\] +chunks \[\] +none +8 bytes\n", shown)
    lines = inspect(path, "--all").out
    assert re.search(r"layers_1/mlp/wo/kernel +bfloat16 \[4, 6\] +chunks \[4, 6\] +zstd 1 +48 bytes\n", lines)


def test_our_own_checkpoint(output: Path, kimi: Path) -> None:
    plan = commands.make_plan(Settings(hf_model_path=str(kimi)), Machine(1, 1, 4 * GB, None))
    summary = json.loads((output / "slicecast-summary.json").read_text())
    found = inspect(output, "--json").json
    assert found["finished"] is True
    assert found["odd"] == []
    assert found["bytes"] == plan.out_bytes
    assert found["summary"] == summary
    assert found["custom_metadata"]["slicecast"]["source"] == str(kimi)
    planned = {leaf.leaf.path: leaf for leaf in plan.leaves}
    assert set(found["arrays"]) == set(planned)
    for path, array in found["arrays"].items():
        assert array["shape"] == list(planned[path].leaf.shape)
        assert array["dtype"] == planned[path].leaf.dtype
        assert array["chunk"] == list(planned[path].tiling.chunk)
        assert array["digest"] == summary["leaves"][path]["digest"]
    for part in ("0", "0/items"):
        assert inspect(output / part, "--json").json == found
    shown = inspect(output).out
    assert f'summary      source "{kimi}"' in shown
    assert "digests      of 32 arrays" in shown


def test_an_unfinished_checkpoint_says_so(output: Path, tmp_path: Path) -> None:
    """As a killed run leaves it: under another name, and its databases not merged."""
    killed = shutil.copytree(output, tmp_path / "out")
    step = killed / "0.orbax-checkpoint-tmp"
    (killed / "0").rename(step)
    (step / "items").rename(step / "items.orbax-checkpoint-tmp")
    for path in (killed, step):
        shown = inspect(path)
        assert shown.exit_code == 0
        assert "finished     no" in shown.out
    (step / "items.orbax-checkpoint-tmp" / "_METADATA").unlink()
    shown = inspect(killed)
    assert shown.exit_code == 0
    assert "finished     no" in shown.out
    assert "found no _METADATA" in shown.out


@pytest.mark.parametrize("damage", ["tree", "step", "summary", "array"])
def test_damaged_metadata_is_odd(output: Path, tmp_path: Path, damage: str) -> None:
    damaged = shutil.copytree(output, tmp_path / "out")
    items = damaged / "0" / "items"
    files = {
        "tree": items / "_METADATA",
        "step": damaged / "0" / "_CHECKPOINT_METADATA",
        "summary": damaged / "slicecast-summary.json",
        "array": next(iter([*items.glob("*/.zarray"), items / "manifest.ocdbt"])),
    }
    for content in (b"\xff\xfe", b"{", b"[]"):
        files[damage].write_bytes(content)
        shown = inspect(damaged)
        assert shown.exit_code == 0
        assert shown.out.startswith(f"checkpoint   {items}\n")
        if damage in ("tree", "array"):
            assert "cannot be opened" in shown.out
        else:
            assert "\n  params/params/" in shown.out


def test_no_chunk_is_read_from_files(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", tree(), use_ocdbt=False, use_zarr3=True)
    before = inspect(path, "--json")
    chunks = [file for file in path.glob("*/c/**/*") if file.is_file()] + list(path.glob("step/c"))
    assert len(chunks) == 3
    for file in chunks:
        file.unlink()
    assert inspect(path, "--json") == before
    assert before.exit_code == 0


def test_no_chunk_is_read_from_a_database(tmp_path: Path) -> None:
    """Values that do not compress, so that the database is as large as they are."""
    values = np.random.default_rng(0).integers(0, 255, 4 << 20, np.uint8)
    path = save(tmp_path / "saved", tree(jnp.asarray(values)), use_ocdbt=True, use_zarr3=True)
    assert sum(file.stat().st_size for file in path.rglob("d/*")) > values.nbytes

    def bytes_read() -> int:
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read", True)
        return sum(value["value"] for value in metric["values"])

    before = bytes_read()
    assert inspect(path, "--json").json["bytes"] == 2 * values.nbytes + 8
    assert 0 < bytes_read() - before < METADATA_BYTES


# ---- Differences


def compared(*words: object) -> tuple[int, list[tuple[str, str, str | None, str | None]]]:
    """The exit code and the differences of two checkpoints."""
    shown = inspect("--diff", *words, "--json")
    assert shown.json["equal"] is (shown.exit_code == 0)
    found = [(each["name"], each["what"], each["a"], each["b"]) for each in shown.json["differences"]]
    return shown.exit_code, found


WEIGHT = f"{LAYER.format(0)}.experts.0.up_proj.weight"


def test_a_source_is_equal_to_its_copy(tmp_path: Path) -> None:
    a = stored.write(tmp_path / "a", tiny(), TINY_CONFIG)
    b = stored.write(tmp_path / "b", dict(reversed(tiny().items())), TINY_CONFIG)
    assert compared(a, b) == (0, [])
    shown = inspect("--diff", a, b)
    assert shown == Shown(
        0,
        f"A            {a}\nB            {b}\ndifferences  none\n"
        "values       not compared: not both have digests of them\n",
        "",
    )


def test_every_difference_between_sources_is_named(tmp_path: Path) -> None:
    a = stored.write(tmp_path / "a", tiny(extra=("BF16", np.zeros(3, BF16))), TINY_CONFIG)
    config = TINY_CONFIG | {"vocab_size": 8, "quantization_config": {"quant_method": "fp8", "x": [1]}}
    changes = {
        "embed.weight": ("F32", np.zeros((8, 4), np.float32)),
        WEIGHT: ("F8_E5M2", np.zeros((7, 4), np.uint8)),
        f"{WEIGHT}_scale": ("F32", np.ones((7,), np.float32)),
        "new": ("F16", np.zeros((), np.float16)),
    }
    b = stored.write(tmp_path / "b", tiny(**changes), config)
    code, found = compared(a, b)
    assert code == 1
    assert sorted(found) == sorted(
        [
            ("embed.weight", "dtype", "BF16", "F32"),
            (WEIGHT, "dtype", "F8_E4M3", "F8_E5M2"),
            (WEIGHT, "shape", "[6, 4]", "[7, 4]"),
            (
                WEIGHT,
                "format",
                "float8_e4m3, one scale: [6, 4] with weight_scale",
                "float8_e5m2, a scale a row: [7, 4] with weight_scale",
            ),
            (f"{WEIGHT}_scale", "shape", "[]", "[7]"),
            ("extra", "missing in B", "BF16 [3]", None),
            ("new", "missing in A", None, "F16 []"),
            ("config.json.vocab_size", "missing in A", None, "8"),
            ("config.json.quantization_config.x", "missing in A", None, "[1]"),
        ]
    )
    backwards = inspect("--diff", b, a, "--json").json["differences"]
    assert {(each["name"], each["b"], each["a"]) for each in backwards} == {(name, x, y) for name, _, x, y in found}


def test_differences_that_are_alike_are_one_line(tmp_path: Path) -> None:
    a = stored.write(tmp_path / "a", tiny(), TINY_CONFIG)
    names = [name for name in tiny() if name.endswith("input_scale")]
    b = stored.write(tmp_path / "b", tiny(**{name: ("F16", np.ones((), np.float16)) for name in names}), TINY_CONFIG)
    folded = r"model\.layers\.\{0-1\}\.mlp\.experts\.\{0-1\}\.up_proj\.input_scale +dtype +F32 +F16\n"
    assert re.search(folded, inspect("--diff", a, b).out)
    lines = inspect("--diff", a, b, "--all").out
    assert all(re.search(f"{re.escape(name)} +dtype +F32 +F16\n", lines) for name in names)
    assert "differences  4\n" in lines


KERNEL = "params/params/decoder/layers_{}/mlp/wo/kernel"


def test_every_difference_between_checkpoints_is_named(tmp_path: Path) -> None:
    a = save_as_maxtext(tmp_path / "a", tree(rest={}, only=np.zeros(2)))
    b = save(tmp_path / "b", tree(jnp.ones((4, 3), jnp.float32), rest="text"), use_ocdbt=False, use_zarr3=False)
    code, found = compared(a, b)
    assert code == 1
    assert {each for each in found if each[0] == KERNEL.format(1)} >= {
        (KERNEL.format(1), "dtype", "bfloat16", "float32"),
        (KERNEL.format(1), "shape", "[4, 6]", "[4, 3]"),
        (KERNEL.format(1), "chunks", "[4, 6]", "[4, 3]"),
        (KERNEL.format(1), "inner chunks", "[4, 6]", "None"),
        (KERNEL.format(1), "codecs", "sharding_indexed (bytes, zstd 3)", "zstd 1"),
        (KERNEL.format(1), "zarr_format", "3", "2"),
    }
    assert ("only", "missing in B", "float64 [2]", None) in found
    assert ("rest", "kind", "an empty dict", "string") in found
    assert ("storage", "value", '"zarr3 in an OCDBT database"', '"zarr 2, each chunk a file"') in found
    assert ("custom_metadata.note", "missing in B", '"a\\u001b[31m"', None) in found
    assert not any(name == "step" and what in ("dtype", "shape") for name, what, _, _ in found)


def test_digests_tell_which_values_differ(output: Path, tmp_path: Path) -> None:
    other = shutil.copytree(output, tmp_path / "out")
    assert compared(output, other) == (0, [])
    assert "values       compared by their digests" in inspect("--diff", output, other).out
    summary = json.loads((other / "slicecast-summary.json").read_text())
    path = "params/params/decoder/decoder_norm/scale"
    before = summary["leaves"][path]["digest"]
    summary["leaves"][path]["digest"] = "0" * 32
    summary["runs"] = []  # Of another run there is nothing else to be said.
    (other / "slicecast-summary.json").write_text(json.dumps(summary))
    assert compared(output, other) == (1, [(path, "digest", before, "0" * 32)])
    (other / "slicecast-summary.json").unlink()
    code, found = compared(output, other)
    assert code == 1
    assert {(name.partition(".")[0], what) for name, what, _, _ in found} == {("summary", "missing in B")}
    assert "values       not compared" in inspect("--diff", output, other).out


def test_what_cannot_be_compared_is_misuse(output: Path, kimi: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(kimi, tmp_path / "broken")
    damage_truncate(broken)
    for words, said in (
        ([output, kimi], "slicecast verify OUT --hf_model_path=SOURCE"),
        ([kimi, output], "slicecast verify OUT --hf_model_path=SOURCE"),
        ([kimi, broken], "cannot be compared"),
        ([broken, broken], "cannot be compared"),
        ([kimi, tmp_path / "nothing"], "found nothing"),
    ):
        shown = inspect("--diff", *words)
        assert (shown.exit_code, shown.out) == (2, "")
        assert said in shown.error
    for words in ([], [kimi, "--diff", kimi, kimi], ["--diff", kimi], [kimi, kimi]):
        assert inspect(*words).exit_code == 2


# ---- Buckets


def test_sources_and_checkpoints_in_a_bucket(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """What is there is told as from a disk; without the file that commits it, a checkpoint is not finished."""
    saved = save_as_maxtext(tmp_path / "saved", tree())
    buckets = BucketServer("bucket")
    try:
        for directory, name in ((llama, "source"), (saved, "saved")):
            for file in directory.rglob("*"):
                if file.is_file():
                    buckets.upload("bucket", f"{name}/{file.relative_to(directory)}", file.read_bytes())
        run = functools.partial(slicecast.start, "inspect", environment=buckets.environment)
        done = [run(f"gs://bucket/{name}", "--json").wait() for name in ("source", "saved")]
        buckets.remove("bucket", "saved/0/commit_success.txt")
        unfinished = run("gs://bucket/saved").wait()
    finally:
        buckets.close()
    for one, local, path in zip(done, (llama, saved), ("", "/0/items"), strict=True):
        assert one.returncode == 0, one.stderr
        found, expected = json.loads(one.stdout), inspect(local, "--json").json
        assert found.pop("path").startswith("gs://bucket/")
        assert expected.pop("path") == f"{local}{path}"
        assert found == expected
    assert "finished     no" in unfinished.stdout, unfinished.stderr
