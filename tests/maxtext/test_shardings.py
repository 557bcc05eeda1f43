"""How we say that MaxText cuts each leaf over a mesh is how it does: every leaf of eight models, over six meshes.

The models are whole, as published and as MaxText knows them, but abstract: nothing is computed.
"""

import json
import subprocess
import sys
from pathlib import Path

import published_models
import pytest

from slicecast.configs import families
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping.rules import ModelOptions
from slicecast.convert.mapping.target import ROOT, Layout, leaves
from slicecast.convert.sharding import Sharding, axis_rules, mesh

pytestmark = pytest.mark.maxtext

# Every axis that cuts a weight, alone and with others. MaxText gives fsdp the chips that are left, if it is not told.
MESHES = (
    "ici_fsdp_parallelism=16",
    "ici_fsdp_parallelism=4 ici_expert_parallelism=4",
    "ici_fsdp_parallelism=4 ici_tensor_parallelism=4",
    "ici_fsdp_parallelism=1 ici_expert_parallelism=16",
    "ici_fsdp_parallelism=2 ici_fsdp_transpose_parallelism=2 ici_expert_parallelism=2 ici_tensor_parallelism=2",
    "ici_fsdp_parallelism=2 ici_context_parallelism=2 ici_tensor_sequence_parallelism=2 "
    "ici_autoregressive_parallelism=2",
)
# Dense, with rules of its own, with experts of four kinds, and with cycles of layers, some of them nested.
MODELS = (
    "llama3.1-8b",
    "llama2-7b",
    "deepseek3-671b",
    "kimi-k2-1t",
    "gpt-oss-120b",
    "qwen3-235b-a22b",
    "gemma3-27b",
    "qwen3-next-80b-a3b",
)


@pytest.mark.parametrize(
    ("model_name", "scan_layers"),
    # MaxText takes a minute for an unscanned model of many layers, which have the axes of the scanned ones but one.
    [*((model_name, True) for model_name in MODELS), ("llama3.1-8b", False), ("gpt-oss-120b", False)],
)
def test_shardings_are_those_of_maxtext(model_name: str, scan_layers: bool) -> None:
    script = Path(__file__).with_name("shardings_of_maxtext.py")
    command = [sys.executable, script, model_name, str(scan_layers), json.dumps(MESHES)]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    assert theirs.keys() == set(MESHES)

    model = families.recognize(published_models.load(model_name).config, ModelOptions(model_name=model_name))
    ours = [leaf for rule in model.rules for leaf in leaves(rule, Layout(scan_layers))]
    for flags, specs in theirs.items():
        parallelism = {name: int(size) for name, size in (flag.split("=") for flag in flags.split())}
        sharding = Sharding(mesh(parallelism), axis_rules(model_name=model_name))
        if isinstance(specs, str):
            assert "must be divisible by" in specs
            with pytest.raises(TargetError, match="does not divide"):
                sharding.check(ours)
            continue
        sharding.check(ours)
        assert {leaf.path.removeprefix(f"{ROOT}/") for leaf in ours} == specs.keys()
        for leaf in ours:
            spec = tuple(tuple(axes) for axes in specs[leaf.path.removeprefix(f"{ROOT}/")])
            found = sharding.partition_spec(leaf)
            # MaxText's may be shorter, and is then not cut along the other axes.
            assert found == spec + ((),) * (len(found) - len(spec)), f"{flags}: {leaf.path}"
