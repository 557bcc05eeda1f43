"""How rules find their tensors: prefixes that are spelled in several ways, and models that come in several forms."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import stored
import tiny_models

from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import MissingTensorError, PlanErrors, UnusedTensorError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.ops import Slice, Transpose
from slicecast.convert.mapping.resolve import Ignored, ResolvedLeaf
from slicecast.convert.mapping.rules import Ignore, Model, Rule, stacked
from slicecast.convert.mapping.target import Layout
from slicecast.convert.source.checkpoint import open_checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.verification import definition

Array = np.ndarray[Any, Any]
Stored = dict[str, tuple[str, Array]]

SCANNED, UNSCANNED = Layout(scan_layers=True), Layout(scan_layers=False)


def resolved(directory: Path, model: Model, layout: Layout = SCANNED) -> tuple[list[ResolvedLeaf], list[Ignored]]:
    """The leaves of a model with what a checkpoint has for them."""
    checkpoint = open_checkpoint(str(directory))
    announced = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    return resolve.resolve(checkpoint, model, layout, announced)


def sources(leaves: list[ResolvedLeaf]) -> dict[str, list[str]]:
    """The names of the tensors of each leaf."""
    return {item.leaf.path: [name for tensor in item.sources.values() for name in tensor.names] for item in leaves}


def respelled(tensors: Mapping[str, tuple[str, Array]], *pairs: tuple[str, str]) -> Stored:
    """The tensors under other names, in which the first prefix that fits is another one."""

    def name(old: str) -> str:
        return next((new + old.removeprefix(prefix) for prefix, new in pairs if old.startswith(prefix)), old)

    return {name(old): content for old, content in tensors.items()}


# ---- Gemma 3

GEMMA = tiny_models.model("gemma3")
LANGUAGE = ("model.language_model.", "language_model.model.")


@pytest.fixture
def gemma() -> Stored:
    """The tensors of a tiny Gemma 3 under the names of the rules, with some of a vision tower."""
    some = ("BF16", np.zeros((2, 2), stored.BF16))
    vision = ["model.vision_tower.embeddings.weight", "model.multi_modal_projector.mm_input_projection_weight"]
    return tiny_models.tensors(GEMMA, 1) | dict.fromkeys(vision, some)


def test_both_spellings_of_gemma3(tmp_path: Path, gemma: Stored) -> None:
    """Newer releases of transformers write other prefixes than those that the published checkpoints have."""
    config = tiny_models.CONFIGS["gemma3"]
    new, new_ignored = resolved(stored.write(tmp_path / "new", gemma, config), GEMMA)
    others = ("model.vision_tower.", "vision_tower.vision_model."), ("model.multi_modal", "multi_modal")
    tensors = respelled(gemma, LANGUAGE, *others)
    assert not any(name.startswith("model.") for name in tensors)
    old, old_ignored = resolved(stored.write(tmp_path / "old", tensors, config), GEMMA)
    assert [item.leaf for item in old] == [item.leaf for item in new]
    new_names, old_names = sources(new), sources(old)
    assert new_names["params/params/token_embedder/embedding"] == ["model.language_model.embed_tokens.weight"]
    assert old_names["params/params/token_embedder/embedding"] == ["language_model.model.embed_tokens.weight"]
    for path, names in new_names.items():
        assert old_names[path] == [name.replace(*LANGUAGE) for name in names]
    assert new_ignored == old_ignored
    assert [(ignored.count, ignored.nbytes) for ignored in old_ignored] == [(2, 16)]


def test_a_spelling_that_nobody_uses(tmp_path: Path, gemma: Stored) -> None:
    """What is missing is called as the rules call it, and what is there is listed too."""
    tensors = respelled(gemma, ("model.language_model.", "model.text_model."))
    directory = stored.write(tmp_path, tensors, tiny_models.CONFIGS["gemma3"])
    with pytest.raises(PlanErrors) as caught:
        resolved(directory, GEMMA)
    missing = [str(error) for error in caught.value.errors if isinstance(error, MissingTensorError)]
    unused = [str(error) for error in caught.value.errors if isinstance(error, UnusedTensorError)]
    assert len(missing) + len(unused) == len(caught.value.errors)
    assert missing[0].startswith("tensor 'model.language_model.embed_tokens.weight' with shape [56, 24] is in no file")
    assert "Download the missing file" in missing[0]
    assert any("model.safetensors: tensor 'model.text_model." in error for error in unused)


@pytest.mark.parametrize("spelled", [LANGUAGE[0], LANGUAGE[1]])
def test_a_spelling_is_that_of_all_tensors(tmp_path: Path, gemma: Stored, spelled: str) -> None:
    """A tensor in the other spelling, even the first one, does not change how the rest is called: it is missing."""
    (other,) = set(LANGUAGE) - {spelled}
    tensors = respelled(gemma, (LANGUAGE[0], spelled))
    tensors[f"{other}embed_tokens.weight"] = tensors.pop(f"{spelled}embed_tokens.weight")
    with pytest.raises(PlanErrors) as caught:
        resolved(stored.write(tmp_path, tensors, tiny_models.CONFIGS["gemma3"]), GEMMA)
    missing, unused = map(str, caught.value.errors)
    assert f"tensor '{spelled}embed_tokens.weight' with shape [56, 24] is in no file of the checkpoint" in missing
    assert f"model.safetensors: tensor '{other}embed_tokens.weight'" in unused


def test_conversion_in_the_other_spelling(slicecast: Any, tmp_path: Path) -> None:
    tensors = respelled(tiny_models.tensors(GEMMA, 1), LANGUAGE)
    source = stored.write(tmp_path / "source", tensors, tiny_models.CONFIGS["gemma3"])
    slicecast.run("convert", f"--hf_model_path={source}", f"--base_output_directory={tmp_path / 'output'}")
    done = slicecast.run("verify", tmp_path / "output", f"--hf_model_path={source}")
    assert "all equal to the source, bit for bit" in done.stdout


# ---- Spellings in general


def weight(seed: int, *shape: int) -> tuple[str, Array]:
    """A weight in bfloat16."""
    return "BF16", np.random.default_rng(seed).standard_normal(shape).astype(stored.BF16)


def matrix(source: str, target: str) -> Rule:
    """A rule for a small matrix that stays as it is."""
    return Rule(source, (3, 2), target, (), ("a", "b"))


def test_the_longest_prefix_counts(tmp_path: Path) -> None:
    rules = [matrix("m.a.weight", "a"), matrix("m.b.x.weight", "b"), matrix("other.weight", "c")]
    for spelling in ({"m.": "n.", "m.b.": "o."}, {"m.b.": "o.", "m.": "n."}):
        tensors = {"n.a.weight": weight(0, 3, 2), "o.x.weight": weight(1, 3, 2), "other.weight": weight(2, 3, 2)}
        directory = stored.write(tmp_path, tensors, {})
        leaves, _ = resolved(directory, Model("made up", "a model", rules, spellings=[spelling]))
        assert [names for (names,) in sources(leaves).values()] == ["n.a.weight", "o.x.weight", "other.weight"]


@pytest.mark.parametrize("name", samples.QUANTIZED)
def test_quantized_weights_in_another_spelling(tmp_path: Path, name: str) -> None:
    """They have other names than the rules say, whatever the prefix."""
    sample = samples.MAKERS[name](np.random.default_rng(0))
    tensors = {f"other.{stored_name}": content for stored_name, content in sample.tensors.items()}
    directory = stored.write(tmp_path, tensors, sample.config)
    rule = Rule(f"own.{sample.name}", sample.shape, "t", (), tuple("abc"[: len(sample.shape)]))
    model = Model("made up", "a model", [rule], spellings=[{"never.": "x."}, {"own.": "other."}])
    ((leaf,), _) = resolved(directory, model)
    (tensor,) = leaf.sources.values()
    assert tensor.name == f"other.{sample.name}"
    assert set(tensor.names) <= set(tensors)


def test_what_is_left_out_is_called_as_it_is(tmp_path: Path) -> None:
    """Patterns of what is left out are for the names in the checkpoint, not for those of the rules."""
    tensors = {"n.a.weight": weight(0, 3, 2), "n.rest.weight": weight(1, 1, 1)}
    directory = stored.write(tmp_path, tensors, {})
    model = Model("made up", "a model", [matrix("m.a.weight", "a")], spellings=[{"m.": "n."}])
    _, ignored = resolved(directory, replace(model, ignores=[Ignore(r"n\.rest\..*", "it rests")]))
    assert ignored == [Ignored("it rests", 1, 2)]
    with pytest.raises(PlanErrors, match=r"tensor 'n.rest.weight' \(BF16\[1, 1\]\) is read by no rule"):
        resolved(directory, replace(model, ignores=[Ignore(r"m\.rest\..*", "it rests")]))


# ---- Forms


LAYERS, EXPERTS, WIDTH, HIDDEN = 2, 3, 5, 4
MADE_UP = stacked("layers", LAYERS)
GATE_AND_UP = [
    Rule(
        "m.{layer}.gate_up",
        (EXPERTS, 2 * WIDTH, HIDDEN),
        f"{{layers}}/{target}",
        (Slice(1, half * WIDTH, (half + 1) * WIDTH), Transpose((0, 2, 1))),
        ("exp", "embed", "mlp"),
        MADE_UP,
    )
    for half, target in enumerate(("gate", "up"))
]
SEPARATE = [
    Rule(
        f"m.{{layer}}.{{expert}}.{target}.weight",
        (WIDTH, HIDDEN),
        f"{{layers}}/{target}",
        (Transpose(),),
        ("embed", "mlp"),
        MADE_UP,
        experts=EXPERTS,
    )
    for target in ("gate", "up")
]


def together() -> Stored:
    """The experts of each layer in one tensor."""
    return {f"m.{layer}.gate_up": weight(layer, EXPERTS, 2 * WIDTH, HIDDEN) for layer in range(LAYERS)}


def one_by_one() -> Stored:
    """The same experts, each half of each in a tensor of its own."""
    found: Stored = {}
    for layer in range(LAYERS):
        _, values = together()[f"m.{layer}.gate_up"]
        for expert in range(EXPERTS):
            for half, target in enumerate(("gate", "up")):
                rows = values[expert, half * WIDTH : (half + 1) * WIDTH]
                found[f"m.{layer}.{expert}.{target}.weight"] = ("BF16", rows)
    return found


@pytest.mark.parametrize("forms", [(GATE_AND_UP, SEPARATE), (SEPARATE, GATE_AND_UP)], ids=["together", "one by one"])
@pytest.mark.parametrize("layout", [SCANNED, UNSCANNED], ids=["scanned", "unscanned"])
def test_the_form_that_fits_is_taken(tmp_path: Path, forms: tuple[list[Rule], list[Rule]], layout: Layout) -> None:
    """Whichever the model has first; the leaves are the same."""
    model = Model("made up", "a model", forms[0], other_forms=[forms[1]])
    shapes = []
    for name, tensors in (("together", together()), ("one by one", one_by_one())):
        leaves, _ = resolved(stored.write(tmp_path / name, tensors, {}), model, layout)
        used = {name for names in sources(leaves).values() for name in names}
        assert used == set(tensors)
        shapes.append({item.leaf.path: (item.leaf.shape, item.leaf.dtype) for item in leaves})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("make", [together, one_by_one])
def test_what_is_missing_is_missing_of_the_form_that_is_there(tmp_path: Path, make: Any) -> None:
    model = Model("made up", "a model", GATE_AND_UP, other_forms=[SEPARATE])
    tensors = make()
    gone = list(tensors)[-1]
    del tensors[gone]
    with pytest.raises(PlanErrors) as caught:
        resolved(stored.write(tmp_path, tensors, {}), model)
    assert {str(error).split("'")[1] for error in caught.value.errors} == {gone}
    assert all(isinstance(error, MissingTensorError) for error in caught.value.errors)


# ---- Halves of experts


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("half", [0, 1])
def test_half_of_each_expert_is_read_alone(tmp_path: Path, half: int, start: int, stop: int) -> None:
    """Both paths give the rows of that half, and no others are read."""
    tensors = together()
    directory = stored.write(tmp_path, tensors, {})
    leaves, _ = resolved(directory, Model("made up", "a model", GATE_AND_UP), UNSCANNED)
    for layer in range(LAYERS):
        name = f"params/params/layers_{layer}/{('gate', 'up')[half]}"
        (leaf,) = [item for item in leaves if item.leaf.path == name]
        (tensor,) = leaf.sources.values()
        assert (leaf.leaf.shape, tensor.shape) == ((EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN))
        wanted = tensors[f"m.{layer}.gate_up"][1][start:stop, half * WIDTH : (half + 1) * WIDTH]
        assert tensor.read_bytes(start, stop) == wanted.nbytes
        (found,) = stored.prepare(directory, tensor, start, stop)
        assert tensor.prepared_bytes(stop - start) == found.nbytes
        for values in (found, definition.rows(Directory(str(directory)), tensor, start, stop)):
            assert (values.dtype, values.shape) == (wanted.dtype, wanted.shape)
            assert values.tobytes() == np.ascontiguousarray(wanted).tobytes()
