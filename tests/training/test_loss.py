"""The loss without whole logits against the whole one: values, gradients, memory, refusals."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from live_storages import LiveStorages
from models import FAMILIES, build, randomise_adapters, token_ids
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.testing import assert_all_accurate
from prodial_kernels.training import chunked_cross_entropy
from prodial_kernels.training import loss as loss_module
from prodial_kernels.training.batches import IGNORED
from prodial_kernels.training.chunked_cross_entropy import chunk_rows
from prodial_kernels.training.head import HeadError, OutputHead, find_head
from prodial_kernels.training.loss import (
    ChunkedLoss,
    FullLoss,
    LossError,
    make_loss,
    negative_log_likelihoods,
)

# Families that multiply or divide their logits, and by what.
SCALED = {
    "granitemoehybrid": ({"logits_scaling": 6.0}, 1 / 6),
    "falcon_h1": ({"lm_head_multiplier": 0.3}, 0.3),
}


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Head(nn.Module):
    """Hidden states are a parameter: a causal language model as the loss sees one."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__()
        self.states = nn.Parameter(states)
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.lm_head.weight = nn.Parameter(weight)
        if bias is not None:
            self.lm_head.bias = nn.Parameter(bias)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> _Output:
        states = self.states[:1, : input_ids.shape[1]] if len(input_ids) == 1 else self.states
        return _Output(self.lm_head(states) * self.scale)


def _labels(batch: int, length: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[0, :4] = IGNORED
    labels[-1, length // 2 :] = IGNORED
    return labels


def _run(loss: Any, model: _Head, labels: Tensor, weight: Any = 0.01) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    value = loss(torch.zeros_like(labels), labels, weight)
    value.backward()
    gradients = {f"d_{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": value.detach(), **gradients}  # type: ignore[dict-item]


class _Static(ChunkedLoss):
    """Computes every position, as it does for labels on a device."""

    def __call__(self, input_ids: Tensor, labels: Tensor, weight: Any = 1.0, **inputs: Any) -> Any:
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "_targets", lambda labels, device: (targets, None))
            return super().__call__(input_ids, labels, weight, **inputs)


@pytest.fixture(params=["pytorch", "kernel"])
def by_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel computes the cross-entropy, interpreted."""
    kernel: bool = request.param == "kernel"
    if kernel and torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU")
    monkeypatch.setattr(chunked_cross_entropy, "_takes_kernel", lambda *_: kernel)
    return kernel


def _half(by_kernel: bool) -> torch.dtype:
    """The interpreter computes bf16 wrongly (triton-lang/triton#11584), so it sees fp16."""
    return torch.float16 if by_kernel else torch.bfloat16


@pytest.mark.parametrize("kind", [ChunkedLoss, _Static])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.37)])
@pytest.mark.parametrize("vocabulary", [5, 296, 303])
def test_loss_and_gradients_keep_the_accuracy_rule(
    vocabulary: int, kind: type[ChunkedLoss], half: bool, bias: bool, scale: float, by_kernel: bool
) -> None:
    width = 24
    dtype = _half(by_kernel) if half else torch.float32
    parts = (torch.randn(3, 20, width), torch.randn(vocabulary, width) * 0.5)
    shift = torch.randn(vocabulary) if bias else None
    labels = _labels(3, 20, vocabulary)

    def model(to: torch.dtype) -> _Head:
        rounded = [None if t is None else t.to(dtype).to(to) for t in (*parts, shift)]
        return _Head(*rounded, scale)  # type: ignore[arg-type]

    exact_model, eager_model = model(torch.float64), model(dtype)
    exact = _run(FullLoss(exact_model), exact_model, labels)
    eager = _run(FullLoss(eager_model), eager_model, labels)
    # Chunks that do not divide the number of tokens.
    result = _run(kind(find_head(eager_model), rows=7), eager_model, labels)
    assert_all_accurate(result, eager, exact, dtype)


