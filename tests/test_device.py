"""The device step over eight simulated devices: the same bits as on one, and as NumPy's.

JAX fixes its number of devices when it starts, so everything here runs in one child process that has eight.
"""

import functools
import itertools
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import samples
import stored as checkpoints
import tiny_models
from jax.sharding import Mesh

from slicecast.convert import device
from slicecast.convert.box import Box, Shape
from slicecast.convert.codecs import detect
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.device import DeviceRunner, Step
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import InterleaveHalves, Offset, Op, Scale, Slice, Split, Stride, Transpose
from slicecast.convert.mapping.rules import ModelOptions
from slicecast.convert.memory import chips_used
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.convert.verification import against_source, definition

Array = npt.NDArray[Any]

DEVICES = 8
INT4 = QuantizationConfig("compressed-tensors", "compressed-tensors pack-quantized", bits=frozenset((4,)))

# The ways in which the families' chains of ops use the device step, each with the source, and the target axis that
# follows its rows.
ROTARY = InterleaveHalves()
LAST_ROWS = Slice(0, 8, 32)
CHAINS: dict[str, tuple[tuple[Op, ...], Shape, int]] = {
    "copy 1d": ((), (24,), 0),
    "copy": ((), (24, 10), 0),
    "copy 3d": ((), (24, 4, 5), 0),
    "heads": ((Split(0, (4, 6)),), (24,), 0),
    "odd 2d": ((Stride(1, 1, 2),), (24, 10), 0),
    "odd 3d": ((Stride(2, 1, 2),), (24, 3, 10), 0),
    "transpose": ((Transpose(),), (24, 16), 1),
    "split out": ((Transpose(), Split(1, (4, 6))), (24, 16), 1),
    "split in": ((Transpose(), Split(0, (4, 6))), (16, 24), 2),
    "scale": ((Transpose(), Split(1, (4, 6)), Scale(6**-0.5)), (24, 16), 1),
    "rotary": ((Transpose(), Split(1, (4, 6)), ROTARY), (24, 16), 1),
    "rotary scale": ((Transpose(), Split(1, (4, 6)), ROTARY, Scale(6**-0.5)), (24, 16), 1),
    "offset": ((Offset(1.0),), (24,), 0),
    "heads turned": ((Split(0, (4, 6)), Transpose((0, 2, 1))), (24, 10), 0),
    "experts turned": ((Transpose((0, 2, 1)),), (24, 4, 5), 0),
    "half of the experts' rows": ((Slice(1, 4, 8), Transpose((0, 2, 1))), (24, 8, 5), 0),
    "half of the columns": ((Slice(2, 0, 5),), (24, 4, 10), 0),
    "patches": ((Transpose((2, 3, 4, 1, 0)),), (24, 3, 2, 4, 5), 4),
    "rows": ((LAST_ROWS,), (40,), 0),
    "rows in heads": ((LAST_ROWS, Split(0, (4, 6))), (40,), 0),
    "rows turned": ((LAST_ROWS, Transpose()), (40, 16), 1),
    "rows turned in heads": ((LAST_ROWS, Transpose(), Split(1, (4, 6))), (40, 16), 1),
}


# ---- The child


