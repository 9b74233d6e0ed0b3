"""Documents that do not see each other: windows shared or padded, and what a model must do."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import apply_prodial
from prodial_kernels.models.layers.packed_rows import arguments_apart
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.data.batches import IGNORED, Batch, BatchSizes
from prodial_kernels.training.data.documents import (
    SharedWindows,
    best_fit,
    separate_documents,
)
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.padding import PaddedBatches
from prodial_kernels.training.data.splits import make_batches
from prodial_kernels.training.finetuning import finetune
from prodial_kernels.training.step.eager import EagerStep
from prodial_kernels.training.step.graphed import Buckets, GraphedStep
from prodial_kernels.training.step.loss import ChunkedLoss, FullLoss, find_head
from support.mixers.adapted_families import CONFIG, install_stand_in
from support.models import build, randomise_adapters
from support.tiny_model import write_text, write_tiny_model

DOCUMENTS = ["a bc", "defghij klm", "x", "nopq", "rs tuvw", "a long one that needs two windows"]


class _Mixer(nn.Module):
    """A running sum that begins anew where ``seq_idx`` changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        u = self.in_proj(u)
        same = torch.ones(u.shape[1], u.shape[1]).tril().expand(len(u), -1, -1)
        if seq_idx is not None:
            same = same * (seq_idx[:, :, None] == seq_idx[:, None, :])
        return u + torch.tanh(self.out_proj(same @ u))


class _Model(nn.Module):
    """Hands on what it is given, as mamba_ssm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.mixer = _Mixer(8)
        self.lm_head = nn.Linear(8, 300, bias=False)

    def forward(self, input_ids: Tensor, **mixer_kwargs: Any) -> Any:
        logits = self.lm_head(self.mixer(self.embedding(input_ids), **mixer_kwargs))
        return type("Output", (), {"logits": logits})


class _Forgetful(_Mixer):
    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(u)


def _batches(
    tokenizer: Any, shared: bool, batch_size: int = 2, positions: bool = False
) -> SharedWindows | PaddedBatches:
    apart = {"seq_idx", "position_ids"} if positions else {"seq_idx"} if shared else ()
    return separate_documents(DOCUMENTS, tokenizer, BatchSizes(16, batch_size), apart=apart)


def test_windows_hold_every_document_once_and_whole(byte_tokenizer: Any) -> None:
    batches = _batches(byte_tokenizer, shared=True)
    found = []
    for step in range(batches.steps_per_epoch):
        ids, labels, seq_idx, positions = batches.batch(step)
        assert seq_idx is not None
        assert positions is None
        assert ids.shape == labels.shape == seq_idx.shape == (2, 16)
        for row, learned, places in zip(ids, labels, seq_idx, strict=True):
            for place in places.unique().tolist():
                here = places == place
                # The first token of a document is read, never learned.
                assert learned[here][0] == IGNORED
                text = [int(row[here][0]), *learned[here][learned[here] != IGNORED].tolist()]
                found.append(byte_tokenizer.decode(text))
    pieces = ["a bc<eos>", "defghij klm<eos>", "x<eos>", "nopq<eos>", "rs tuvw<eos>"]
    pieces += ["a long one that ", "needs two window", "s<eos>"]
    # The epoch's last batch is filled up from the next epoch.
    assert set(found) == set(pieces)
    assert batches.n_tokens == sum(map(len, DOCUMENTS)) + len(DOCUMENTS)


def test_places_begin_again_with_every_document(byte_tokenizer: Any) -> None:
    batches = _batches(byte_tokenizer, shared=True, positions=True)
    plain = _batches(byte_tokenizer, shared=True)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch.position_ids is not None
        for numbers, places in zip(batch.seq_idx, batch.position_ids, strict=True):
            lengths = numbers.unique_consecutive(return_counts=True)[1].tolist()
            assert places.tolist() == [place for n in lengths for place in range(n)]
        assert torch.equal(batch.input_ids, plain.batch(step).input_ids)
        assert list(batch.apart) == ["seq_idx", "position_ids"]
    assert batches.fingerprint != plain.fingerprint


def test_shared_windows_of_a_hybrid_give_the_loss_of_separate_documents(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and recurrence both; adapted, on what stands in for the kernels."""
    install_stand_in(monkeypatch, "bamba")
    model = build("bamba", vocab_size=264)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    results = []
    for positions in (True, False):
        batches = _batches(byte_tokenizer, shared=positions, positions=positions, batch_size=1)
        step = EagerStep(FullLoss(model), optimizer)
        step.begin([batches.batch(n) for n in range(batches.steps_per_epoch)], 0.0)
        results.append(step.finish())
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)


