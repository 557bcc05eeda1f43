"""The values of GPTQ and AWQ, against loops written from the formats' definitions, element by element.

`check` compares both paths with them: detection, reader, `prepare` and `decode`; and NumPy's, which `verify` takes.
"""

from pathlib import Path

import numpy as np
import published
import pytest
import samples
import stored
from samples import COLUMNS, OUT, SAMPLES, Array, Sample
from scalar import bits_of_run, check, table, times


@pytest.mark.parametrize("order", ["none", "in order", "by activation"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("out", "columns", "group_size"), [(24, 64, 32), (13, 48, 32), (5, 16, -1)], ids=["even", "ragged", "one group"]
)
def test_gptq(tmp_path: Path, bits: int, version: int, order: str, out: int, columns: int, group_size: int) -> None:
    """Version 1 stores zero points less one, modulo the width, so that the largest stored one is zero."""
    rng = np.random.default_rng(7)
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    words = samples.random_words(rng, columns * bits // 32, out)
    zeros = samples.random_words(rng, groups, -(-out * bits // 32))
    zeros[0, 0] = -1  # The largest in every position.
    scales = samples.random_scale(rng, (groups, out), "F16")
    index = np.arange(columns, dtype=np.int32) // size
    if order == "by activation":
        index = rng.permutation(index)
    tensors = {"m.qweight": ("I32", words), "m.qzeros": ("I32", zeros), "m.scales": ("F16", scales)}
    if order != "none":
        tensors["m.g_idx"] = ("I32", index)
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    config = published.gptq(bits, group_size, desc_act=order == "by activation", checkpoint_format=layout)

    def value(n: int, k: int) -> np.float32:
        g = index[k]
        zero = bits_of_run(zeros[g], n, bits)
        zero = (zero + 1) % 2**bits if version == 1 else zero
        return times(bits_of_run(words[:, n], k, bits) - zero, float(scales[g, n]))

    sample = Sample("m.weight", (out, columns), tensors, {"quantization_config": config})
    check(sample, tmp_path, value)
    tensor = stored.find(tmp_path, "m.weight", sample.shape)
    arrays = stored.prepare(tmp_path, tensor, 0, out)
    # The groups of the inputs are sent to the chips only if they say something.
    assert len(arrays) == (4 if order == "by activation" and groups > 1 else 3)


def awq_column(words: Array, n: int) -> int:
    """The code of an output in AutoAWQ's order: outputs 0, 2, 4, 6, 1, 3, 5, 7 of a word from its lowest bits on."""
    return int(words[n // 8]) >> 4 * (0, 2, 4, 6, 1, 3, 5, 7).index(n % 8) & 15


def awq_value(sample: Sample, n: int, k: int) -> np.float32:
    (_, words), (_, zeros), (_, scales) = sample.tensors.values()
    g = k // 32
    return times(awq_column(words[k], n) - awq_column(zeros[g], n), float(scales[g, n]))


def test_awq(tmp_path: Path) -> None:
    check(SAMPLES["awq"], tmp_path, lambda n, k: awq_value(SAMPLES["awq"], n, k))


@pytest.mark.parametrize("height", [1, 5, 8, 11])
def test_awq_rows_that_begin_within_a_word(tmp_path: Path, height: int) -> None:
    sample = SAMPLES["awq"]
    sample.write(tmp_path)
    wanted = table(sample.shape, lambda n, k: awq_value(sample, n, k))
    for start in range(OUT - height + 1):
        rows = (start, start + height)
        found = stored.decode(tmp_path, "m.weight", sample.shape, rows=rows, dtype="float32")
        samples.assert_same(found, wanted[slice(*rows)])
        samples.assert_same(stored.expected(tmp_path, "m.weight", sample.shape, rows=rows), wanted[slice(*rows)])


def test_awq_rows_that_fill_no_word(tmp_path: Path) -> None:
    """The last word is not full, and not read beyond."""
    rng = np.random.default_rng(8)
    tensors = {
        "m.qweight": ("I32", samples.random_words(rng, COLUMNS, 2)),
        "m.qzeros": ("I32", samples.random_words(rng, 2, 2)),
        "m.scales": ("BF16", samples.random_scale(rng, (2, 12), "BF16")),
    }
    sample = Sample("m.weight", (12, COLUMNS), tensors, {"quantization_config": published.awq(32)})
    check(sample, tmp_path, lambda n, k: awq_value(sample, n, k))
