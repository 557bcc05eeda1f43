"""Tensors that are made of rows of others, each stored in its own way, against a definition by row numbers."""

import bisect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import samples
import stored
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert.codecs import joined
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.source.directory import Directory
from slicecast.convert.verification import definition

Array = np.ndarray[Any, Any]
Takes = tuple[tuple[int, int, int], ...]

COLUMNS = 16
BLOCK = 8
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}

# How many rows each of the tensors has, by the way in which it is stored. FP8's last blocks are smaller.
ROWS = {"fp8": 20, "bf16": 12, "f32": 14, "more fp8": 28}
FORMATS = tuple(ROWS)

# Every new shape is compiled by XLA.
drawn = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Members:
    """A checkpoint with a tensor in each format.

    Attributes:
        directory: Where it is.
        values: What the tensors stand for, float32.
    """

    directory: Path
    values: tuple[Array, ...]

    def tensor(self, member: int) -> StoredTensor:
        """One of the tensors."""
        return stored.find(self.directory, f"{FORMATS[member]}.weight", (ROWS[FORMATS[member]], COLUMNS))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[str, Array]] = {}
    values = []
    for name, rows in ROWS.items():
        x = rng.standard_normal((rows, COLUMNS), np.float32)
        if "fp8" in name:
            codes = x.astype(ml_dtypes.float8_e4m3fn)
            scale = samples.random_scale(rng, (-(-rows // BLOCK), COLUMNS // BLOCK))
            tensors |= {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale_inv": ("F32", scale)}
            repeated = scale.repeat(BLOCK, axis=0)[:rows].repeat(BLOCK, axis=1)
            values.append(codes.astype(np.float32) * repeated)
        elif name == "bf16":
            tensors[f"{name}.weight"] = ("BF16", x.astype(ml_dtypes.bfloat16))
            values.append(x.astype(ml_dtypes.bfloat16).astype(np.float32))
        else:
            tensors[f"{name}.weight"] = ("F32", x)
            values.append(x)
    return Members(stored.write(tmp_path_factory.mktemp("members"), tensors, CONFIG), tuple(values))


def expected(values: list[Array], takes: Takes, groups: int) -> Array:
    """Row by row: which turn it is in, which take that row of the turn belongs to, and which row of the take it is."""
    shares = [(stop - start) // groups for _, start, stop in takes]
    ends = list(itertools.accumulate(shares))
    found = []
    for row in range(ends[-1] * groups):
        turn, place = divmod(row, ends[-1])
        take = bisect.bisect_right(ends, place)
        member, start, _ = takes[take]
        found.append(values[member][start + turn * shares[take] + place - (ends[take] - shares[take])])
    return np.stack(found)


def decoded(directory: Path, tensor: StoredTensor, dtype: str, *, transposed: bool) -> Array:
    """The tensor as the pipeline and the chips make it."""
    arrays = stored.prepare(directory, tensor, 0, tensor.shape[0])
    assert len(arrays) == len(tensor.codec.row_axes)
    assert sum(array.nbytes for array in arrays) <= tensor.prepared_bytes(tensor.shape[0])
    batch = [jnp.asarray(array)[jnp.newaxis] for array in arrays]
    return np.asarray(tensor.codec.decode(batch, dtype=dtype, transposed=transposed, implementation="xla")[0])


def check(
    members: Members, used: tuple[int, ...], takes: Takes, groups: int, transposed: tuple[bool, ...] = (False, True)
) -> None:
    """A joined tensor on both paths is what the definition says; `takes` counts the tensors that are used."""
    wanted = expected([members.values[member] for member in used], takes, groups)
    tensor = joined.stored("made", wanted.shape, [members.tensor(member) for member in used], takes, groups)
    directory = members.directory
    for dtype in (np.dtype(np.float32), stored.BF16):
        for turned in transposed:
            found = decoded(directory, tensor, dtype.name, transposed=turned)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.T if turned else found, wanted.astype(dtype))
    rows = len(wanted)
    for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 3 + 2)):
        found = definition.rows(Directory(str(directory)), tensor, start, stop)
        np.testing.assert_array_equal(found.astype(np.float32), wanted[start:stop])


def test_what_turns_are() -> None:
    """Of six rows of one tensor and three of another: in each of three turns two of the one, and one of the other."""
    first, second = np.arange(6)[:, np.newaxis], np.arange(10, 13)[:, np.newaxis]
    takes = ((0, 0, 6), (1, 0, 3))
    assert expected([first, second], takes, 3).ravel().tolist() == [0, 1, 10, 2, 3, 11, 4, 5, 12]
    assert expected([first, second], takes, 1).ravel().tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert expected([first], ((0, 3, 6), (0, 0, 3)), 3).ravel().tolist() == [3, 0, 4, 1, 5, 2]


def test_queries_keys_values_and_gates(members: Members) -> None:
    """As in Qwen 3.5: three ranges of one tensor and all of another, in turns by head."""
    check(members, (0, 1), ((0, 0, 4), (0, 4, 8), (0, 8, 20), (1, 0, 12)), 4)


@pytest.mark.parametrize("used", list(itertools.permutations(range(4), 2)))
def test_two_tensors_of_all_formats(members: Members, used: tuple[int, int]) -> None:
    check(members, used, ((0, 0, 12), (1, 0, 12), (0, 2, 8)), 6)


@drawn
@given(st.data())
def test_any_rows_of_any_tensors(members: Members, data: st.DataObject) -> None:
    used = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    groups = data.draw(st.integers(1, 4))
    takes = []
    for _ in range(data.draw(st.integers(1, 4))):
        member = data.draw(st.integers(0, len(used) - 1))
        rows = len(members.values[used[member]])
        length = groups * data.draw(st.integers(1, rows // groups))
        start = data.draw(st.integers(0, rows - length))
        takes.append((member, start, start + length))
    check(members, used, tuple(takes), groups, transposed=(False,))


def test_what_a_joined_tensor_says_of_itself(members: Members) -> None:
    parts = [members.tensor(0), members.tensor(1), members.tensor(3)]
    tensor = joined.stored("made", (60, COLUMNS), parts, ((0, 0, 20), (1, 0, 12), (2, 0, 28)), 1)
    assert tensor.codec.description == "float8_e4m3, blocks of 8 x 8 + bfloat16, joined"
    assert tensor.codec.kernel == "grouped"
    assert tensor.names == (
        "fp8.weight",
        "fp8.weight_scale_inv",
        "bf16.weight",
        "more fp8.weight",
        "more fp8.weight_scale_inv",
    )
    whole = sum(part.read_bytes(0, part.shape[0]) for part in parts)
    # All of the tensors is read and decoded, whichever rows are asked for, and no chip gets a part of it.
    assert tensor.read_bytes(3, 4) == tensor.read_bytes(0, 60) == whole
    assert set(tensor.codec.row_axes) == {None}
    for part, member in zip(parts, joined.member_tensors(tensor), strict=True):
        assert (member.shape, member.codec, member.names) == (part.shape, part.codec, part.names)
    only_plain = joined.stored("made", (12, COLUMNS), [members.tensor(1)], ((0, 0, 12),), 1)
    assert (only_plain.codec.description, only_plain.codec.kernel) == ("bfloat16, joined", None)


@pytest.mark.parametrize(
    ("shape", "takes", "groups", "words"),
    [
        ((21, COLUMNS), ((0, 0, 20),), 1, "do not make [21, 16]"),
        ((20, COLUMNS), ((0, 0, 20),), 3, "taken in 3 turns"),
        ((22, COLUMNS), ((0, 0, 22),), 1, "rows are taken that the tensors do not have"),
        ((12, COLUMNS), ((0, -6, 6),), 1, "rows are taken that the tensors do not have"),
        ((0, COLUMNS), ((0, 3, 3),), 1, "rows are taken that the tensors do not have"),
        ((20, COLUMNS + 1), ((0, 0, 20),), 1, "the tensors' rows are not those of [20, 17]"),
    ],
)
def test_rows_that_do_not_fit(members: Members, shape: tuple[int, ...], takes: Takes, groups: int, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        joined.stored("made", shape, [members.tensor(0)], takes, groups)
    assert str(caught.value).startswith("made: ")
    assert words in str(caught.value)
