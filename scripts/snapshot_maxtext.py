"""Writes snapshots of the MaxText that is installed: its parameter trees, and how it cuts them over a mesh.

OUTPUT/RELEASE/MODEL.json is the tree of a model, OUTPUT/logical_axis_rules/RELEASE.json has the rules for all models.

    .venv-maxtext/bin/python -P scripts/snapshot_maxtext.py                        # all models
    .venv-maxtext/bin/python -P scripts/snapshot_maxtext.py llama3.1-8b kimi-k2-1t
    .venv-maxtext/bin/python -P scripts/snapshot_maxtext.py --output=trees gemma3-4b

Runs with a Python that has MaxText and slicecast; scripts/test_maxtext.sh makes one. `-P` keeps this repository's
folders out of the imports. Only abstract models are built, on a CPU: no weights, whatever the size of the model.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slicecast.configs.maxtext import snapshot
from slicecast.configs.maxtext.snapshot import Refusal, TargetLeaf

# The families whose checkpoints convert, by the beginnings of MaxText's names.
FAMILIES = (
    "deepseek",
    "gemma",
    "gpt-oss",
    "kimi",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "qwen",
    "weaver",
)
# Made up for tests and experiments, or DeepSeek-V3 again, with the same leaves and other shardings.
LEFT_OUT = ("-custom", "-test", "-tiny", "-2dfsdp", "-batchsplit")
# The models whose releases have a layer for multi-token prediction that MaxText has too. It builds one for every
# decoder, but those of Qwen3-Next and Qwen3.5 are four layers where their releases have one, and fail unscanned.
MTP_FAMILIES = ("deepseek3", "deepseek4")

SETTINGS = (
    "attention=dot_product",  # The default needs a TPU, and refuses the sparse attention of DeepSeek-V3.2.
    "enable_checkpointing=false",
    "hardware=cpu",
    # Some models set `scan_layers` themselves; without this the other value is refused for that, not for its reason.
    "override_model_config=true",
    "run_name=snapshot",
    "skip_jax_distributed_system=true",
)
TEXT_ONLY = ("use_multimodal=false", "use_audio=false")
OUTPUT = Path(__file__).resolve().parents[1] / "configs" / "maxtext"


def model_names() -> list[str]:
    """The models of the families that the installed MaxText accepts as `model_name`."""
    import maxtext
    from maxtext.configs import types

    files = {file.stem for file in (Path(maxtext.__file__).parent / "configs" / "models").glob("*.yml")}
    return sorted(
        name
        for name in files.intersection(typing.get_args(types.ModelName))
        if name.startswith(FAMILIES) and not any(part in name for part in LEFT_OUT)
    )


def layout(model_name: str, scan_layers: bool, *options: str) -> snapshot.Layout:
    """The leaves of MaxText's abstract model, or why MaxText refuses its settings."""
    import maxtext
    import pydantic
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = (*SETTINGS, f"model_name={model_name}", f"scan_layers={scan_layers}", *options)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # MaxText wants a place for its output.
            config = pyconfig.initialize(["", str(base), *settings, f"base_output_directory={scratch}"])
    except pydantic.ValidationError as error:
        messages = [str(item["msg"]).removeprefix("Value error, ").rstrip(".") for item in error.errors()]
        return Refusal("; ".join(messages))
    _, model = model_creation_utils.create_nnx_abstract_model(config)
    transient = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.BatchStat)
    return tuple(
        TargetLeaf(
            "/".join([nnx.variablelib.variable_name_from_type(type(variable), allow_register=True), *map(str, path)]),
            tuple(variable.get_value().shape),
            variable.get_metadata().get("out_sharding"),
        )
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if not isinstance(variable, transient)
    )


def take(model_name: str) -> snapshot.Snapshot:
    """The snapshot of a model.

    Raises:
        RuntimeError: If MaxText refuses both layouts: this script must have gone wrong, not the model.
    """
    layouts: dict[str, snapshot.Layout] = {}
    use_multimodal = False
    for name, scan_layers in (("scanned", True), ("unscanned", False)):
        layouts[name] = plain = layout(model_name, scan_layers, *TEXT_ONLY)
        if isinstance(plain, Refusal):
            continue
        with_encoders = layout(model_name, scan_layers, "use_multimodal=true")
        if not isinstance(with_encoders, Refusal):
            layouts[f"multimodal_{name}"] = on_top(with_encoders, plain)
            use_multimodal = layout(model_name, scan_layers) == with_encoders
        if model_name.startswith(MTP_FAMILIES):
            with_mtp = layout(model_name, scan_layers, *TEXT_ONLY, "mtp_num_layers=1")
            layouts[f"mtp_{name}"] = with_mtp if isinstance(with_mtp, Refusal) else on_top(with_mtp, plain)
    if all(isinstance(leaves, Refusal) for leaves in layouts.values()):
        raise RuntimeError(f"MaxText refuses {model_name}: {layouts}")
    return snapshot.Snapshot(use_multimodal, layouts)