def test_shared_windows_give_the_loss_of_separate_documents(byte_tokenizer: Any) -> None:
    model = _Model()
    shared, padded = _batches(byte_tokenizer, True), _batches(byte_tokenizer, False)

    def total(batches: Any, loss: Any) -> tuple[float, Tensor]:
        model.zero_grad()
        seen: dict[bytes, bool] = {}
        value = torch.zeros(())
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            for row in range(len(batch.input_ids)):
                part = Batch(*(None if t is None else t[row : row + 1] for t in batch))
                # Windows that the next epoch lends to this one's last batch.
                if seen.setdefault(part.input_ids.numpy().tobytes(), False) is True:
                    continue
                seen[part.input_ids.numpy().tobytes()] = True
                value = value + loss(part.input_ids, part.labels, **part.apart)
        value.backward()
        return value.item(), model.mixer.in_proj.weight.grad.clone()

    expected = total(padded, FullLoss(model))
    for loss in (FullLoss(model), ChunkedLoss(find_head(model), rows=5)):
        value, gradient = total(shared, loss)
        assert value == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5)
    # Without the reset the documents of a window see each other.
    leaking = sum(
        FullLoss(model)(*shared.batch(step)[:2]).item() for step in range(shared.steps_per_epoch)
    )
    assert leaking != pytest.approx(expected[0], rel=1e-3)


class _Graphs:
    def run(self, function: Callable[[], None]) -> None:
        function()

    def run_watched(self, function: Callable[[], None]) -> list[str]:
        function()
        return []

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def release(self) -> None:
        pass


def test_steps_hand_seq_idx_to_the_model(byte_tokenizer: Any) -> None:
    batches = _batches(byte_tokenizer, shared=True)
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = _Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        loss = FullLoss(model)
        step = (
            GraphedStep(loss, optimizer, Buckets(2, 16), _Graphs())
            if graphed
            else EagerStep(loss, optimizer)
        )
        results.append([])
        for number in range(4):
            step.begin([batches.batch(number)], 1e-2)
            results[-1].append(step.finish().loss)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_order_differs_between_epochs_and_any_step_is_reproducible(byte_tokenizer: Any) -> None:
    batches, again = (_batches(byte_tokenizer, shared=True, batch_size=1) for _ in range(2))
    n = batches.steps_per_epoch
    epochs = [[batches.batch(e * n + i).input_ids.tolist() for i in range(n)] for e in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert any(epoch != epochs[0] for epoch in epochs)
    assert again.batch(2 * n).input_ids.tolist() == epochs[2][0]
    assert again.fingerprint == batches.fingerprint
    other = separate_documents(
        DOCUMENTS, byte_tokenizer, BatchSizes(16, 1, seed=1), apart={"seq_idx"}
    )
    assert other.fingerprint != batches.fingerprint


def test_best_fit_fills_bins() -> None:
    assert best_fit([5, 3, 2, 7, 3], 10) == [[3, 1], [0, 4, 2]]
    assert best_fit([], 4) == []
    draw = random.Random(0)
    lengths = [draw.randint(2, 100) for _ in range(500)]
    bins = best_fit(lengths, 256)
    assert sorted(i for held in bins for i in held) == list(range(500))
    assert max(sum(lengths[i] for i in held) for held in bins) <= 256
    assert len(bins) <= 1.03 * sum(lengths) / 256 + 1
    with pytest.raises(ValueError, match="at most 4, got 5"):
        best_fit([5], 4)


def test_which_models_reset_their_state() -> None:
    model = _Model()
    assert arguments_apart(model) == {"seq_idx"}
    model.other = _Forgetful(8)
    assert not arguments_apart(model)
    # On a CPU, where there are no kernels.
    assert not any(arguments_apart(build(family)) for family in ("mamba", "mamba2", "bamba"))
    assert not arguments_apart(nn.Linear(2, 2))


def test_documents_of_a_model_that_cannot_reset_are_padded(byte_tokenizer: Any) -> None:
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 2}
    kinds = [
        type(make_batches(DOCUMENTS, byte_tokenizer, packing=packing, apart=apart, **options))
        for packing, apart in (
            ("stream", {"seq_idx"}),
            ("documents", ()),
            ("documents", {"seq_idx"}),
        )
    ]
    assert [kind.__name__ for kind in kinds] == ["PackedBatches", "PaddedBatches", "SharedWindows"]


def test_a_run_on_documents_says_how_they_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FinetuneConfig(
        model=str(write_tiny_model(tmp_path / "model")), data=str(write_text(tmp_path / "a.txt")),
        output=str(tmp_path / "run"), packing="documents", steps=2, seq_len=32, batch_size=2,
        eval_every=0, warmup=0,
    )  # fmt: skip
    result = finetune(config)
    assert "padded one by one: this model cannot reset its state" in capsys.readouterr().err
    assert result.steps == 2


def test_nothing_to_learn(byte_tokenizer: Any) -> None:
    for apart in (("seq_idx",), ()):
        with pytest.raises(DataError, match="to train on"):
            separate_documents([""], byte_tokenizer, BatchSizes(8, 1), apart=apart)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        separate_documents(["ab"], byte_tokenizer, BatchSizes(1, 1))
