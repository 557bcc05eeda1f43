"""The snapshots of MaxText's parameter trees: their format, what they hold, and what is said if there is none."""

import math
import random
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from slicecast.configs import maxtext
from slicecast.configs.maxtext import snapshot
from slicecast.configs.maxtext.snapshot import Refusal, Snapshot, TargetLeaf
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping.target import Layout

SCRIPT = Path(__file__).parents[1] / "scripts" / "snapshot_maxtext.py"

FILES = [(version, model_name) for version in maxtext.versions() for model_name in maxtext.model_names(version)]
MULTIMODAL = [
    *("gemma3-12b", "gemma3-27b", "gemma3-4b", "gemma4-26b", "gemma4-31b", "llama4-17b-128e", "llama4-17b-16e"),
    *("qwen3-omni-30b-a3b", "qwen3-vl-2b", "qwen3-vl-30b-a3b", "qwen3-vl-4b"),
    *("qwen3.5-35b-a3b", "qwen3.5-397b-a17b", "weaver-max", "weaver-mini"),
]

# As many as in the Hugging Face releases. For Gemma 1 and 2 MaxText pads the vocabulary by 128 rows.
PUBLISHED = {
    "deepseek2-16b": 15_706_484_224,
    "deepseek2-236b": 235_741_434_880,
    "gemma-2b": 2_506_172_416 + 128 * 2048,
    "gemma-7b": 8_537_680_896 + 128 * 3072,
    "gemma2-27b": 27_227_128_320 + 128 * 4608,
    "gemma2-2b": 2_614_341_888 + 128 * 2304,
    "gemma2-9b": 9_241_705_984 + 128 * 3584,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama2-7b": 6_738_415_616,
    "llama3.1-405b": 405_853_388_800,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "olmo3-32b": 32_233_522_176,
    "olmo3-7b": 7_298_011_136,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}
# With their encoders. Of Gemma 3's vocabulary MaxText leaves out 64 rows, which are for images and never looked up.
PUBLISHED_WITH_ENCODERS = {
    "gemma3-12b": 12_187_325_040 - 64 * 3840,
    "gemma3-27b": 27_432_406_640 - 64 * 5376,
    "gemma3-4b": 4_300_079_472 - 64 * 2560,
    "llama4-17b-128e": 401_583_781_376,
    "llama4-17b-16e": 108_641_793_536,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
}


def parameters(leaves: tuple[TargetLeaf, ...]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)


def paths(model_name: str, scan_layers: bool, **options: bool | None) -> set[str]:
    return {leaf.path for leaf in maxtext.target_leaves(model_name, scan_layers, **options)}


def check(model_name: str, layout: Layout, **options: bool | str) -> str:
    """The message with which a check is refused that has nothing to compare with."""
    with pytest.raises(TargetError) as error:
        maxtext.check(model_name, layout, [], **options)
    return str(error.value)


# ---- The format


def test_layers_alike_share_a_line() -> None:
    leaves = [TargetLeaf(f"params/decoder/layers_{i}/scale", (4,) if i % 6 == 5 else (3,), None) for i in range(12)]
    leaves += [TargetLeaf("params/decoder/wi_0/kernel", (5, 6), ("embed", None)), TargetLeaf("params/a", (1,), ())]
    random.Random(0).shuffle(leaves)
    text = snapshot.dumps(Snapshot(True, {"scanned": tuple(leaves), "unscanned": Refusal('so "it" goes')}))
    assert text.splitlines() == [
        "{",
        ' "use_multimodal": true,',
        ' "scanned": [',
        '  ["params/a", [1], []],',
        '  ["params/decoder/layers_{}/scale", [3], null, "0-4,6-10"],',
        '  ["params/decoder/layers_{}/scale", [4], null, "5,11"],',
        '  ["params/decoder/wi_0/kernel", [5, 6], ["embed", null]]',
        " ],",
        ' "unscanned": {"refused": "so \\"it\\" goes"}',
        "}",
    ]


