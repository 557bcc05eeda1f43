"""MaxText as an oracle: its own tree of a model, its two checkpoint readers, and its forward pass, on a CPU.

Trees are flat: a path like `decoder/layers/mlp/wo/kernel` to an array. Only this file knows MaxText.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maxtext_logits
import numpy as np
import orbax.checkpoint as ocp
from case import Case, Layout
from flax import nnx
from maxtext.common import checkpointing
from maxtext.utils import model_creation_utils

Tree = dict[str, np.ndarray]

# Float32 throughout, so that logits can be compared to the last few bits.
_FLOAT32 = {"dtype": "float32", "weight_dtype": "float32"}


def config(case: Case, layout: Layout, items: Path) -> Any:
    """Returns MaxText's config of a case whose checkpoint is at `items`."""
    scratch = items.parents[2]  # the case's folder: MaxText writes its logs and its compiled programs somewhere
    return maxtext_logits.initialize(
        {
            **_FLOAT32,
            **case.maxtext_settings(layout),
            "base_output_directory": scratch / "maxtext_output",
            "jax_cache_dir": scratch.parent / "jax_cache",
            "load_parameters_path": items,
        }
    )


def _weights(model: nnx.Module) -> nnx.State:
    """Returns a model's persistent variables, as MaxText's readers select them."""
    return nnx.state(model).filter(maxtext_logits.is_weight)


def _flat(state: nnx.State) -> dict[str, Any]:
    """Returns the values of a state by path."""
    return {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _arrays(state: nnx.State) -> Tree:
    """Returns the values of a concrete state by path, as numpy arrays."""
    return {path: np.asarray(value) for path, value in _flat(state).items()}


def abstract_shapes(settings: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every leaf that MaxText's model has."""
    _, model = model_creation_utils.create_nnx_abstract_model(settings)
    return {path: tuple(value.shape) for path, value in _flat(_weights(model)).items()}


def read_collections(items: Path) -> Tree:
    """Returns the arrays of a checkpoint as they are on disk, in their own dtypes, without MaxText.

    Paths begin with the collection, such as `params`.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {"params": checkpointer.metadata(items).item_metadata.tree["params"]}
        # As numpy arrays, for the devices that the checkpoint was written with are not here.
        to_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        collections = checkpointer.restore(items, item=tree, restore_args=to_numpy, transforms={})["params"]
    leaves = jax.tree_util.tree_leaves_with_path(collections)
    return {"/".join(str(key.key) for key in path): np.asarray(value) for path, value in leaves}


def read_disk(items: Path) -> Tree:
    """Returns the parameters as they are on disk: a checkpoint that MaxText's readers load has nothing else."""
    return {path.removeprefix("params/"): array for path, array in read_collections(items).items()}


def read_for_pretraining(settings: Any) -> Tree:
    """Returns the arrays as MaxText's trainer loads them."""
    _, model = model_creation_utils.create_nnx_abstract_model(settings)
    state = checkpointing.load_params_from_path(
        settings.load_parameters_path, _weights(model), settings.checkpoint_storage_concurrent_gb
    )
    return _arrays(state)


class Model:
    """A MaxText model with the weights that `from_pretrained` loads, the reader of SFT, RL and decoding.

    Attributes:
      weights: the loaded arrays by path.
    """

    def __init__(self, settings: Any) -> None:
        model, _ = model_creation_utils.from_pretrained(settings)
        self.weights = _arrays(_weights(model))
        self._graph, self._state = nnx.split(model)
        self._forward: Callable[..., jax.Array] = jax.jit(self._call)
        self._prediction: Callable[..., jax.Array] = jax.jit(self._call_for_prediction)

    def _call(self, state: nnx.State, ids: jax.Array, positions: jax.Array) -> jax.Array:
        model = nnx.merge(self._graph, state)
        segments = jnp.ones_like(ids)
        return model(ids, positions, segments, enable_dropout=False, model_mode="train")

    def _call_for_prediction(self, state: nnx.State, ids: jax.Array, positions: jax.Array) -> jax.Array:
        model = nnx.merge(self._graph, state)
        # As MaxText's input pipeline makes them: each token's target is the next one, and the last has none.
        targets = {
            "decoder_target_tokens": jnp.roll(ids, -1),
            "decoder_target_mask": jnp.ones_like(ids).at[:, -1].set(0),
        }
        segments = jnp.ones_like(ids)
        model(ids, positions, segments, enable_dropout=False, model_mode="train", **targets)
        return model.mtp_block.losses.get_value() / model.mtp_block.weights.get_value()

    def logits(self, ids: np.ndarray, positions: np.ndarray, changes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the logits, `[batch, tokens, vocab]` in float32, with `changes` in place of loaded leaves."""
        return np.asarray(self._forward(self._changed(changes), *_text(ids, positions)))

    def prediction_loss(self, ids: np.ndarray, positions: np.ndarray, changes: Mapping[str, np.ndarray]) -> float:
        """Returns the mean loss of the layer for multi-token prediction."""
        (loss,) = np.asarray(self._prediction(self._changed(changes), *_text(ids, positions)))
        return float(loss)

    def _changed(self, changes: Mapping[str, np.ndarray]) -> nnx.State:
        """Returns the model's variables with `changes` in place of loaded leaves."""
        state = jax.tree.map(lambda leaf: leaf, self._state)  # new variables: the loaded ones stay as they are
        flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
        for path, value in changes.items():
            # The same sharding, or the program would be compiled again.
            flat[path].set_value(jax.device_put(value, flat[path].get_value().sharding))
        return state


def _text(ids: np.ndarray, positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns a text as MaxText takes it."""
    return jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32)
