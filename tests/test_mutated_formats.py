"""Thousands of checkpoints in every format with changed headers and announcements.

Each has values on which the codec and the definition agree, or is refused with an error of ours that names the file and
the tensor.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import stored
from headers import infos
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import FLOATS, QUANTIZED, SAMPLES, Array, Sample

from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.errors import MissingTensorError, SlicecastError
from slicecast.convert.source.safetensors_header import DTYPE_BITS

EXAMPLES = 2000

ABSURD = [0, 1, -1, -7, 3, 5, 7, 16, 33, 48, 64, 128, 2**31, 10**100, 0.5, 32.0, True, False, None, "", "4", "NaN"]
ABSURD += [[], [0, 0], [-1, 16], [16], [16, 16, 16], [[16, 16]], ["16", "16"], [1.5, 2], [2**40, 2**40], {}, {"a": 1}]

# Names that parts have in some format, so that a renamed or surplus part is taken for another one.
SUFFIXES = sorted({part.removeprefix("m.") for sample in SAMPLES.values() for part in sample.tensors})
DTYPES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits != 6)


@dataclass(frozen=True)
class Mutation:
    """One change of a checkpoint.

    Attributes:
        kind: What is done.
        part: The index of the part it is done to, or of the announced value; modulo how many there are.
        name: The name of the renamed or surplus part.
        dtype: The new dtype.
        shape: How the shape is changed.
        value: The value that is announced instead.
    """

    kind: str
    part: int
    name: str
    dtype: str
    shape: str
    value: Any


SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "transposed": lambda shape: shape[::-1],
    "one more row": lambda shape: (shape[0] + 1, *shape[1:]) if shape else (2,),
    "one less row": lambda shape: (max(shape[0] - 1, 0), *shape[1:]) if shape else (0,),
    "one more column": lambda shape: (*shape[:-1], shape[-1] + 1) if shape else (1, 1),
    "one less column": lambda shape: (*shape[:-1], max(shape[-1] - 1, 0)) if shape else (0, 1),
    "twice": lambda shape: (*shape[:-1], 2 * shape[-1]) if shape else (2,),
    "half": lambda shape: (*shape[:-1], shape[-1] // 2) if shape else (),
    "flat": lambda shape: (int(np.prod(shape)),),
    "another axis": lambda shape: (*shape, 1),
    "another first axis": lambda shape: (1, *shape),
    "no axis": lambda shape: (),
    "no rows": lambda shape: (0, *shape[1:]),
    "no columns": lambda shape: (*shape[:-1], 0),
    "one": lambda shape: tuple(1 for _ in shape),
    "a row": lambda shape: (samples.OUT, 1),
    "groups of 16": lambda shape: (samples.OUT, samples.COLUMNS // 16),
}

MUTATIONS = st.builds(
    Mutation,
    st.sampled_from(["drop", "rename", "reshape", "dtype", "dtype and shape", "add", "announce", "announce"]),
    st.integers(0, 11),
    st.sampled_from(SUFFIXES),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(ABSURD),
)


def contents(dtype: str, shape: tuple[int, ...], seed: int) -> Array:
    """Random contents: all kinds of floats but subnormal ones; and for the same reason all bytes but zero."""
    rng = np.random.default_rng(seed)
    if dtype in FLOATS:
        usual = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, -0.37, 0.0123, 300, 6e4]).astype(FLOATS[dtype])
        return rng.choice(usual, shape)
    size = DTYPE_BITS[dtype] // 8
    if dtype == "F4":  # Has two elements a byte, and so no single one.
        size, shape = 1, shape or (1,)
    return rng.integers(1, 256, (*shape, size), np.uint8).view(f"V{size}").reshape(shape)


def announced_values(config: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a config, those of sections too."""
    if not isinstance(config, Mapping):
        return [path]
    inner = [found for key, value in config.items() for found in announced_values(value, (*path, key))]
    return ([path] if path else []) + inner


def announce(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The config with another value there."""
    return {**config, path[0]: announce(config[path[0]], path[1:], value)} if path else value


def mutated(sample: Sample, mutation: Mutation, seed: int) -> Sample:
    """The sample after a mutation."""
    if mutation.kind == "announce":
        paths = announced_values(sample.config)
        return (
            replace(sample, config=announce(sample.config, paths[mutation.part % len(paths)], mutation.value))
            if paths
            else sample
        )
    tensors = dict(sample.tensors)
    name = f"m.{mutation.name}"
    if mutation.kind == "add":
        tensors[name] = mutation.dtype, contents(mutation.dtype, SHAPES[mutation.shape]((samples.OUT, 2)), seed)
        return replace(sample, tensors=tensors)
    if not tensors:
        return sample
    part = list(tensors)[mutation.part % len(tensors)]
    dtype, array = tensors.pop(part)
    if mutation.kind == "rename":
        tensors[name] = dtype, array
    if mutation.kind in ("reshape", "dtype", "dtype and shape"):
        dtype = dtype if mutation.kind == "reshape" else mutation.dtype
        shape = array.shape if mutation.kind == "dtype" else SHAPES[mutation.shape](array.shape)
        tensors[part] = dtype, contents(dtype, shape, seed)
    return replace(sample, tensors=tensors)


def assert_names_the_tensor(error: SlicecastError) -> None:
    """Checks that an error names the tensor that it is about, and its file if it has one."""
    message = str(error)
    assert "tensor 'm." in message or "tensors 'm." in message, message
    if not isinstance(error, MissingTensorError) and "in no file of the checkpoint under this name" not in message:
        assert re.match(r"[\w.]+\.safetensors: ", message), message


def check_defined(directory: Path, sample: Sample) -> str:
    """Checks that a checkpoint has values on which both paths agree, or is refused by name; returns which."""
    sample.write(directory)
    try:
        found = stored.decode(directory, sample.name, sample.shape, dtype="float32")
    except SlicecastError as error:
        assert_names_the_tensor(error)
        return type(error).__name__
    samples.assert_same(found, stored.expected(directory, sample.name, sample.shape).astype(np.float32))
    return "decoded"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are written, one over the other."""
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_announced_value(directory: Path, name: str) -> None:
    """Each value of an announcement, and each of its sections, is replaced with everything that makes no sense."""
    sample = SAMPLES[name]
    stored_parts = infos(sample)
    usual = detect.find(sample.name, sample.shape, stored_parts, quantization_config.read(sample.config))
    paths = announced_values(sample.config)
    assert len(paths) >= 3
    for path, value in itertools.product(paths, ABSURD):
        changed = replace(sample, config=announce(sample.config, path, value))
        try:
            found = detect.find(sample.name, sample.shape, stored_parts, quantization_config.read(changed.config))
        except SlicecastError as error:
            assert_names_the_tensor(error)
        else:
            if found != usual:  # Then it has other values, but the same on both paths.
                assert check_defined(directory, changed) == "decoded"


def test_mutations(directory: Path) -> None:
    """Thousands of changed checkpoints; they reach every outcome often, for those that end alike would test little."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(QUANTIZED)), st.lists(MUTATIONS, min_size=1, max_size=3))
    def check(name: str, mutations: list[Mutation]) -> None:
        sample = SAMPLES[name]
        for seed, mutation in enumerate(mutations):
            sample = mutated(sample, mutation, seed)
        outcomes[check_defined(directory, sample)] += 1

    check()
    assert outcomes.total() >= EXAMPLES
    for outcome in ("decoded", "MissingPartnerError", "MissingTensorError", "ShapeError", "UnsupportedFormatError"):
        assert outcomes[outcome] > EXAMPLES // 50, outcomes