def test_a_frozen_head_gets_no_gradient_and_a_weight_may_be_a_tensor() -> None:
    model = _Head(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = _labels(2, 9, 50)
    expected = _run(FullLoss(model), model, labels)["d_states"]
    model.lm_head.requires_grad_(False)
    result = _run(ChunkedLoss(find_head(model)), model, labels, torch.tensor(0.01))
    assert result.keys() == {"loss", "d_states"}
    torch.testing.assert_close(result["d_states"], expected)


def test_autocast_multiplies_in_its_dtype() -> None:
    model = _Head(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = _labels(2, 9, 50)
    with torch.autocast("cpu", torch.bfloat16):
        expected = _run(FullLoss(model), model, labels)
        result = _run(ChunkedLoss(find_head(model)), model, labels)
    assert {t.dtype for t in result.values()} == {torch.float32}
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-4)
    # Not what fp32 gives.
    exact = _run(FullLoss(model), model, labels)
    assert not torch.equal(result["d_states"], exact["d_states"])


@pytest.mark.parametrize("kind", [ChunkedLoss, _Static])
def test_no_label_is_no_loss(kind: type[ChunkedLoss], by_kernel: bool) -> None:
    model = _Head(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = torch.full((2, 9), IGNORED)
    result = _run(kind(find_head(model)), model, labels)
    assert float(result["loss"]) == 0
    assert not result["d_states"].any()


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
    model = _Head(torch.randn(1, tokens, 4), torch.randn(vocabulary, 4), None, 1.0)
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
    dtype = _half(by_kernel) if half else torch.float32
    matrix = torch.randn(vocabulary, width).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    model = _Head(torch.randn(1, tokens, width).to(dtype), matrix, bias, 1.0)
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
    monkeypatch.setattr(chunked_cross_entropy, "_takes_kernel", lambda *_: True)
    vocabulary, tokens, width = 1003, 64, 32
    weight, shift = torch.randn(vocabulary, width).half(), torch.randn(vocabulary).half()
    model = _Head(torch.randn(1, tokens, width).half(), weight, shift if bias else None, 1.0)
    model.lm_head.requires_grad_(trained)
    ids = torch.randint(0, vocabulary, (1, tokens))
    head = find_head(model)
    with _Products() as products:
        _Static(head, rows=16)(ids, ids).backward()
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


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_weight_is_not_rounded_and_may_be_tiny(as_tensor: bool, by_kernel: bool) -> None:
    """Hidden states of 16 bits get their gradient times weight and loss scale, rounded once."""
    dtype = _half(by_kernel)
    states, matrix = torch.randn(1, 40, 16).to(dtype), torch.randn(103, 16).to(dtype)
    model = _Head(states, matrix, None, 1.0)
    model.lm_head.requires_grad_(False)
    labels = torch.randint(0, 103, (1, 40))
    tiny = 1 / 30_000_000
    found = []
    for weight, loss_scale in ((1.0, 1.0), (torch.tensor(tiny) if as_tensor else tiny, 2.0**20)):
        loss = _Static(find_head(model), rows=16)(labels, labels, weight)
        for _ in range(2):  # The second has what the first had to start from.
            model.zero_grad()
            (loss * loss_scale).backward(retain_graph=True)
        found.append(model.states.grad)
    product = found[0].float() * (torch.tensor(tiny) * 2.0**20)
    assert torch.equal(found[1], product.to(dtype))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str) -> None:
    overrides, scale = SCALED.get(family, ({}, 1.0))
    model = build(family, **overrides)
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    ids = token_ids()
    labels = ids.clone()
    labels[0, :3] = IGNORED

    def step(loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        value = loss(ids, labels, 0.1)
        value.backward()
        return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    head = find_head(model)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert model.training
    expected, gradients = step(FullLoss(model))
    value, found = step(ChunkedLoss(head, rows=3))
    torch.testing.assert_close(value, expected)
    assert found.keys() == gradients.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_model_of_mamba_ssm_is_not_given_use_cache() -> None:
    class Backbone(nn.Module):
        def forward(self, input_ids: Tensor, inference_params: Any = None) -> Tensor:
            return functional.one_hot(input_ids, 8).float()

    class MambaLMHeadModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()
            self.lm_head = nn.Linear(8, 8, bias=False)

        def forward(
            self, input_ids: Tensor, position_ids: Any = None, inference_params: Any = None,
            num_last_tokens: int = 0, **mixer_kwargs: Any,
        ) -> _Output:  # fmt: skip
            return _Output(self.lm_head(self.backbone(input_ids, inference_params, **mixer_kwargs)))

    model = MambaLMHeadModel()
    ids = torch.randint(0, 8, (2, 6))
    loss, _ = make_loss(model)
    assert loss.name == "chunked"
    torch.testing.assert_close(loss(ids, ids), FullLoss(model)(ids, ids))


def test_a_quantised_head() -> None:
    model = build("mamba2", hidden_size=64, num_heads=16, tie_word_embeddings=False)
    quantize_model(model, "int8", target_modules=["lm_head"])
    ids = token_ids()
    torch.testing.assert_close(ChunkedLoss(find_head(model))(ids, ids), FullLoss(model)(ids, ids))


def test_scores_are_those_of_the_whole_logits(by_kernel: bool) -> None:
    model = build("mamba2")
    head = find_head(model)
    ids = token_ids(1, 12)
    hidden = head.hidden(ids)[0, :-1]
    expected = functional.cross_entropy(
        model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
    )
    torch.testing.assert_close(negative_log_likelihoods(head, hidden, ids[0, 1:]), expected)


# --- What cannot be taken apart is said. ----------------------------------------------------------


class _Capped(_Head):
    def forward(self, input_ids: Tensor) -> _Output:
        return _Output(30 * torch.tanh(super().forward(input_ids).logits / 30))


def _capped() -> nn.Module:
    return _Capped(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)


def _headless() -> nn.Module:
    model = _Head(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    model.head = model.lm_head
    del model.lm_head
    return model


def _adapted() -> nn.Module:
    model = build("mamba2", tie_word_embeddings=False)
    apply_prodial(model, ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "lm_head")))
    return model


def _hooked() -> nn.Module:
    model = build("mamba2")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_capped, r"by more than a factor \(0 -> 0, 1 -> 0\.9996, .*soft cap"),
        (_headless, "names no head"),
        (_adapted, "is a ProdialLinear"),
        (_hooked, "has hooks"),
    ],
)
def test_a_head_that_cannot_be_taken_out(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(HeadError, match=reason):
        find_head(model)
    loss, why = make_loss(model)
    assert loss.name == "full"
    assert "whole in memory" in why
    with pytest.raises(LossError, match=r"'chunked' cannot be used.*use loss 'full'"):
        make_loss(model, "chunked")


def test_a_failed_forward_leaves_the_head_as_it_was() -> None:
    model = build("mamba2")
    head = find_head(model)
    with pytest.raises((IndexError, RuntimeError)):
        head.hidden(torch.full((1, 4), 10**6))
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=token_ids()).logits.shape[-1] == 48


