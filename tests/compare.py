"""Comparison of decoded numbers, bit for bit."""

import numpy as np

# XLA on CPU and TPU makes smaller results zero.
SMALLEST_NORMAL = 2.0**-126


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of an array of numbers, as unsigned integers in its shape."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def differing(found: np.ndarray, wanted: np.ndarray, *, zeros_have_signs: bool = True) -> int:
    """How many values differ in any bit.

    Results below 2**-126 may have become a zero of the same sign. A NaN equals nothing: no test has one by intention.

    Args:
        found: What the converter made.
        wanted: What it is to be equal to, in the same dtype and shape.
        zeros_have_signs: False where the wanted zeros are all positive.
    """
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    same = (bits(found) == bits(wanted)) & ~np.isnan(wanted)
    flushed = (found == 0) & (np.abs(wanted.astype(np.float32)) < SMALLEST_NORMAL)
    if zeros_have_signs:
        flushed &= np.signbit(found) == np.signbit(wanted)
    return int(np.count_nonzero(~(same | flushed)))
