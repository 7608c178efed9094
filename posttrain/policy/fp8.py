"""Block-wise FP8 weights, as DeepSeek-V3 is released, back to a floating-point type."""

import torch
from torch import Tensor

SCALE = "_scale_inv"
"""What a quantised tensor's name has in addition in the name of its scales."""


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix: its blocks, counted in each direction, rest included.

    >>> scale_shape((576, 7168), (128, 128))
    (5, 56)
    """
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Multiply each block of an FP8 matrix by its scale: w_ij = q_ij * s_{i // R, j // C}.

    weight (rows, columns) float8_e4m3fn; scale_inv as `scale_shape` says, for blocks of R x C.
    Multiplied in float32, then rounded once to `dtype`.
    """
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype)
    for i, scales in enumerate(scale_inv.float()):
        strip = slice(i * rows, (i + 1) * rows)
        factors = scales.repeat_interleave(columns)[: weight.shape[1]]
        out[strip] = weight[strip].float() * factors
    return out