def on_top(leaves: Sequence[TargetLeaf], plain: Sequence[TargetLeaf]) -> tuple[TargetLeaf, ...]:
    """The leaves that an option adds to those of a model without it.

    Raises:
        RuntimeError: If it changes others.
    """
    known = set(plain)
    added = tuple(leaf for leaf in leaves if leaf not in known)
    if len(added) != len(leaves) - len(plain):
        raise RuntimeError(f"not only new leaves: {[leaf.path for leaf in added]}")
    return added


def axis_rules() -> dict[str, Any]:
    """MaxText's mesh axes, its logical axis rules, and what models put in place of the rules of the same name."""
    import maxtext
    from omegaconf import OmegaConf

    configs = Path(maxtext.__file__).parent / "configs"
    base = OmegaConf.to_container(OmegaConf.load(configs / "base.yml"))
    models = {
        name: OmegaConf.to_container(OmegaConf.load(configs / "models" / f"{name}.yml")) for name in model_names()
    }
    if replaced := [name for name, model in models.items() if model.get("override_logical_axis_rules")]:
        raise RuntimeError(f"these have only rules of their own, for which the file has no place: {replaced}")
    rules = {
        name: _with_lists(model["logical_axis_rules"])
        for name, model in models.items()
        if "logical_axis_rules" in model
    }
    return {
        "mesh_axes": base["mesh_axes"],
        "logical_axis_rules": _with_lists(base["logical_axis_rules"]),
        "models": rules,
    }


def dump_rules(content: Mapping[str, Any]) -> str:
    """The text of the file of rules, a line each."""
    lines = ",\n".join(f"  {json.dumps(rule)}" for rule in content["logical_axis_rules"])
    fields = {name: json.dumps(value) for name, value in content.items()}
    fields["logical_axis_rules"] = f"[\n{lines}\n ]"
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {value}" for name, value in fields.items()) + "\n}\n"


def _with_lists(rules: Sequence[tuple[str, str | Sequence[str]]]) -> list[list[Any]]:
    """Rules with a list of mesh axes each, also where there is one."""
    return [[name, [axes] if isinstance(axes, str) else list(axes)] for name, axes in rules]


def main() -> None:
    """Writes the files, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_names", nargs="*", metavar="MODEL", help="MaxText's name of a model (default: all)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder of the releases (default: %(default)s)")
    arguments = parser.parse_args()

    try:
        version = importlib.metadata.version("maxtext")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            f"MaxText is not installed for {sys.executable}. scripts/test_maxtext.sh makes an environment with it: "
            "run this with .venv-maxtext/bin/python -P"
        )
    # Nothing is computed and nothing is fetched; MaxText would otherwise wait for a TPU.
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    known = model_names()
    logging.disable()  # MaxText logs settings that it refuses as errors; here they are results.
    if unknown := set(arguments.model_names).difference(known):
        sys.exit(f"MaxText {version} has no model {', '.join(sorted(unknown))}. It has: {', '.join(known)}")

    rules = arguments.output / "logical_axis_rules" / f"{version}.json"
    rules.parent.mkdir(parents=True, exist_ok=True)
    rules.write_text(dump_rules(axis_rules()))

    folder = arguments.output / version
    folder.mkdir(parents=True, exist_ok=True)
    names = arguments.model_names or known
    for number, model_name in enumerate(names, 1):
        start = time.monotonic()
        taken = take(model_name)
        (folder / f"{model_name}.json").write_text(snapshot.dumps(taken))
        counts = [
            f"{name} {'refused' if isinstance(leaves, Refusal) else len(leaves)}"
            for name, leaves in taken.layouts.items()
        ]
        print(f"{number}/{len(names)} {model_name}: {', '.join(counts)} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"wrote {len(names)} files to {folder}")


if __name__ == "__main__":
    main()
