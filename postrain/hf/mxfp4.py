"""MXFP4 weights, dequantised slice by slice as they are read.

The format (OCP Microscaling Formats 1.0): 32 numbers in a row share one power of two, ``2^(scale - 127)``; each is 4
bits, e2m1: sign, two bits of exponent, one of mantissa. gpt-oss keeps the experts' kernels so, as ``NAME_blocks``
uint8 [E, out, in / 32, 16], two numbers a byte with the first in the low half, and ``NAME_scales`` uint8
[E, out, in / 32]; ``NAME`` itself would be [E, in, out].
"""

import numpy as np

GROUP = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
SUFFIXES = "_blocks", "_scales"


class Mxfp4Tensor:
    """An array [E, in, out] over the packed bytes: indexing with slices reads and unpacks those experts and columns."""

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self._blocks, self._scales = blocks, scales

    @property
    def shape(self) -> tuple[int, ...]:
        experts, size_out, groups = self._scales.shape
        return experts, groups * GROUP, size_out

    def __getitem__(self, index):
        if index[0] is Ellipsis:  # [..., columns]: still packed
            return Mxfp4Tensor(self._blocks[:, index[1]], self._scales[:, index[1]])
        experts, rows, columns = index
        return dequantize(self._blocks[experts, columns], self._scales[experts, columns])[:, rows]


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, in, out] of blocks [E, out, in / 32, 16] and scales [E, out, in / 32]; exact."""
    numbers = np.empty((*blocks.shape[:-1], GROUP), np.float32)
    numbers[..., 0::2] = VALUES[blocks & 15]
    numbers[..., 1::2] = VALUES[blocks >> 4]
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    return numbers.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1)
