"""Mistakes that a converter can make without changing the shape of a leaf, as changed leaves of an unscanned model.

Some are tried on every leaf: each of its axes in another order, a norm or a bias left out. The others are mistakes that
the names and shapes of a family invite.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from case import Case

Tree = dict[str, np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]

# DeepSeek-V4's hyper-connections have a norm without weights, which MaxText's model has as ones.
_CONSTANT = "mhc_norm/scale"

# The leaf, and its axis, whose order has no meaning: the experts of a token.
_UNORDERED = ("tid2eid", 1)


@dataclass(frozen=True)
class Leaves:
    """The leaves of a model.

    Attributes:
      case: the model.
      weights: its leaves by path.
    """

    case: Case
    weights: Mapping[str, np.ndarray]

    def ending(self, *suffixes: str) -> Tree:
        """Returns the leaves whose path ends in one of these."""
        return {path: leaf for path, leaf in self.weights.items() if path.endswith(suffixes)}


def mistakes(case: Case, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tree]]:
    """Yields mistakes by name, each as the leaves that it changes."""
    yield from _mistakes_of_any_leaf(weights)
    leaves = Leaves(case, weights)
    yield "gate and up exchanged", _exchanged(leaves, "wi_0", "wi_1")
    yield from _mistakes_of_attention(leaves)
    if case.architecture == "gpt_oss":
        yield from _mistakes_of_gpt_oss(leaves)
    if "linear_key_head_dim" in case.config:
        yield from _mistakes_of_delta_nets(leaves)
    if case.architecture == "deepseek_v32":
        yield from _mistakes_of_deepseek_v3_2(leaves)
    if case.architecture == "deepseek_v4":
        yield from _mistakes_of_deepseek_v4(leaves)


def exchanged_layers(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tree]]:
    """Yields the mistakes that only a scanned model allows: layers in another order, on each axis of layers."""
    for axis in (1, 2):
        tree = {}
        for path, leaf in weights.items():
            # The last projection of an MLP, or of each of its experts.
            unstacked = 2 if path.endswith("wo/kernel") else 3 if path.endswith("/wo") else leaf.ndim
            if axis <= leaf.ndim - unstacked and leaf.shape[axis] > 1:
                tree[path] = np.roll(leaf, 1, axis)
        if tree:
            yield f"layers on axis {axis} rolled", tree


def _mistakes_of_any_leaf(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tree]]:
    """Yields what can go wrong with a leaf of any meaning, in all layers at once."""
    for kind, tree in _kinds(weights).items():
        if not kind.endswith(_CONSTANT):
            yield from _mistakes_of_kind(kind, tree)


def _mistakes_of_kind(kind: str, tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Yields the mistakes with the leaves of one kind."""
    first = next(iter(tree.values()))
    for axis in range(first.ndim):
        if first.shape[axis] > 1 and not (kind.endswith(_UNORDERED[0]) and axis == _UNORDERED[1]):
            yield f"{kind}: axis {axis} rolled", _changed(tree, lambda leaf, axis=axis: np.roll(leaf, 1, axis))
    if first.ndim == 1:
        is_norm = kind.endswith("scale")
        yield f"{kind}: missed", _changed(tree, np.ones_like if is_norm else np.zeros_like)
        if is_norm:
            yield f"{kind}: one added", _changed(tree, lambda leaf: leaf + 1)
    paths = list(tree)
    if len(paths) > 1:
        others = [*paths[1:], paths[0]]
        rolled = {path: tree[other] for path, other in zip(paths, others, strict=True)}
        yield f"{kind}: layers rolled", {path: leaf for path, leaf in rolled.items() if leaf.shape == tree[path].shape}


def _mistakes_of_attention(leaves: Leaves) -> Iterator[tuple[str, Tree]]:
    """Yields wrong orders of the rotated columns, and wrong scales of the query."""
    config = leaves.case.config
    if "qk_rope_head_dim" in config:
        columns = slice(-config["qk_rope_head_dim"], None)
        queries, keys = ("self_attention/wq_b/kernel", "query/kernel"), ("wkv_a/kernel", "wkv/kernel")
    else:
        share = config.get("partial_rotary_factor")
        columns = slice(int(config["head_dim"] * share) if share else None)
        queries, keys = ("query/kernel",), ("key/kernel",)
    # MaxText rotates interleaved pairs for DeepSeek, Llama 3.1 and Llama 4, and halves for all others.
    order = _halves if leaves.case.model_name.startswith(("deepseek", "kimi", "llama3.1", "llama4")) else _pairs
    rotated = leaves.ending(*queries, *keys)
    yield "RoPE order", _changed(rotated, lambda leaf: _reordered(leaf, columns, order))
    normalized = config.get("use_qk_norm", False) or leaves.case.architecture == "deepseek_v4"
    if not normalized and not leaves.ending("query_norm/scale"):
        yield "query scaled again", _changed(leaves.ending(*queries), lambda leaf: leaf * leaf.shape[-1] ** -0.5)
        yield "query not scaled", _changed(leaves.ending(*queries), lambda leaf: leaf * leaf.shape[-1] ** 0.5)