def _start() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    assert len(jax.devices()) == DEVICES


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in the process with eight devices."""
    flags = os.environ.pop("XLA_FLAGS", None)  # They may hold another number of devices.
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


@functools.cache
def _runner(devices: int, slots: int = 2) -> DeviceRunner:
    import jax

    return DeviceRunner(jax.devices()[:devices], slots)


def _run(devices: int, step: Step, parts: Sequence[Array]) -> Array:
    return _runner(devices).run(step, parts)


def _run_all(devices: int, step: Step, batches: Sequence[Sequence[Array]]) -> list[Array]:
    return [_runner(devices).run(step, parts) for parts in batches]


# ---- Tensors


def random_bits(rng: np.random.Generator, shape: Shape, dtype: str) -> Array:
    """Floats of all sizes, but no NaNs and none that a computation could make subnormal."""
    if dtype == "F16":
        return rng.standard_normal(shape).astype(np.float16)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-100, 100, shape)
    return values.astype({"BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype])


def stored(dtype: str, shape: Shape) -> StoredTensor:
    """A tensor `w.weight` of this shape in a file `w`: plain, or INT4 with a scale for four columns or for a row."""
    if dtype.startswith("INT4"):
        rows, columns = shape
        words, groups = -(-columns // 8), 1 if dtype == "INT4 channel" else columns // 4
        infos = [
            TensorInfo("w.weight_packed", "w", "I32", (rows, words), 0, rows * words * 4),
            TensorInfo("w.weight_scale", "w", "BF16", (rows, groups), rows * words * 4, rows * groups * 2),
        ]
    else:
        nbytes = int(np.prod(shape)) * {"BF16": 2, "F16": 2, "F32": 4}[dtype]
        infos = [TensorInfo("w.weight", "w", dtype, shape, 0, nbytes)]
    return detect.find("w.weight", shape, {info.name: info for info in infos}, INT4)


def random_parts(tensor: StoredTensor, batch: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    if len(tensor.parts) == 2:
        packed, scale = tensor.parts
        words = rng.integers(0, 256, (batch, *packed.shape), np.uint8)
        return [words, (rng.standard_normal((batch, *scale.shape)) * 0.01).astype(scale.dtype)]
    (part,) = tensor.parts
    return [random_bits(rng, (batch, *part.shape), part.tensor.dtype)]


def make_step(
    tensor: StoredTensor, chain: tuple[Op, ...], row_axis: int | None, dtype: str, rows: int | None = None
) -> Step:
    """The step for whole tensors, or for as many of the target's `row_axis` as `rows` says."""
    element = Box.whole(ops.target_shape(chain, tensor.shape))
    if rows is not None:
        assert row_axis is not None
        element = element.with_axis(row_axis, 0, rows)
    return Step(tensor.codec, chain, tensor.shape, element.shape, row_axis, dtype)


def rows_taken(chain: tuple[Op, ...]) -> slice:
    """The rows that are read for a chain: where it begins with a range of them, no others."""
    return slice(LAST_ROWS.start, LAST_ROWS.stop) if chain[:1] == (LAST_ROWS,) else slice(None)


def independent(tensor: StoredTensor, step: Step, parts: Sequence[Array]) -> Array:
    """What `verify` expects: the tensors written to a file, and its own decoding and layout of each."""
    values = []
    start, stop, _ = rows_taken(step.ops).indices(parts[0].shape[1])
    for i in range(len(parts[0])):
        with tempfile.TemporaryDirectory() as directory:
            with open(os.path.join(directory, "w"), "wb") as file:
                for part, info in zip(parts, tensor.parts, strict=True):
                    file.seek(info.tensor.offset)
                    file.write(part[i].tobytes())
            x = definition.rows(Directory(directory), tensor, start, stop)
        values.append(against_source.layout(step.ops, x).reshape(step.element).astype(step.dtype))
    return np.stack(values)


def assert_same_bits(found: Array, wanted: Array) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()


# ---- Tests


def test_the_chains_are_those_of_the_families() -> None:
    """Axes and their order are counted; which rows are taken is not."""

    def kind(chain: tuple[Op, ...], shape: Shape) -> tuple[object, ...]:
        details = [getattr(op, "order", getattr(op, "axis", None)) for op in chain]
        return (len(shape), *zip(map(type, chain), details, strict=True))

    models = [tiny_models.model(name) for name in tiny_models.CONFIGS]
    models.append(tiny_models.model("llama", ModelOptions(rope_type="llama3.1")))
    found = {kind(rule.ops, rule.shape) for model in models for rule in model.rules}
    # These differ from others in what the device step does not look at.
    found -= {kind((Scale(2.0),), (24, 10)), kind((Transpose((2, 1, 0)),), (24, 4, 5))}
    found -= {kind((Transpose((2, 3, 1, 0)),), (24, 4, 5, 3))}
    assert found == {kind(chain, shape) for chain, shape, _ in CHAINS.values()}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_batch_size_on_eight_devices(child: Callable[..., Any], chain: str) -> None:
    """Batches of 1 to 9 tensors, of which 8 devices get whole ones, rows of them, or both."""
    chain_ops, shape, row_axis = CHAINS[chain]
    tensor = stored("BF16", shape)
    step = make_step(tensor, chain_ops, row_axis, "bfloat16")
    whole = random_parts(tensor, 9)
    parts = [part[:, rows_taken(chain_ops)] for part in whole]
    single = child(_run, 1, step, parts)
    assert_same_bits(single, independent(tensor, step, whole))
    for batch, found in enumerate(
        child(_run_all, DEVICES, step, [[part[:n] for part in parts] for n in range(1, 10)]), 1
    ):
        assert_same_bits(found, single[:batch])


