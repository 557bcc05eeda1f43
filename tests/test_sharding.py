"""Shardings from MaxText's flags and rules, the flags on the command line, and what a checkpoint remembers of them.

That the shardings are those of MaxText itself is tested with MaxText, in `tests/maxtext/test_shardings.py`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slicecast.configs import maxtext
from slicecast.convert import cli, commands, sharding, tiles
from slicecast.convert.errors import TargetError, UsageError
from slicecast.convert.mapping.rules import Rule, stacked
from slicecast.convert.mapping.target import Layout, Leaf, leaves
from slicecast.convert.memory import Machine
from slicecast.convert.settings import Settings
from slicecast.convert.sharding import AxisRules, Sharding, axis_rules

MACHINE = Machine(1, 1, 10**10, None)


def leaf(shape: Sequence[int], axes: Sequence[str | None]) -> Leaf:
    (found,) = leaves(Rule("x", tuple(shape), "x", (), tuple(axes)), Layout(False))
    return found


# ---- Rules


def test_there_are_rules_for_every_release() -> None:
    for version in maxtext.versions():
        rules = axis_rules(version)
        assert {"fsdp", "tensor", "expert"} <= set(rules.mesh_axes)
        assert {axis for _, axes in rules.rules for axis in axes} <= set(rules.mesh_axes)


def test_every_logical_name_of_every_model_has_rules_or_is_never_cut() -> None:
    """A name without rules is not cut: these are all of them, and MaxText does not cut them either."""
    known = {name for name, _ in axis_rules().rules}
    found = {
        name
        for model_name in maxtext.model_names()
        for scan_layers in (True, False)
        if ("scanned" if scan_layers else "unscanned") in maxtext.features(model_name)
        for target in maxtext.target_leaves(model_name, scan_layers, use_multimodal=False)
        for name in target.axes or ()
    }
    assert found - known == UNKNOWN_TO_THE_RULES


UNKNOWN_TO_THE_RULES = {None, "scanned_blocks", "o_groups", "o_lora_up_proj", "indexer_q", "indexer_weights"}


def test_a_models_own_rules_take_the_place_of_the_others() -> None:
    norm = leaf((64,), ("norm",))
    mesh = {"fsdp": 2, "tensor": 4}
    assert Sharding(mesh, axis_rules()).partition_spec(norm) == (("tensor",),)
    assert Sharding(mesh, axis_rules(model_name="llama2-7b")).partition_spec(norm) == (("fsdp",),)
    assert Sharding(mesh, axis_rules(model_name="llama3.1-8b")).partition_spec(norm) == (("tensor",),)


@pytest.mark.parametrize(
    ("axes", "mesh", "expected"),
    [
        (("vocab", "embed_vocab"), {"fsdp": 4, "tensor": 2}, (("tensor",), ("fsdp",))),
        # Experts come before the embedding in the rules, and `embed` would be cut over experts too.
        (("exp", "embed_moe", "mlp_moe"), {"fsdp": 4, "expert": 2}, (("expert",), ("fsdp",), ())),
        (("embed", "mlp"), {"fsdp": 4, "expert": 2}, (("fsdp", "expert"), ())),
        # `mlp` has taken `fsdp_transpose`, so that the second rule of `embed` counts: it is without.
        (("embed", "mlp"), {"fsdp": 4, "fsdp_transpose": 2}, (("fsdp",), ("fsdp_transpose",))),
        # That `fsdp_transpose` is 1 does not set it free, and axes of size 1 do not appear.
        (("mlp", "embed"), {"fsdp": 4, "fsdp_transpose": 1}, ((), ("fsdp",))),
        ((None, "layers"), {"fsdp": 4, "stage": 2}, ((), ("stage",))),
        (("embed",), {"data": 4}, ((),)),
    ],
)
def test_specs(axes: tuple[str | None, ...], mesh: dict[str, int], expected: tuple[tuple[str, ...], ...]) -> None:
    assert Sharding(mesh, axis_rules()).partition_spec(leaf([8] * len(axes), axes)) == expected


def test_a_rule_whose_mesh_axes_are_taken_in_part_does_not_count() -> None:
    rules = AxisRules(("a", "b"), (("x", ("a",)), ("y", ("a", "b")), ("y", ("b",)), ("x", ("b",))))
    assert Sharding({"a": 2, "b": 2}, rules).partition_spec(leaf((4, 4), ("x", "y"))) == (("a",), ("b",))
    assert Sharding({"a": 2, "b": 2}, rules).partition_spec(leaf((4, 4), ("z", "y"))) == ((), ("a", "b"))


def test_layers_are_cut_by_stages() -> None:
    (found,) = leaves(Rule("{layer}", (8, 8), "{layers}", (), ("embed", "mlp"), stacked("layers", 6)), Layout(True))
    assert Sharding({"stage": 3, "fsdp": 2}, axis_rules()).parts(found) == (2, 3, 1)


# ---- Flags


def test_a_mesh_is_within_slices_times_over_slices() -> None:
    assert sharding.mesh({"ici_fsdp_parallelism": 4, "dcn_fsdp_parallelism": 2, "ici_pipeline_parallelism": 3}) == {
        "fsdp": 8,
        "stage": 3,
    }


def test_flags_are_maxtexts() -> None:
    found = parse("plan", "--ici_fsdp_parallelism=16", "ici_expert_parallelism=4", "dcn_data_parallelism=-1")
    assert found.parallelism == {
        "ici_fsdp_parallelism": 16,
        "ici_expert_parallelism": 4,
        "dcn_data_parallelism": -1,
    }
    assert parse("plan").parallelism is None


@pytest.mark.parametrize("value", ["0", "-2", "x", "1.5"])
def test_a_size_is_a_whole_number(value: str) -> None:
    with pytest.raises(UsageError, match="ici_tensor_parallelism"):
        parse("convert", "--base_output_directory=OUT", f"--ici_tensor_parallelism={value}")


def test_the_rest_of_the_chips_is_not_known() -> None:
    with pytest.raises(UsageError, match=r"ici_fsdp_parallelism.*-1 is what the other axes leave.*give the number"):
        parse("plan", "--ici_fsdp_parallelism=-1")


def parse(command: str, *words: str) -> Settings:
    return cli._settings(cli.parse([command, "--hf_model_path=IN", *words]))


# ---- Conversions


def test_a_mesh_that_does_not_divide_a_leaf_is_refused(llama: Path) -> None:
    settings = Settings(hf_model_path=str(llama), parallelism={"ici_tensor_parallelism": 4})
    with pytest.raises(TargetError) as caught:
        commands.make_plan(settings, MACHINE)
    message = str(caught.value)
    assert message.startswith("a mesh of tensor 4 does not divide ")
    assert "in [1, 1, 4, 1] parts" in message
    assert "key/kernel" in message


def test_the_plan_is_that_of_the_mesh(llama: Path) -> None:
    """Tiles, and thus the digest, by which a run is resumed."""
    default = commands.make_plan(Settings(hf_model_path=str(llama)), MACHINE)
    plans = [
        commands.make_plan(Settings(hf_model_path=str(llama), parallelism=parallelism), MACHINE)
        for parallelism in ({"ici_fsdp_parallelism": 2}, {"dcn_fsdp_parallelism": 2}, {"ici_tensor_parallelism": 2})
    ]
    assert plans[0].digest == plans[1].digest
    assert len({default.digest, *(plan.digest for plan in plans)}) == 3
    cut = Sharding({"fsdp": 2}, axis_rules())
    assert [planned.tiling for planned in plans[0].leaves] == [
        tiles.choose(planned.leaf, planned.itemsize, cut) for planned in default.leaves
    ]


def test_verify_cuts_as_the_conversion_did(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """The flags are in the metadata, for the chunks that digests are of follow from them."""
    output = tmp_path / "out"
    flags = ("--ici_fsdp_parallelism=2", "--dcn_tensor_parallelism=2")
    slicecast.run("convert", f"--hf_model_path={llama}", f"--base_output_directory={output}", *flags)
    metadata = json.loads((output / "0" / "_CHECKPOINT_METADATA").read_text())
    assert '"dcn_tensor_parallelism": 2' in json.dumps(metadata)
    slicecast.run("verify", output, f"--hf_model_path={llama}")


# ---- The benchmark


def test_restore_reads_what_it_needs(tmp_path: Path) -> None:
    """The benchmark in small: it compares all values, and counts what TensorStore reads from files."""
    script = Path(__file__).parents[1] / "scripts" / "bench_restore.py"
    command = [sys.executable, script, "--work_dir", tmp_path, "--tiny", "--repetitions=1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| Kimi |")]
    figures = {(mesh.strip(), layout.strip()): float(read) for _, mesh, layout, _, read, _, _ in rows}
    assert len(figures) == 6
    for (mesh, layout), read in figures.items():
        # Leaves of a few KB are read whole by both processes, and so are the metadata.
        assert 0.9 <= read <= (1.15 if layout != "MaxText's" else 2), (mesh, layout)
    for mesh, _ in figures:
        assert figures[mesh, "MaxText's"] > figures[mesh, "default"]
