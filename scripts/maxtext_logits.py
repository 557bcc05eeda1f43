"""Computes the logits of a converted checkpoint with MaxText on a CPU, for verify_logits.py, which starts it.

    python maxtext_logits.py REQUEST.json IDS.npz LOGITS.npz

Needs MaxText, and nothing else. The request is a JSON object of MaxText's settings. The ids are `ids_N` of each prompt,
the result `logits_N`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils

_BASE_CONFIG = Path(maxtext.__file__).parent / "configs" / "base.yml"

# The plain implementations: the definition of the model, and the ones that take any size.
SETTINGS: Mapping[str, object] = {
    "attention": "dot_product",
    "enable_checkpointing": "false",
    "hardware": "cpu",
    "matmul_precision": "highest",
    "megablox": "false",
    "override_model_config": "true",
    "per_device_batch_size": 1,
    "skip_jax_distributed_system": "true",
    "sparse_matmul": "false",
}

# What a model holds beside what a checkpoint does, as MaxText's readers tell them apart.
_TRANSIENT = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.BatchStat)


def initialize(settings: Mapping[str, object]) -> Any:
    """MaxText's config with these settings on top of `SETTINGS`."""
    words = [f"{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    return pyconfig.initialize(["", str(_BASE_CONFIG), *words])


def is_weight(path: object, variable: object) -> bool:
    """Whether a variable of a model is one that checkpoints hold."""
    return not isinstance(variable, _TRANSIENT)


class Model:
    """MaxText's model, with the weights that its trainer loads from `load_parameters_path`.

    The model is never initialized, for that would need the memory of its weights once more.
    """

    def __init__(self, config: Any) -> None:
        create, abstract = model_creation_utils.create_nnx_abstract_model(config)
        graph, weights, _ = nnx.split(abstract, is_weight, ...)
        self._weights = checkpointing.load_params_from_path(
            config.load_parameters_path, weights, config.checkpoint_storage_concurrent_gb
        )

        def initial_others() -> nnx.State:
            _, _, others = nnx.split(create(), is_weight, ...)
            return others

        # Compiled, for then the initial weights, which nothing uses, are not computed.
        self._others = jax.jit(initial_others)()

        def forward(weights: nnx.State, others: nnx.State, ids: jax.Array, segments: jax.Array) -> jax.Array:
            model = nnx.merge(graph, weights, others)
            positions = jnp.arange(ids.shape[1])[None]
            return model(ids, positions, segments, enable_dropout=False, model_mode="train")

        self._forward: Callable[..., jax.Array] = jax.jit(forward)

    def logits(self, ids: np.ndarray, length: int) -> np.ndarray:
        """The logits of one prompt, `[tokens, vocabulary]` in float32, computed with padding up to `length`."""
        padding = (0, length - len(ids))
        padded = jnp.asarray(np.pad(ids, padding)[None], jnp.int32)
        segments = jnp.asarray(np.pad(np.ones(len(ids)), padding)[None], jnp.int32)
        return np.asarray(self._forward(self._weights, self._others, padded, segments)[0, : len(ids)], np.float32)


def main(request_file: str, ids_file: str, result_file: str) -> None:
    """Answers one request."""
    settings = json.loads(Path(request_file).read_text())
    with np.load(ids_file) as file:
        prompts = [file[f"ids_{number}"] for number in range(sum(name.startswith("ids_") for name in file))]
    # One length for all, so that the model is compiled once.
    length = max(map(len, prompts))
    model = Model(initialize({"max_target_length": length, **settings}))
    np.savez(result_file, **{f"logits_{number}": model.logits(ids, length) for number, ids in enumerate(prompts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