@pytest.mark.parametrize("seed", range(50))
def test_what_is_written_is_read(seed: int) -> None:
    chosen = random.Random(seed)
    stacks = ("layers_{}", "dense_layers_{}", "layers/layers_{}", "blocks_{}", "layers_{}/layer_{}", "mtp_layer_{}")
    leaves = {}
    for _ in range(chosen.randrange(40)):
        stack = chosen.choice(stacks).format(chosen.randrange(12), chosen.randrange(3))
        path = f"{chosen.choice(['params', 'MoEBiasVar'])}/decoder/{stack}/{chosen.choice(['wi_0', 'wi_1', 'bias'])}"
        axes = chosen.choice([None, (), ("embed",), ("embed", None)])
        leaves[path] = TargetLeaf(path, tuple(chosen.choices((1, 2), k=chosen.randrange(3))), axes)
    written = Snapshot(chosen.choice([True, False]), {"scanned": tuple(leaves.values()), "unscanned": Refusal("no")})
    text = snapshot.dumps(written)
    read = snapshot.loads(text)
    assert (read.use_multimodal, set(read.layouts)) == (written.use_multimodal, set(written.layouts))
    assert read.layouts["unscanned"] == Refusal("no")
    found = read.layouts["scanned"]
    assert isinstance(found, tuple)
    assert sorted(found, key=lambda leaf: leaf.path) == [leaves[path] for path in sorted(leaves)]
    assert snapshot.dumps(read) == text


# ---- What they hold


@pytest.mark.parametrize(("version", "model_name"), FILES)
def test_every_file(version: str, model_name: str) -> None:
    text = (resources.files(maxtext) / version / f"{model_name}.json").read_text()
    read = snapshot.loads(text)
    assert snapshot.dumps(read) == text
    assert {"scanned", "unscanned"} <= set(read.layouts)
    for scan_layers, name in ((True, "scanned"), (False, "unscanned")):
        if isinstance(read.layouts[name], Refusal):
            continue
        leaves = maxtext.target_leaves(
            model_name, scan_layers, use_multimodal=f"multimodal_{name}" in read.layouts, version=version
        )
        assert len({leaf.path for leaf in leaves}) == len(leaves)
        assert "params/params/token_embedder/embedding" in {leaf.path for leaf in leaves}
        for leaf in leaves:
            assert leaf.path.startswith("params/params/")
            assert "{" not in leaf.path
            assert leaf.shape
            assert min(leaf.shape) > 0
            assert len(leaf.axes or ()) <= len(leaf.shape)


@pytest.mark.parametrize(("version", "model_name"), FILES)
def test_both_layouts_hold_the_same_parameters(version: str, model_name: str) -> None:
    layouts = snapshot.loads((resources.files(maxtext) / version / f"{model_name}.json").read_text()).layouts
    for prefix in ("", "multimodal_", "mtp_"):
        found = [layouts.get(f"{prefix}{name}") for name in ("scanned", "unscanned")]
        counts = {parameters(leaves) for leaves in found if isinstance(leaves, tuple)}
        assert len(counts) <= 1


@pytest.mark.parametrize("model_name", PUBLISHED)
def test_parameters_are_as_many_as_published(model_name: str) -> None:
    assert parameters(maxtext.target_leaves(model_name, False, version="0.2.5")) == PUBLISHED[model_name]


@pytest.mark.parametrize("model_name", PUBLISHED_WITH_ENCODERS)
def test_parameters_with_encoders_are_as_many_as_published(model_name: str) -> None:
    leaves = maxtext.target_leaves(model_name, False, use_multimodal=True, version="0.2.5")
    assert parameters(leaves) == PUBLISHED_WITH_ENCODERS[model_name]


def test_collections_on_disk() -> None:
    found = paths("deepseek4-284b", True)
    assert "params/params/decoder/scanned_blocks/layers_0/mlp/MoeBlock_0/gate/bias" in found
    assert "params/params/decoder/layers_0/mlp/MoeBlock_0/tid2eid" in found


