"""Every format decodes what the format's own library decodes: the golden vectors, read as the converter reads them.

`tests/oracles` does the same with the libraries at hand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
from compare import bits, differing
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import BF16, EXACT, EXPERTS, LAYOUTS, NAMES, ROUNDED, Array, Spelling, Vector, load, spellings

# What rounding to float16 inside costs AutoAWQ and compressed-tensors: the last bit of some values.
MOST_ROUNDED_TWICE = 0.066

# The heights of the blocks of rows that are decoded with JAX, which compiles once for each; they start anywhere.
HEIGHTS = (1, 3, 8, 13)
EXAMPLES = 200

CASES = [
    pytest.param(name, spelling, id=f"{name}-{spelling.name}") for name in EXACT for spelling in spellings(load(name))
]
KERNEL_CASES = [case for case in CASES if case.values[1].kernel]
# Spellings of a vector differ in names; which rows are read differs where the experts of a layer are one tensor.
ROW_CASES = [case for i, case in enumerate(CASES) if case.values[0] != CASES[i - 1].values[0] or case.values[1].experts]


@dataclass(frozen=True)
class Checkpoint:
    """A vector's checkpoint on disk.

    Attributes:
        directory: Where it is.
        vector: What it stores.
        spelling: How.
    """

    directory: Path
    vector: Vector
    spelling: Spelling

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logical tensor."""
        return self.wanted.shape

    @property
    def wanted(self) -> Array:
        """The library's weight in the logical tensor's shape."""
        weight = np.concatenate([self.vector.expected] * self.spelling.copies)
        if not self.spelling.experts:
            return weight
        return weight.reshape(EXPERTS, -1, weight.shape[1]).swapaxes(1, 2)

    def decode(self, **options: Any) -> Array:
        """What the converter makes of it."""
        return stored.decode(self.directory, self.spelling.weight, self.shape, **options)

    def expected(self, rows: tuple[int, int] | None = None) -> Array:
        """What `verify` makes of it, float32."""
        return stored.expected(self.directory, self.spelling.weight, self.shape, rows=rows)


def written(name: str, spelling: Spelling, directory: Path) -> Checkpoint:
    """Writes the checkpoint that stores a vector."""
    stored.write(directory / "checkpoint", spelling.tensors, spelling.config, spelling.side_configs)
    return Checkpoint(directory / "checkpoint", load(name), spelling)


def zeros_have_signs(vector: Vector) -> bool:
    """Whether the library that made a vector keeps the sign of a zero."""
    return "sign of zero ignored" not in vector.meta["name"]


def test_all_vectors_are_there() -> None:
    assert len(NAMES) == 49
    assert len(ROUNDED) == 2
    assert {load(name).meta["layout"] for name in NAMES} == LAYOUTS.keys()


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_the_definition_equals_the_library(name: str, spelling: Spelling, tmp_path: Path) -> None:
    checkpoint = written(name, spelling, tmp_path)
    found = checkpoint.decode(implementation="xla")
    assert differing(found, checkpoint.wanted, zeros_have_signs=zeros_have_signs(checkpoint.vector)) == 0


@pytest.mark.parametrize(("name", "spelling"), KERNEL_CASES)
def test_the_kernel_equals_the_library(name: str, spelling: Spelling, tmp_path: Path) -> None:
    checkpoint = written(name, spelling, tmp_path)
    found = checkpoint.decode(implementation="pallas_tpu", transposed=True)
    assert (
        differing(found, checkpoint.wanted.swapaxes(-1, -2), zeros_have_signs=zeros_have_signs(checkpoint.vector)) == 0
    )


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_verify_expects_what_the_library_makes(name: str, spelling: Spelling, tmp_path: Path) -> None:
    checkpoint = written(name, spelling, tmp_path)
    expected = checkpoint.expected()
    assert expected.dtype == np.float32
    with np.errstate(over="ignore"):
        rounded = expected.astype(BF16)
    assert differing(rounded, checkpoint.wanted, zeros_have_signs=zeros_have_signs(checkpoint.vector)) == 0
    # Before the rounding the two paths agree as well.
    assert differing(checkpoint.decode(implementation="xla", dtype="float32"), expected) == 0


@pytest.mark.parametrize("name", ROUNDED)
def test_libraries_that_round_in_between_differ_in_the_last_bit(name: str, tmp_path: Path) -> None:
    vector = load(name)
    for spelling in spellings(vector):
        checkpoint = written(name, spelling, tmp_path / spelling.name)
        distance = np.abs(bits(checkpoint.decode(implementation="xla")).astype(int) - bits(checkpoint.wanted))
        assert distance.max() == 1
        assert np.count_nonzero(distance) <= MOST_ROUNDED_TWICE * distance.size


def test_awq_with_exact_arithmetic_is_the_same_weight() -> None:
    """The vector that AutoAWQ rounds twice, and the one with float32 scales, are two decodings of the same tensors."""
    (name,) = (name for name in ROUNDED if load(name).meta["layout"] == "AWQ")
    rounded, exact = load(name), load(name.replace("native_f16", "fed_scales_float"))
    assert exact.meta["exact"]
    assert rounded.tensors.keys() == exact.tensors.keys()
    assert all(np.array_equal(rounded.tensors[key], exact.tensors[key]) for key in exact.tensors)


# ---- Any rows


@st.composite
def row_ranges(draw: st.DrawFn, rows: int) -> tuple[int, int]:
    """A range of rows that starts anywhere and has one of a few heights."""
    height = draw(st.sampled_from([height for height in HEIGHTS if height <= rows]))
    start = draw(st.integers(0, rows - height))
    return start, start + height


@pytest.mark.parametrize(("name", "spelling"), ROW_CASES)
def test_any_rows_are_those_of_the_whole(
    name: str, spelling: Spelling, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = written(name, spelling, tmp_path_factory.mktemp("rows"))
    decoded, expected = checkpoint.decode(implementation="xla"), checkpoint.expected()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(row_ranges(checkpoint.shape[0]))
    def check(rows: tuple[int, int]) -> None:
        block = checkpoint.decode(rows=rows, implementation="xla")
        assert np.array_equal(bits(block), bits(decoded[slice(*rows)]))
        assert np.array_equal(bits(checkpoint.expected(rows)), bits(expected[slice(*rows)]))

    check()