@pytest.mark.parametrize(
    ("dtype", "chain", "target"),
    [
        *((dtype, "rotary scale", target) for dtype in ("F16", "F32") for target in ("bfloat16", "float32")),
        *((dtype, "transpose", "bfloat16") for dtype in ("F16", "F32")),
        ("BF16", "rotary scale", "float32"),
        ("BF16", "copy", "float32"),
        ("F32", "copy 1d", "bfloat16"),
        *(("INT4", chain, "bfloat16") for chain in ("transpose", "split out", "split in", "rotary scale")),
        ("INT4", "heads turned", "bfloat16"),
        *((dtype, "rows turned in heads", target) for dtype in ("INT4", "F32") for target in ("bfloat16", "float32")),
        ("BF16", "offset", "float32"),
        ("F32", "offset", "bfloat16"),
        ("INT4", "transpose", "float32"),
        ("INT4", "rotary scale", "float32"),
        ("INT4 channel", "transpose", "bfloat16"),
        ("INT4 channel", "scale", "float32"),
    ],
)
@pytest.mark.parametrize("batch", [3, 4])
def test_every_codec_and_dtype(child: Callable[..., Any], dtype: str, chain: str, target: str, batch: int) -> None:
    chain_ops, shape, row_axis = CHAINS[chain]
    tensor = stored(dtype, shape)
    step = make_step(tensor, chain_ops, row_axis, target)
    whole = random_parts(tensor, batch)
    parts = [part[:, rows_taken(chain_ops)] for part in whole]
    wanted = independent(tensor, step, whole)
    assert_same_bits(child(_run, DEVICES, step, parts), wanted)


Prepared = tuple[Step, list[Array], Array]


def prepared(directory: Path, name: str, batch: int, rows: tuple[int, int], chain: tuple[Op, ...]) -> Prepared:
    """A step, and what it takes and gives, for some rows of several tensors in one of all formats.

    The tensors are read and prepared as the pipeline does it; what they give is what `verify` expects.
    """
    made = [samples.MAKERS[name](np.random.default_rng(seed)) for seed in range(batch)]
    tensors = {f"{i}.{key}": content for i, sample in enumerate(made) for key, content in sample.tensors.items()}
    checkpoints.write(directory, tensors, made[0].config)
    shape = made[0].shape
    found = [checkpoints.find(directory, f"{i}.{sample.name}", shape) for i, sample in enumerate(made)]
    assert len({tensor.codec for tensor in found}) == 1
    arrays = [checkpoints.prepare(directory, tensor, *rows) for tensor in found]
    row_axis = 1 if chain else 0
    element = Box.whole(ops.target_shape(chain, (rows[1] - rows[0], *shape[1:])))
    step = Step(found[0].codec, chain, shape, element.shape, row_axis, "bfloat16")
    wanted = []
    for tensor in found:
        with np.errstate(all="ignore"):
            values = against_source.layout(chain, definition.rows(Directory(str(directory)), tensor, *rows))
            wanted.append(values.reshape(element.shape).astype(ml_dtypes.bfloat16))
    return step, [np.stack(of_tensors) for of_tensors in zip(*arrays, strict=True)], np.stack(wanted)


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("name", samples.QUANTIZED)
def test_every_format(child: Callable[..., Any], tmp_path: Path, name: str, batch: int) -> None:
    """Three tensors of which each chip gets rows, and four of which each pair of chips shares one."""
    chain = () if name == "mxfp4 gpt-oss" else (Transpose(),)
    rows = samples.EXPERTS if name == "mxfp4 gpt-oss" else samples.OUT
    step, parts, wanted = prepared(tmp_path, name, batch, (0, rows), chain)
    samples.assert_same(child(_run, DEVICES, step, parts), wanted)


@pytest.mark.parametrize("rows", [(0, 16), (8, 24), (4, 20), (5, 21), (7, 15), (3, 15), (2, 13)], ids=str)
@pytest.mark.parametrize("name", ["awq", "gptq v1", "gptq desc_act", "fp8 blocks", "int4 asymmetric", "nvfp4"])
def test_rows_that_chips_share_and_rows_that_they_do_not(
    child: Callable[..., Any], tmp_path: Path, name: str, rows: tuple[int, int]
) -> None:
    """AWQ's rows are in words of eight: two chips share 16 of them, wherever they begin; 12 and 11 stay together."""
    step, parts, wanted = prepared(tmp_path, name, 3, rows, (Transpose(),))
    count = rows[1] - rows[0]
    assert step.rows == ({16: 2, 8: 1}.get(count) if name == "awq" else count)
    samples.assert_same(child(_run, DEVICES, step, parts), wanted)