# --- liger-kernel. --------------------------------------------------------------------------------


def test_liger_needs_cuda() -> None:
    with pytest.raises(LossError, match="it needs a CUDA device"):
        make_loss(build("mamba2"), "liger")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'auto', 'chunked', 'liger', 'full', got 'fast'"):
        make_loss(build("mamba2"), "fast")


def test_liger_is_called_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def __init__(self, ignore_index: int, reduction: str) -> None:
            super().__init__()
            self.options = {"ignore_index": ignore_index, "reduction": reduction}

        def forward(self, lin_weight: Any, _input: Any, target: Any, bias: Any = None) -> Tensor:
            logits = functional.linear(_input, lin_weight, bias)
            return functional.cross_entropy(logits.float(), target, **self.options)

    name = "liger_kernel.transformers.fused_linear_cross_entropy"
    for path in ("liger_kernel", "liger_kernel.transformers", name):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    sys.modules[name].LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss  # type: ignore[attr-defined]
    from prodial_kernels.training.loss import LigerLoss

    model = _Head(torch.randn(2, 9, 8), torch.randn(50, 8), torch.randn(50), 0.37)
    labels = _labels(2, 9, 50)
    result = _run(LigerLoss(find_head(model)), model, labels)
    expected = _run(FullLoss(model), model, labels)
    for key, value in result.items():
        torch.testing.assert_close(value, expected[key])


def test_head_of_any_dtype_scales_as_the_model_does() -> None:
    model = build("granitemoehybrid", logits_scaling=6.0).bfloat16()
    head = find_head(model)
    assert isinstance(head, OutputHead)
    assert head.scale == pytest.approx(1 / 6, rel=1e-6)
