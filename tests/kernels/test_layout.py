"""Transposing and gating against ``mT`` and silu; which matrix the kernels take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prodial_kernels.ops.layout import gated_channels, token_matrix, transposed

SHAPES = [(2, 130, 65), (1, 1, 7), (3, 64, 64), (2, 5, 1), (0, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, kernel_device: str) -> None:
    from prodial_kernels.kernels.layout import launch_gate, launch_transpose

    batch, rows, columns = shape
    whole = torch.randn(batch, 2 * rows, columns + 3, device=kernel_device).to(dtype)
    x, z = whole[:, :rows, :columns], whole[:, rows:, 1 : columns + 1]
    assert torch.equal(launch_transpose(x), x.mT)
    assert launch_transpose(x).is_contiguous()
    expected = (x.float() * F.silu(z.float())).to(dtype)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(launch_gate(x, z), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_kernel(shape: tuple[int, int, int]) -> None:
    x, z = torch.randn(2, *shape).unbind()
    assert torch.equal(transposed(x), x.mT)
    assert torch.equal(gated_channels(x, z), F.silu(z) * x)
    for tokens in (x, x.mT, x[:, ::2], x.mT[:, ::2], x[:, -1:].expand(-1, shape[1], -1)):
        check_matrix(tokens)
    contiguous = torch.randn(2, 3, 4)
    assert token_matrix(contiguous).data_ptr() == contiguous.data_ptr()


def check_matrix(tokens: torch.Tensor) -> None:
    matrix = token_matrix(tokens)
    rows = matrix.mT.reshape(-1, matrix.shape[1]) if matrix.ndim == 3 else matrix
    assert torch.equal(rows, tokens.reshape(-1, tokens.shape[-1]))
    assert matrix.numel() == 0 or matrix.shape[-1] == 1 or matrix.stride(-1) == 1


def test_channel_first_is_read_where_it_lies() -> None:
    whole = torch.randn(2, 12, 16)
    for channels in (whole, whole[:, 6:], whole[:, :, :8], whole[:, :, 8:]):
        matrix = token_matrix(channels.mT)
        assert matrix.shape == channels.shape
        assert matrix.data_ptr() == channels.data_ptr()
        check_matrix(channels.mT)
    # The copy engine cannot start or step inside of 16 bytes.
    for channels in (whole[:, :, :9], torch.randn(2, 12, 15), whole[:1].expand(3, -1, -1)[:, ::5]):
        check_matrix(channels.mT)
    assert token_matrix(torch.randn(2, 12, 15).mT).shape == (30, 12)
    assert token_matrix(whole[:1].expand(3, -1, -1).mT).shape == (48, 12)
