"""What codes and scales mean, one number at a time, and checks of samples against it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import samples
import stored
from samples import Array, Sample


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A finite number of the OCP specifications: a sign, a biased exponent, a mantissa; subnormal where it is zero."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = code % 2**mantissa_bits
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (2**mantissa_bits + mantissa) * 2.0 ** (exponent - bias - mantissa_bits)


def e4m3(code: int) -> float:
    """OFP8 E4M3: no infinity, and NaN only where all bits but the sign are set."""
    return math.nan if code & 0x7F == 0x7F else minifloat(code, 4, 3)


def e5m2(code: int) -> float:
    """OFP8 E5M2: infinity and NaN as in IEEE 754."""
    if code & 0x7C == 0x7C:
        return math.nan if code & 3 else math.copysign(math.inf, -1 if code >> 7 else 1)
    return minifloat(code, 5, 2)


def e2m1(code: int) -> float:
    """MX E2M1: all finite."""
    return minifloat(code, 2, 1)


def e8m0(code: int) -> float:
    """MX E8M0: a power of two, or NaN."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


def int8(code: int) -> float:
    """Two's complement."""
    return code - 256 if code > 127 else code


CODES: dict[str, Callable[[int], float]] = {"F8_E4M3": e4m3, "F8_E5M2": e5m2, "I8": int8}


def number(scale: Any) -> float:
    """A stored scale: bytes are E8M0."""
    return e8m0(int(scale)) if isinstance(scale, np.uint8) else float(scale)


def times(value: float, scale: float) -> np.float32:
    """The product, rounded once to float32."""
    with np.errstate(all="ignore"):
        return np.float32(np.float32(value) * np.float32(scale))


def bits_of_run(words: Array, index: int, bits: int, *, dense: bool = True) -> int:
    """Code `index` of a run of little-endian words, as one large integer has its bits."""
    if not dense:
        per_word = 32 // bits
        words, index = words[index // per_word : index // per_word + 1], index % per_word
    return int.from_bytes(np.ascontiguousarray(words).tobytes(), "little") >> index * bits & (2**bits - 1)


def table(shape: tuple[int, ...], value: Callable[..., np.float32]) -> Array:
    """The array of these values of the indices."""
    result = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        result[index] = value(*index)
    return result


def check(sample: Sample, directory: Path, value: Callable[..., np.float32]) -> Array:
    """Checks that a sample has these values, and that some of its rows have them too; returns all."""
    wanted = table(sample.shape, value)
    sample.write(directory)
    samples.assert_decodes(directory, sample.name, sample.shape, wanted)
    rows = sample.shape[0]
    start, stop = rows // 3, rows - 1
    defined = stored.expected(directory, sample.name, sample.shape, rows=(start, stop))
    samples.assert_same(defined.astype(np.float32), wanted[start:stop])
    found = stored.decode(directory, sample.name, sample.shape, rows=(start, stop), dtype="float32")
    samples.assert_same(found, wanted[start:stop])
    return wanted
