"""What the loss without whole logits holds and copies: a chunk, aligned for its products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels.models.layers.head import find_head
from prodial_kernels.training.step import chunked_loss
from prodial_kernels.training.step import loss as loss_module
from prodial_kernels.training.step.chunked_loss import chunk_rows
from prodial_kernels.training.step.loss import ChunkedLoss, negative_log_likelihoods
from support.live_storages import LiveStorages
from support.loss_cases import HeadOnly, Static, half_dtype


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("evaluating", [False, True])
def test_no_tensor_is_larger_than_a_chunk(evaluating: bool) -> None:
    vocabulary, tokens = 32_768, 4096
    model = HeadOnly(torch.randn(1, tokens, 4), torch.randn(vocabulary, 4), None, 1.0)
    model.lm_head.requires_grad_(False)
    labels = torch.randint(0, vocabulary, (1, tokens))
    head = find_head(model)
    with _Largest() as largest:
        if evaluating:
            negative_log_likelihoods(head, model.states[0], labels[0])
        else:
            ChunkedLoss(head)(torch.zeros_like(labels), labels).backward()
    rows = chunk_rows(vocabulary, torch.float32, torch.device("cpu"))
    assert largest.nbytes == rows * vocabulary * 4
    assert largest.nbytes <= 2**27 < tokens * vocabulary * 4 / 3


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
@pytest.mark.parametrize("what", ["frozen", "trained", "scores"])
def test_what_is_held_of_a_chunk(what: str, half: bool, by_kernel: bool) -> None:
    vocabulary, tokens, rows, width = 4096, 140, 64, 4
    dtype = half_dtype(by_kernel) if half else torch.float32
    matrix = torch.randn(vocabulary, width).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    model = HeadOnly(torch.randn(1, tokens, width).to(dtype), matrix, bias, 1.0)
    model.lm_head.requires_grad_(what == "trained")
    ids = torch.randint(0, vocabulary, (1, tokens))
    head = find_head(model)
    head_gradients = (vocabulary * (width + 1)) * (8 + dtype.itemsize)
    with pytest.MonkeyPatch.context() as patch, LiveStorages() as live:
        if what == "scores":
            patch.setattr(loss_module, "chunk_rows", lambda *_: rows)
            negative_log_likelihoods(head, model.states[0].detach(), ids[0])
        else:
            ChunkedLoss(head, rows=rows)(ids, ids).backward()
    # The logits, whose storage the gradient takes; without the kernel, an fp32 copy of 16-bit ones.
    chunk = rows * vocabulary * (dtype.itemsize + (4 if half and not by_kernel else 0))
    room = 16 * tokens * width + 2**16 + matrix.nbytes + bias.nbytes
    room += head_gradients if what == "trained" else 0
    assert chunk <= live.peak < chunk + room


class _Products(TorchDispatchMode):
    """Notes the operands of matrix products, results included, and what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, ...]] = []
        self.copied: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.operands.append((*args[-2:], output))
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy"):
            self.copied.append(output)
        return output


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_products_are_aligned_and_copy_nothing(
    trained: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an odd vocabulary all but a few columns."""
    if torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU")
    monkeypatch.setattr(chunked_loss, "takes_kernel", lambda *_: True)
    vocabulary, tokens, width = 1003, 64, 32
    weight, shift = torch.randn(vocabulary, width).half(), torch.randn(vocabulary).half()
    model = HeadOnly(torch.randn(1, tokens, width).half(), weight, shift if bias else None, 1.0)
    model.lm_head.requires_grad_(trained)
    ids = torch.randint(0, vocabulary, (1, tokens))
    head = find_head(model)
    with _Products() as products:
        Static(head, rows=16)(ids, ids).backward()
    chunks = {(16, vocabulary), (16, vocabulary - 3), (vocabulary - 3, width)}
    assert not chunks & {tuple(t.shape) for t in products.copied}
    columns = 0
    for operands in products.operands:
        small = any(3 in t.shape for t in operands)
        columns += small
        for tensor in operands:
            at = tensor.storage_offset() * tensor.element_size()
            assert at % 16 == 0
            assert max(tensor.stride()) % 8 == 0
            assert min(tensor.stride()) == 1
            assert small or not any(size % 8 for size in tensor.shape)
    # Logits and the gradients of hidden states and, trained, of the head, each in two parts.
    assert len(products.operands) == 2 * columns == 4 * (6 if trained else 4)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "device", "rows"),
    [
        (50_280, torch.bfloat16, "cuda", 1024),
        (65_024, torch.float16, "cuda", 1024),
        (50_277, torch.float32, "cuda", 512),
        # Beside an fp32 copy.
        (50_280, torch.bfloat16, "cpu", 512),
        (50_280, torch.float64, "cuda", 256),
        (4096, torch.float32, "cpu", 8192),
        (10**9, torch.bfloat16, "cuda", 128),
    ],
)
def test_rows_of_a_chunk(vocabulary: int, dtype: torch.dtype, device: str, rows: int) -> None:
    assert chunk_rows(vocabulary, dtype, torch.device(device)) == rows
