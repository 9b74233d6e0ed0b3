"""Transposing kernels against ``mT``: ragged sizes, strided inputs, the gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prodial_kernels.ops.layout import gated_tokens, token_rows, transposed

SHAPES = [(2, 130, 65), (1, 1, 7), (3, 64, 64), (2, 5, 1), (0, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, kernel_device: str) -> None:
    from prodial_kernels.kernels.layout import launch_transpose

    batch, rows, columns = shape
    whole = torch.randn(batch, 2 * rows, columns + 3, device=kernel_device).to(dtype)
    x, z = whole[:, :rows, :columns], whole[:, rows:, 1 : columns + 1]
    assert torch.equal(launch_transpose(x), x.mT)
    assert launch_transpose(x).is_contiguous()
    expected = (x.float() * F.silu(z.float())).to(dtype).mT
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(launch_transpose(x, z), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_kernel(shape: tuple[int, int, int]) -> None:
    x, z = torch.randn(2, *shape).unbind()
    assert torch.equal(transposed(x), x.mT)
    assert torch.equal(gated_tokens(x, z), (F.silu(z) * x).mT)
    for tokens in (x, x.mT, x[:, ::2], x.mT[:, ::2], x[:, -1:].expand(-1, shape[1], -1)):
        rows = token_rows(tokens)
        assert torch.equal(rows, tokens.reshape(-1, tokens.shape[-1]))
        assert rows.numel() == 0 or rows.shape[1] == 1 or rows.stride(1) == 1
    contiguous = torch.randn(2, 3, 4)
    assert token_rows(contiguous).data_ptr() == contiguous.data_ptr()
