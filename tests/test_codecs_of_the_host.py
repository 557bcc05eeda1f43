"""The values of bitsandbytes and MLX, against loops written from the formats' definitions, element by element.

`check` compares both paths with them: detection, reader, `prepare` and `decode`; and NumPy's, which `verify` takes.
"""

from pathlib import Path

import numpy as np
import pytest
import samples
from samples import COLUMNS, FLOATS, OUT
from scalar import bits_of_run, check, times


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((24, 64), 64), ((7, 45), 64), ((9, 33), 32), ((5, 2), 64), ((300, 57), 64), ((40, 51), 256)],
    ids=str,
)
def test_bitsandbytes(tmp_path: Path, shape: tuple[int, int], block: int, kind: str, *, nested: bool) -> None:
    """Blocks and bytes that cross rows; nested, more than 256 blocks, which have two factors."""
    sample = samples.bitsandbytes(np.random.default_rng(9), nested=nested, kind=kind, shape=shape, block=block)
    parts = {name.removeprefix("m.weight").removeprefix("."): array for name, (_, array) in sample.tensors.items()}

    def value(r: int, c: int) -> np.float32:
        flat = r * shape[1] + c
        code = parts[""][flat // 2, 0] >> (0 if flat % 2 else 4) & 15
        factor = parts["absmax"][flat // block]
        if nested:
            # Two roundings.
            factor = parts["nested_quant_map"][factor] * parts["nested_absmax"][flat // block // 256]
            factor = factor + np.float32(0.0522)
        return times(float(parts["quant_map"][code]), float(factor))

    check(sample, tmp_path, value)


@pytest.mark.parametrize("scale", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(tmp_path: Path, bits: int, scale: str) -> None:
    """The product is rounded before the bias is added; one rounding of both would give other numbers."""
    rng = np.random.default_rng(10)
    sample = samples.mlx(rng, bits)
    scales, biases = (samples.random_scale(rng, (OUT, COLUMNS // 32), scale) for _ in range(2))
    sample = sample.replaced(**{"m.scales": (scale, scales), "m.biases": (scale, biases)})
    words = sample.tensors["m.weight"][1]

    def product(r: int, c: int) -> tuple[int, np.float32, np.float32]:
        return bits_of_run(words[r], c, bits), np.float32(scales[r, c // 32]), np.float32(biases[r, c // 32])

    def value(r: int, c: int) -> np.float32:
        code, factor, bias = product(r, c)
        return np.float32(np.float32(code) * factor) + bias

    wanted = check(sample, tmp_path, value)
    if (bits, scale) == (8, "F32"):
        fused = [product(r, c) for r, c in np.ndindex(OUT, COLUMNS)]
        once = np.array([np.float32(code * float(factor) + float(bias)) for code, factor, bias in fused])
        assert np.count_nonzero(once != wanted.ravel()) > 100