def _mistakes_of_gpt_oss(leaves: Leaves) -> Iterator[tuple[str, Tree]]:
    """Yields the gate and up projections cut into halves, which are stored in turns."""
    for part in ("", "_bias"):
        halves = {}
        for path, gate in leaves.ending(f"wi_0{part}").items():
            other = path.replace("wi_0", "wi_1")
            together = np.stack([gate, leaves.weights[other]], -1).reshape(*gate.shape[:-1], -1)
            halves[path], halves[other] = np.split(together, 2, -1)
        yield f"gate_up{part} cut into halves", halves


def _mistakes_of_delta_nets(leaves: Leaves) -> Iterator[tuple[str, Tree]]:
    """Yields wrong orders of what Qwen's linear attention has in one leaf, together for each head of the keys."""
    config = leaves.case.config
    heads, keys = config["linear_num_key_heads"], config["linear_key_head_dim"]
    ratio = config["linear_num_value_heads"] // heads
    values = ratio * config["linear_value_head_dim"]
    ends = np.cumsum([keys, keys, values])

    def reordered(order: tuple[int, ...]) -> Change:
        def change(leaf: np.ndarray) -> np.ndarray:
            parts = np.split(leaf.reshape(len(leaf), heads, -1), ends, -1)
            return np.concatenate([parts[part] for part in order], -1).reshape(leaf.shape)

        return change

    def by_part(leaf: np.ndarray) -> np.ndarray:
        parts = np.split(leaf.reshape(len(leaf), heads, -1), ends, -1)
        return np.concatenate([part.reshape(len(leaf), -1) for part in parts], -1)

    joined = leaves.ending("in_proj_qkvz/kernel")
    yield "query and key exchanged", _changed(joined, reordered((1, 0, 2, 3)))
    yield "value and z exchanged", _changed(joined, reordered((0, 1, 3, 2)))
    yield "not together for each head", _changed(joined, by_part)
    flipped = leaves.ending("in_proj_ba/kernel")
    yield "b and a exchanged", _changed(flipped, lambda leaf: leaf.reshape(len(leaf), heads, 2, -1)[:, :, ::-1])
    gated = leaves.ending("query/kernel")
    yield "query and its gate exchanged", _changed(gated, lambda leaf: np.roll(leaf, leaf.shape[-1] // 2, -1))


def _mistakes_of_deepseek_v3_2(leaves: Leaves) -> Iterator[tuple[str, Tree]]:
    """Yields the wrong order of the rotated columns in the indexer, where it is another one than in the attention."""
    names = ("wq_b/kernel", "wk/kernel", "k_norm/scale", "k_norm/bias")
    rotated, columns = (
        leaves.ending(*(f"indexer/{name}" for name in names)),
        slice(leaves.case.config["qk_rope_head_dim"]),
    )
    yield "RoPE order of the indexer", _changed(rotated, lambda leaf: _reordered(leaf, columns, _pairs))


def _mistakes_of_deepseek_v4(leaves: Leaves) -> Iterator[tuple[str, Tree]]:
    """Yields parts of hyper-connections and of compressors taken for one another."""
    copies = leaves.case.config["hc_mult"]
    for part in ("alpha", "beta", "alpha_scale"):
        yield f"pre_{part} and post_{part} exchanged", _exchanged(leaves, f"pre_{part}", f"post_{part}")
    mixing = leaves.ending("res_beta", "res_alpha")
    yield "mixing transposed", _changed(mixing, lambda leaf: leaf.reshape(-1, copies, copies).swapaxes(1, 2))
    for part in ("kv_proj", "gate_proj"):
        windows = leaves.ending(f"csa_compressor/{part}/kernel", f"indexer/{part}/kernel")
        yield f"windows of {part} exchanged", _changed(windows, lambda leaf: np.roll(leaf, leaf.shape[-1] // 2, -1))


def _kinds(weights: Mapping[str, np.ndarray]) -> dict[str, Tree]:
    """Returns paths without the numbers of layers, each with its leaves in the order of the layers."""
    number = re.compile(r"(?<=layers_)\d+")
    kinds: dict[str, Tree] = {}
    for path in sorted(weights, key=lambda path: [int(layer) for layer in number.findall(path)]):
        kinds.setdefault(number.sub("N", path), {})[path] = weights[path]
    return kinds


def _changed(tree: Tree, change: Change) -> Tree:
    """Returns the leaves after a change, which may forget their shape."""
    return {path: change(leaf).reshape(leaf.shape) for path, leaf in tree.items()}


def _exchanged(leaves: Leaves, one: str, other: str) -> Tree:
    """Returns all leaves that have one of two names in their path with the values of their counterparts."""
    result = {}
    for path, leaf in leaves.weights.items():
        counterpart = re.sub(rf"\b{one}\b", other, path)
        if counterpart != path:
            result |= {counterpart: leaf, path: leaves.weights[counterpart]}
    return result


def _halves(size: int) -> np.ndarray:
    """Returns the order that makes halves of interleaved pairs."""
    return np.arange(size).reshape(-1, 2).T.ravel()


def _pairs(size: int) -> np.ndarray:
    """Returns the order that makes interleaved pairs of halves."""
    return np.argsort(_halves(size))


def _reordered(leaf: np.ndarray, columns: slice, order: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns a leaf with some of its last axis in another order."""
    result = leaf.copy()
    result[..., columns] = leaf[..., columns][..., order(leaf[..., columns].shape[-1])]
    return result
