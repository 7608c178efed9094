"""Block-wise FP8 against a block-quantised matrix made by hand."""

import pytest
import torch

from posttrain.policy.fp8 import dequantise, scale_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_is_multiplied_by_its_own_scale(dtype: torch.dtype) -> None:
    rows, columns = 200, 300  # one whole and one partial block down, two and a partial one across
    generator = torch.Generator().manual_seed(0)
    # Integers up to 16 are exact in e4m3; powers of two keep every product exact in bfloat16.
    whole = torch.randint(-16, 17, (rows, columns), generator=generator).float()
    scales = torch.tensor([[0.5, 2.0, 8.0], [0.25, 1.0, 0.125]])
    values, factors = whole.tolist(), scales.tolist()
    expected = torch.tensor(
        [[values[i][j] * factors[i // 128][j // 128] for j in range(columns)] for i in range(rows)]
    )

    restored = dequantise(whole.to(torch.float8_e4m3fn), scales, (128, 128), dtype)

    assert restored.dtype == dtype
    assert torch.equal(restored.float(), expected)


def test_scales_count_partial_blocks() -> None:
    assert scale_shape((128, 128), (128, 128)) == (1, 1)
    assert scale_shape((129, 128), (128, 128)) == (2, 1)
    assert scale_shape((7, 9), (4, 3)) == (2, 3)


def test_the_product_is_rounded_once() -> None:
    weight = torch.full((1, 1), 1.125).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0 + 2**-8]])
    # 1.125 * (1 + 2^-8) = 1.12939; a scale first rounded to bfloat16 (1.0) would give 1.125.
    assert dequantise(weight, scale, (128, 128), torch.bfloat16).item() == 1.1328125
