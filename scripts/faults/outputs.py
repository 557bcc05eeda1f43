"""What is in an output, seen by Orbax's own loader. Each function runs in a process of its own."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # Makes NumPy know bfloat16.
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


@dataclass(frozen=True)
class Found:
    """What a loader finds.

    Attributes:
        finished: Whether Orbax takes the checkpoint for finished.
        leaves: The digest of each leaf, by path; empty if nothing can be loaded.
        summary: The digests that the program's own summary gives; empty if there is none.
    """

    finished: bool = False
    leaves: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, str] = field(default_factory=dict)


def look(output: str, answer: Connection) -> None:
    """Sends a `Found`."""
    logging.disable()  # Libraries warn of what is not there, and of what a loader leaves behind that fails.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answer.send(_found(epath.Path(output)))


def _found(output: epath.Path) -> Found:
    if not output.exists():
        return Found()
    with ocp.CheckpointManager(output) as manager:
        finished = bool(manager.all_steps())
    # Whether or not Orbax takes it for finished: MaxText is told to load the items.
    for load in (_restore, ocp.StandardCheckpointer().restore):
        try:
            leaves = load(output / "0" / "items")
        except Exception:  # Orbax has many for what is no checkpoint.
            continue
        return Found(finished, {path: digest(leaf) for path, leaf in _flat(leaves).items()}, _summary(output))
    return Found(finished)


def _summary(output: epath.Path) -> dict[str, str]:
    file = output / "slicecast-summary.json"
    try:
        return {path: leaf["digest"] for path, leaf in json.loads(file.read_text())["leaves"].items()}
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _restore(items: epath.Path) -> Any:
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(items).item_metadata.tree
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return checkpointer.restore(items, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def digest(leaf: np.ndarray) -> str:
    """Stands for dtype, shape and bits of an array."""
    return hashlib.sha256(
        repr((str(leaf.dtype), leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes()
    ).hexdigest()


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {path: leaf for key, child in tree.items() for path, leaf in _flat(child, f"{prefix}/{key}").items()}


def decoded(source: Path, *, scanned: bool) -> dict[str, str]:
    """The digests of some leaves, decoded from a Kimi-K2.6 without the program: embedding and experts."""
    tensors = _tensors(source)
    config = json.loads((source / "config.json").read_text())["text_config"]
    first, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    prefix = "language_model.model"
    found = {"/params/params/token_embedder/embedding": tensors[f"{prefix}.embed_tokens.weight"]}
    for ours, theirs in (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")):
        of_layers = [
            np.stack(
                [
                    _int4(tensors, f"{prefix}.layers.{layer}.mlp.experts.{expert}.{theirs}").T
                    for expert in range(config["n_routed_experts"])
                ]
            )
            for layer in range(first, layers)
        ]
        if scanned:
            found[f"/params/params/decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/{ours}"] = np.stack(of_layers, 1)
        else:
            for number, values in enumerate(of_layers):
                path = f"/params/params/decoder/moe_layers_{number}/DeepSeekMoeBlock_0/MoeBlock_0/{ours}"
                found[path] = values
    return {path: digest(values) for path, values in found.items()}


def _int4(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Eight codes in a word, from the lowest bits on, each 8 more than it means; a scale for each 32 of them."""
    words, scales = tensors[f"{name}.weight_packed"].view(np.uint32), tensors[f"{name}.weight_scale"]
    codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(len(words), -1)
    values = (codes.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), 32, axis=1)
    return values.astype(ml_dtypes.bfloat16)


def _tensors(source: Path) -> dict[str, np.ndarray]:
    dtypes = {"BF16": np.dtype(ml_dtypes.bfloat16), "I32": np.dtype(np.int32), "F32": np.dtype(np.float32)}
    found = {}
    for file in source.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__" and entry["dtype"] in dtypes:
                start, stop = entry["data_offsets"]
                data = np.frombuffer(content[8 + length + start : 8 + length + stop], dtypes[entry["dtype"]])
                found[name] = data.reshape(entry["shape"])
    return found