@pytest.mark.parametrize("name", ["awq", "gptq v1", "fp8 blocks", "mxfp4 packed", "bnb nested", "mlx"])
def test_formats_in_heads(child: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Four heads of six rows, multiplied and rounded once at the end: no chip gets part of a word of AWQ."""
    chain = (Transpose(), Split(1, (4, 6)), ROTARY, Scale(6**-0.5))
    step, parts, wanted = prepared(tmp_path, name, 2, (0, 24), chain)
    assert step.rows == (None if name == "awq" else 4)
    samples.assert_same(child(_run, DEVICES, step, parts), wanted)


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("bf16", [("batch", "rows")]),
        ("int4 asymmetric", [("batch", "rows")] * 3),
        ("nvfp4", [("batch", "rows"), ("batch", "rows"), ("batch",)]),
        ("gptq desc_act", [("batch", None, "rows")] * 3 + [("batch",)]),
        ("awq", [("batch", None, "rows")] * 3),
    ],
)
def test_how_arrays_are_divided(tmp_path: Path, name: str, specs: list[tuple[str | None, ...]]) -> None:
    step, parts, _ = prepared(tmp_path, name, 1, (0, 24), (Transpose(),))
    assert [tuple(step.spec(i)) for i in range(len(parts))] == specs


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("chain", ["split out", "rotary scale"])
def test_parts_of_a_tensor(child: Callable[..., Any], chain: str, rows: int) -> None:
    """Some heads of a tensor, as one box of it holds; which ones does not matter."""
    chain_ops, shape, row_axis = CHAINS[chain]
    tensor = stored("BF16", shape)
    whole = make_step(tensor, chain_ops, row_axis, "bfloat16")
    step = make_step(tensor, chain_ops, row_axis, "bfloat16", rows)
    parts = random_parts(tensor, 2)
    wanted = independent(tensor, whole, parts)
    for start in range(4 - rows + 1):
        block = [part[:, start * 6 : (start + rows) * 6] for part in parts]
        assert_same_bits(child(_run, DEVICES, step, block), wanted[:, :, start : start + rows])


@pytest.mark.parametrize("rows", [1, 7, 9, 12, 23])
@pytest.mark.parametrize("dtype", ["BF16", "INT4", "INT4 channel"])
def test_odd_rows(child: Callable[..., Any], dtype: str, rows: int) -> None:
    """Numbers of rows that eight devices cannot share, or only some of them."""
    tensor = stored(dtype, (rows, 20 if dtype == "INT4 channel" else 24))
    step = make_step(tensor, (Transpose(),), 1, "bfloat16")
    parts = random_parts(tensor, 2)
    assert_same_bits(child(_run, DEVICES, step, parts), independent(tensor, step, parts))


@pytest.mark.parametrize("chain", ["copy", "rotary scale"])
def test_tensors_whose_rows_stay_together(child: Callable[..., Any], chain: str) -> None:
    chain_ops, shape, _ = CHAINS[chain]
    tensor = stored("F32", shape)
    step = make_step(tensor, chain_ops, None, "bfloat16")
    parts = random_parts(tensor, 6)
    assert_same_bits(child(_run, DEVICES, step, parts), independent(tensor, step, parts))


def _compilations(step: Step, batches: Sequence[Sequence[Array]]) -> list[tuple[int, int]]:
    """After each batch: programs that were made, and compilations of the one that it used."""
    runner = _runner(DEVICES)
    before = device.program.cache_info().misses
    counts = []
    for parts in batches:
        runner.run(step, parts)
        programs = device.program.cache_info().misses - before
        over_batch, over_rows = chips_used(len(parts[0]), step.rows, DEVICES)
        devices = np.array(runner.devices[: over_batch * over_rows]).reshape(over_batch, over_rows)
        program: Any = device.program(step, Mesh(devices, ("batch", "rows")), len(parts))
        counts.append((programs, program._cache_size()))
    return counts


def test_one_compilation_for_each_signature(child: Callable[..., Any]) -> None:
    tensor = stored("BF16", (32, 18))
    step = make_step(tensor, (Transpose(),), 1, "bfloat16")
    eight, four = random_parts(tensor, 8), random_parts(tensor, 4)
    # The same step again, other values of it, and an equal step: nothing new. Another batch size: one more.
    batches = [eight, eight, random_parts(tensor, 8, seed=1), four, eight, four]
    assert child(_compilations, step, batches) == [(1, 1), (1, 1), (1, 1), (2, 1), (2, 1), (2, 1)]
    equal = make_step(stored("BF16", (32, 18)), (Transpose(),), 1, "bfloat16")
    assert child(_compilations, equal, [eight, four]) == [(0, 1), (0, 1)]
    other = make_step(tensor, (Transpose(),), 1, "float32")
    assert child(_compilations, other, [eight]) == [(1, 1)]


def _from_threads(step: Step, batches: Sequence[Sequence[Array]]) -> tuple[list[Array], int]:
    """Results of batches that were submitted at once, and how many were on the devices together."""
    import jax

    runner = DeviceRunner(jax.devices(), 2)
    lock = threading.Lock()
    inside = most = 0
    put = jax.device_put

    def counted(*arguments: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        result = jax.block_until_ready(put(*arguments))
        threading.Event().wait(0.01)
        with lock:
            inside -= 1
        return result

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setattr(jax, "device_put", counted)
        return list(pool.map(lambda parts: runner.run(step, parts), batches)), most


def test_several_threads_share_the_slots(child: Callable[..., Any]) -> None:
    tensor = stored("INT4", (24, 16))
    step = make_step(tensor, (Transpose(),), 1, "bfloat16")
    batches = [random_parts(tensor, batch, seed) for batch, seed in itertools.product((8, 3), range(6))]
    results, most = child(_from_threads, step, batches)
    assert most == 2
    for parts, found in zip(batches, results, strict=True):
        assert_same_bits(found, independent(tensor, step, parts))


def test_the_rounding_comes_last(child: Callable[..., Any]) -> None:
    """A value that two roundings would take elsewhere: INT4 times scale times the query's factor."""
    tensor = stored("INT4", (24, 16))
    chain = CHAINS["scale"][0]
    step = make_step(tensor, chain, 1, "bfloat16")
    parts = random_parts(tensor, 8, seed=5)
    found = child(_run, DEVICES, step, parts)
    packed, scale = parts
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(8, 24, 16).astype(np.float32) - 8
    exact = nibbles * np.repeat(scale.astype(np.float32), 4, axis=2) * np.float32(6**-0.5)
    twice = (nibbles * np.repeat(scale.astype(np.float32), 4, axis=2)).astype(ml_dtypes.bfloat16).astype(np.float32)
    twice = twice * np.float32(6**-0.5)

    def placed(x: Array) -> Array:
        return x.astype(ml_dtypes.bfloat16).swapaxes(1, 2).reshape(8, 16, 4, 6)

    assert_same_bits(found, placed(exact))
    assert found.tobytes() != placed(twice).tobytes()


class Tpu:
    """What `choose_implementation` asks of a chip."""

    platform = "tpu"
    device_kind = "TPU v5e"


def refused(_: Any) -> bool:
    raise NotImplementedError("no such shape cast\nand a long listing")


@pytest.mark.parametrize(
    ("agrees", "words"),
    [(lambda _: True, None), (lambda _: False, "gives other values"), (refused, "does not run (no such shape cast)")],
    ids=["agrees", "differs", "refused"],
)
def test_kernels_are_tried_on_the_chip(
    monkeypatch: pytest.MonkeyPatch, agrees: Callable[..., bool], words: str | None
) -> None:
    """Only those that are used are tried; where one is wrong, the definition is used and that is said."""
    chip: Any = Tpu()
    monkeypatch.setattr(device, "_KERNELS", {"grouped": lambda _: True, "gptq": agrees, "awq": refused})
    implementation, warning = device.choose_implementation(chip, ["gptq", "grouped"])
    if words is None:
        assert (implementation, warning) == ("auto", None)
        return
    assert implementation == "xla"
    assert warning is not None
    assert "'gptq'" in warning
    assert words in warning
    assert "TPU v5e" in warning
    assert device.choose_implementation(chip, ["grouped"]) == ("auto", None)
