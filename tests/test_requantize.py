"""Quantizing a result again: what training for INT4 leaves is found again, and nothing else is taken for it."""

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert import commands, orbax_checkpoint
from slicecast.convert.memory import GB, Machine
from slicecast.convert.verification import requantize, strengths

Array = npt.NDArray[Any]
RunSlicecast = Callable[..., subprocess.CompletedProcess[str]]

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP = 32


def trained(rng: np.random.Generator, groups: int, scale_dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Codes from -7 to 7, one of each group at the end of the range, and scales."""
    codes = rng.integers(-7, 8, (groups, GROUP)).astype(np.int8)
    codes[np.arange(groups), rng.integers(0, GROUP, groups)] = rng.choice((-7, 7), groups)
    return codes, (rng.uniform(1, 2, groups) * 2.0 ** rng.integers(-12, -3, groups)).astype(scale_dtype)


def product(codes: Array, scale: Array, dtype: npt.DTypeLike) -> Array:
    values: Array = (codes.astype(np.float32) * scale.astype(np.float32)[:, None]).astype(dtype)
    return values


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([BF16, np.dtype(np.float16), np.dtype(np.float32)]))
def test_float32_results_give_codes_and_scales_back(seed: int, scale_dtype: np.dtype) -> None:
    codes, scale = trained(np.random.default_rng(seed), 100, scale_dtype)
    # A product of a code and a float32 scale is rounded; of the 16-bit scales it is exact.
    found_codes, found_scale = requantize.quantize(product(codes, scale, np.float32), scale_dtype)
    assert np.array_equal(found_codes, codes)
    if scale_dtype.itemsize == 2:
        assert found_scale.tobytes() == scale.tobytes()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_bfloat16_results_give_codes_back_and_scales_up_to_equal_values(seed: int) -> None:
    codes, scale = trained(np.random.default_rng(seed), 100, BF16)
    values = product(codes, scale, BF16)
    found_codes, found_scale = requantize.quantize(values, BF16)
    assert np.array_equal(found_codes, codes)
    other = found_scale != scale
    assert np.array_equal(product(codes, found_scale, BF16), values)
    # Only a group without 1, 2 or 4, of which the product is the scale itself, leaves a choice.
    exact = (np.isin(np.abs(codes), (1, 2, 4))).any(axis=1)
    assert not (other & exact).any()


def test_every_bfloat16_scale_whose_seventh_rounds_away() -> None:
    """The largest value over 7 alone misses scales; their neighbors are tried. All 128 significands of a scale."""
    scale = (np.arange(128, 256) / 256).astype(BF16)
    codes = np.tile(np.array([7, -1, 2, 0], np.int8), (128, 1))
    values = product(codes, scale, BF16)
    alone = (values.astype(np.float64).max(axis=1) / 7).astype(BF16)
    assert (alone != scale).any(), "the neighbors would not be needed"
    found_codes, found_scale = requantize.quantize(values, BF16)
    assert np.array_equal(found_codes, codes)
    assert found_scale.tobytes() == scale.tobytes()


def test_two_scales_that_give_the_same_values() -> None:
    codes = np.array([[7, -7, 0, 0]], np.int8)
    by_values: dict[bytes, list[float]] = {}
    for significand in range(128, 256):
        scale = np.array([significand / 256]).astype(BF16)
        by_values.setdefault(product(codes, scale, BF16).tobytes(), []).append(float(scale[0]))
    pair = next(scales for scales in by_values.values() if len(scales) > 1)
    _, found = requantize.quantize(product(codes, np.array(pair[:1]).astype(BF16), BF16), BF16)
    assert float(found[0]) in pair


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_groups_of_zeros(dtype: np.dtype) -> None:
    codes, scale = requantize.quantize(np.zeros((2, GROUP), dtype), BF16)
    assert not codes.any()
    assert not scale.astype(np.float32).any()


def test_codes_beyond_the_range_are_not_found_again() -> None:
    """-8 belongs to the format, but not to a quantizer that divides by 7."""
    codes = np.array([[-8, 3, 1, 5]], np.int8)
    found, _ = requantize.quantize(product(codes, np.array([0.5]).astype(BF16), np.float32), BF16)
    assert not np.array_equal(found, codes)


# ---- Whole checkpoints


@pytest.fixture(scope="module")
def converted(module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    module_slicecast.run("convert", f"--hf_model_path={kimi}", f"--base_output_directory={out}", "--host_memory_gb=1")
    return out


def requantized(out: Path, source: Path) -> requantize.Requantized:
    settings_of_run = strengths.settings_of(out, str(source))
    plan = commands.make_plan(settings_of_run, Machine(1, 1, GB, None))
    return requantize.compare(plan, orbax_checkpoint.open_arrays(out), 2)


def test_a_release_trained_for_int4_is_a_fixed_point(run_slicecast: RunSlicecast, converted: Path, kimi: Path) -> None:
    done = run_slicecast("verify", converted, f"--hf_model_path={kimi}", "--requantize")
    # 2 layers of 8 experts with 3 projections of [128, 256], in groups of 32.
    groups = 2 * 8 * 3 * 128 * 256 // 32
    assert f"3 INT4 leaves, {groups} groups: quantized again, they give the source's codes and scales" in done.stdout


@pytest.mark.parametrize("flags", [("--scan_layers=false",), ("--save_dtype=float32",)], ids=str)
def test_other_layouts_and_dtypes(run_slicecast: RunSlicecast, kimi: Path, tmp_path: Path, flags: tuple[str]) -> None:
    source, out = f"--hf_model_path={kimi}", tmp_path / "out"
    run_slicecast("convert", source, f"--base_output_directory={out}", "--host_memory_gb=1", *flags)
    assert "INT4 leaves" in run_slicecast("verify", out, source, "--requantize").stdout


def test_codes_and_scales_of_another_source_differ(
    converted: Path, make_checkpoint: Callable[..., Path], kimi: Path
) -> None:
    assert requantized(converted, kimi).differences == ()
    found = requantized(converted, make_checkpoint(seed=1))
    assert len(found.differences) == found.leaves == 3
    for difference in found.differences:
        assert "no fixed point" in difference.detail


def test_one_wrong_value_is_found(converted: Path, kimi: Path) -> None:
    """A single value that is a code off, in any leaf; the sentence says where it is in the source."""
    plan = commands.make_plan(strengths.settings_of(converted, str(kimi)), Machine(1, 1, GB, None))
    arrays = dict(orbax_checkpoint.open_arrays(converted))
    path = next(path for path in arrays if path.endswith("MoeBlock_0/wo"))
    values = arrays[path].read().result()
    position = next(
        index
        for index in itertools.product(*map(range, values.shape))
        if values[index] != 0 and abs(float(values[index])) < 0.01
    )
    values[position] = -values[position]

    class Changed:
        def __getitem__(self, index: Any) -> Any:
            part = values[index]
            return type("Read", (), {"read": lambda self: type("Done", (), {"result": lambda self: part})()})()

    arrays[path] = Changed()
    (difference,) = requantize.compare(plan, arrays, 1).differences
    assert difference.path == path
    assert "down_proj" in difference.detail


def test_codes_that_no_training_left(
    run_slicecast: RunSlicecast, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A source whose codes use the whole range converts and verifies, but it is no fixed point, and that is said."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(make_checkpoint(files=1, seed=3), source)
    (file,) = source.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin = data.index(b'experts.0.down_proj.weight_packed"')
    offsets = data.index(b'"data_offsets":[', begin) + len(b'"data_offsets":[')
    first = int(data[offsets : data.index(b",", offsets)])
    # Codes are stored plus 8: sixteen bytes of zeros are a group of -8.
    data[8 + header + first : 8 + header + first + 16] = bytes(16)
    file.write_bytes(data)
    run_slicecast("convert", f"--hf_model_path={source}", f"--base_output_directory={out}", "--host_memory_gb=1")
    run_slicecast("verify", out, f"--hf_model_path={source}")
    done = run_slicecast("verify", out, f"--hf_model_path={source}", "--requantize", check=False)
    assert done.returncode == 1
    for word in ("VerificationError", "down_proj", "its largest code is 8", "not trained"):
        assert word in done.stderr


def test_nothing_to_quantize_again(run_slicecast: RunSlicecast, llama: Path, tmp_path: Path) -> None:
    source, out = f"--hf_model_path={llama}", tmp_path / "out"
    run_slicecast("convert", source, f"--base_output_directory={out}", "--host_memory_gb=1")
    done = run_slicecast("verify", out, source, "--requantize", check=False)
    assert (done.returncode, "UsageError" in done.stderr) == (2, True)
