"""Unsigned codes of a few bits in little-endian 32-bit words, as compressed-tensors and MLX store them."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """How a run of codes lies in words.

    Attributes:
        bits: The width of a code, 1 to 8.
        offset: What is subtracted from each unsigned code.
        dense: True if code `k` takes the bits from `k * bits` on, across words where it happens; False if each word
            holds as many whole codes as fit, and its last bits are unused.
    """

    bits: int
    offset: int = 0
    dense: bool = True

    @property
    def words_per_code(self) -> Fraction:
        """The words that one code takes."""
        return Fraction(self.bits, _WORD_BITS) if self.dense else Fraction(1, _WORD_BITS // self.bits)

    def words(self, codes: int) -> int:
        """How many words so many codes take."""
        indices, per = self.words_per_code.as_integer_ratio()
        return -(-codes * indices // per)


def unpack(words: np.ndarray, start: int, stop: int, packing: Packing) -> np.ndarray:
    """Some codes of each run, less the offset.

    Args:
        words: 32-bit integers `[runs, words]`, of which the first is the one in which code `start` begins.
        start: The first code.
        stop: One past the last code.
        packing: How codes lie in words.

    Returns:
        int8 `[runs, stop - start]`.
    """
    bits, codes = packing.bits, np.arange(start, stop)
    if packing.dense:
        positions = codes * bits
    else:
        per_word = _WORD_BITS // bits
        positions = codes // per_word * _WORD_BITS + codes % per_word * bits
    positions -= positions[:1] // _WORD_BITS * _WORD_BITS
    # A code of at most eight bits lies within two neighboring bytes, wherever it begins.
    stream = np.pad(np.ascontiguousarray(words).view(np.uint8), ((0, 0), (0, 1)))
    first = positions // 8
    pairs = stream[:, first].astype(np.uint16) | (stream[:, first + 1].astype(np.uint16) << 8)
    unsigned = (pairs >> (positions % 8).astype(np.uint16)) & np.uint16((1 << bits) - 1)
    values: np.ndarray = (unsigned.astype(np.int16) - packing.offset).astype(np.int8)
    return values