def test_layers_of_several_kinds() -> None:
    leaves = {leaf.path: leaf for leaf in maxtext.target_leaves("gemma4-26b", False)}
    path = "params/params/decoder/layers_{}/self_attention/query/kernel"
    wide = [layer for layer in range(30) if leaves[path.format(layer)].shape[-1] == 512]
    assert wide == [5, 11, 17, 23, 29]


# ---- Options


def test_encoders_are_there_as_in_maxtext_or_as_told() -> None:
    for scan_layers in (True, False):
        text, image = (paths("gemma3-4b", scan_layers, use_multimodal=choice) for choice in (False, True))
        assert paths("gemma3-4b", scan_layers) == text
        assert text < image
        assert all(path.startswith("params/params/vision_encoder/") for path in image - text)
    omni = paths("qwen3-omni-30b-a3b", False)
    assert omni == paths("qwen3-omni-30b-a3b", False, use_multimodal=True)
    assert {path.split("/")[2] for path in omni - paths("qwen3-omni-30b-a3b", False, use_multimodal=False)} == {
        "audio_encoder",
        "vision_encoder",
    }


@pytest.mark.parametrize("model_name", maxtext.model_names("0.2.5"))
def test_which_models_have_encoders(model_name: str) -> None:
    if model_name in MULTIMODAL:
        assert paths(model_name, False, use_multimodal=True) > paths(model_name, False, use_multimodal=False)
    else:
        assert check(model_name, Layout(False), use_multimodal=True).endswith("Give --use_multimodal=false.")


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
def test_multi_token_prediction(scan_layers: bool) -> None:
    plain, more = (maxtext.target_leaves("deepseek3-671b", scan_layers, enable_mtp=choice) for choice in (False, True))
    assert more[: len(plain)] == plain
    added = more[len(plain) :]
    assert all(leaf.path.startswith("params/params/mtp_block/mtp_layer_1/mtp_1_") for leaf in added)
    assert len(added) == 21
    # The release counts its tensors by dtype: BF16, FP8, and of F32, beside scales, the biases of 59 routers. Its layer
    # for multi-token prediction brings its own copies of the embedding and of the head.
    assert parameters(more) + 2 * 129_280 * 7168 == 3_918_786_560 + 680_571_043_840 + 59 * 256


# ---- Nothing to compare with


@pytest.mark.parametrize("model_name", ["gemma4-e2b", "gemma4-e4b", "qwen3-vl-2b", "qwen3-omni-30b-a3b", "weaver-max"])
def test_layouts_that_maxtext_refuses(model_name: str) -> None:
    message = check(model_name, Layout(True))
    assert f"--model_name={model_name}: " in message
    assert "requires scan_layers=False" in message
    assert message.endswith("Give --scan_layers=false.")
    assert maxtext.target_leaves(model_name, False)


def test_options_that_maxtext_refuses() -> None:
    message = check("deepseek4-284b", Layout(True), enable_mtp=True)
    assert "DeepSeek4 decoder block currently does not support MTP layers. Give --enable_mtp=false." in message
    for model_name in ("kimi-k2-1t", "llama3.1-8b", "qwen3-next-80b-a3b"):
        assert check(model_name, Layout(False), enable_mtp=True).endswith("Give --enable_mtp=false.")
    assert check("llama3.1-8b", Layout(False), use_multimodal=True).endswith("Give --use_multimodal=false.")


def test_unknown_model_names() -> None:
    message = check("llama3.1-405", Layout(True))
    assert "Did you mean llama3.1-405b or " in message
    assert "Did you mean" not in check("?", Layout(True))
    for known in maxtext.model_names():
        assert known in message


def test_unknown_versions() -> None:
    for version in ("0.0.1", "", "..", "__pycache__"):
        message = check("llama3.1-8b", Layout(True), version=version)
        assert message.startswith(f"--maxtext_version={version}: there are no snapshots of this release, only of ")
        assert all(known in message for known in maxtext.versions())
        with pytest.raises(TargetError):
            maxtext.model_names(version)


def test_the_newest_version_comes_last() -> None:
    assert maxtext.versions()[-1] == maxtext.VERSION
    assert "0.2.5" in maxtext.versions()


# ---- The script


def test_the_script_needs_maxtext(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MaxText is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
