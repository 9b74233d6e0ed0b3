"""``chunk_loss``: a model's own loss and gradients, from logits that are never whole."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels import ProdialConfig, apply_prodial, chunk_loss, merge_prodial
from prodial_kernels.testing import assert_all_accurate
from prodial_kernels.training.data.batches import IGNORED
from prodial_kernels.training.step import model_loss
from prodial_kernels.training.step.loss import LossError
from support.models import FAMILIES, build

# Whose other kernels (of experts) know no fp64.
IN_FP64 = ("mamba", "mamba2", "falcon_h1", "zamba2")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that do not divide the number of tokens."""
    monkeypatch.setattr(model_loss, "chunk_rows", lambda *_: 7)


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 48, (2, 12))
    labels = ids.clone()
    labels[0, :5] = IGNORED
    return ids, labels


def value_and_gradients(model: Any, ids: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=labels, use_cache=False, **more)
    output["loss"].backward()
    gradients = {f"d_{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output["loss"].detach(), **gradients}


def in_fp64(model: Any, ids: Tensor, labels: Tensor, items: int | None) -> dict[str, Tensor]:
    """What transformers would compute, which rounds all logits to fp32, in fp64."""
    exact = copy.deepcopy(model).double()
    hidden = exact.base_model(input_ids=ids, use_cache=False)[0]
    logits = exact.lm_head(hidden) * getattr(model.config, "lm_head_multiplier", 1.0)
    assert logits.dtype == torch.float64
    logits = logits[:, :-1].flatten(0, 1)
    sum_or_mean = "mean" if items is None else "sum"
    loss = functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=sum_or_mean
    )
    loss = loss / (items or 1)
    loss.backward()
    gradients = {f"d_{n}": p.grad for n, p in exact.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _by_place(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, the head's gradient, and all below as one: its rounding is the layers' own."""
    below = [t.flatten() for name, t in values.items() if name not in ("loss", "d_lm_head.weight")]
    head = {name: t for name, t in values.items() if name in ("loss", "d_lm_head.weight")}
    return {**head, "d_below": torch.cat(below)}


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("family", IN_FP64)
def test_loss_and_gradients_keep_the_accuracy_rule(family: str, items: int | None) -> None:
    options = {"lm_head_multiplier": 0.3} if family == "falcon_h1" else {}
    model = build(family, **options).train()
    ids, labels = tokens()
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    exact = in_fp64(model, ids, labels, items)
    eager = value_and_gradients(model, ids, labels, **more)
    with chunk_loss(model):
        result = value_and_gradients(model, ids, labels, **more)
    compared = [_by_place(values) for values in (result, eager, exact)]
    assert_all_accurate(*compared, torch.float32)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_as_by_itself(family: str) -> None:
    model = build(family).train()
    apply_prodial(model, ProdialConfig(r=2))
    ids, labels = tokens()
    own = value_and_gradients(model, ids, labels)
    applied = chunk_loss(model)
    found = value_and_gradients(model, ids, labels)
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    output = model(input_ids=ids, labels=labels)
    assert output.logits is None
    # Without labels, and outside training, the model is what it was.
    assert model(input_ids=ids).logits.shape == (2, 12, 48)
    model.eval()
    assert model(input_ids=ids, labels=labels).logits.shape == (2, 12, 48)
    applied.remove()
    model.train()
    assert model(input_ids=ids, labels=labels).logits is not None
    assert type(model) is type(build(family))


def test_arguments_of_transformers_loss() -> None:
    model = build("mamba2").train()
    ids, labels = tokens()
    other = labels.masked_fill(labels == IGNORED, -1)
    shifted = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (labels, {"num_items_in_batch": 3}),
        (labels, {"num_items_in_batch": torch.tensor(7)}),
        (other, {"ignore_index": -1}),
        (labels, {"shift_labels": shifted.flip(1)}),
        # None to learn from: NaN by itself, too.
        (torch.full_like(labels, IGNORED), {}),
        (torch.full_like(labels, IGNORED), {"num_items_in_batch": 3}),
    ]
    own = [value_and_gradients(model, ids, values, **more)["loss"] for values, more in cases]
    with chunk_loss(model):
        found = [value_and_gradients(model, ids, values, **more)["loss"] for values, more in cases]
        as_tuple = model(input_ids=ids, labels=labels, return_dict=False)
    torch.testing.assert_close(found, own, equal_nan=True)
    assert own[4].isnan()
    torch.testing.assert_close(as_tuple[0], value_and_gradients(model, ids, labels)["loss"])


def test_evaluation_is_chunked_where_it_is_asked_for() -> None:
    model = build("mamba").eval()
    ids, labels = tokens()
    own = model(input_ids=ids, labels=labels).loss
    with chunk_loss(model, evaluation=True), torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, own)


def test_copies_pickles_and_merges(tmp_path: Path) -> None:
    model = build("mamba2").train()
    apply_prodial(model, ProdialConfig(r=2))
    chunk_loss(model)
    ids, labels = tokens()
    own = model(input_ids=ids, labels=labels)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.zero_()
        output = other(input_ids=ids, labels=labels)
        # A head of its own.
        torch.testing.assert_close(output.loss, torch.tensor(48.0).log())
        assert output.logits is None
    merge_prodial(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, own.loss)
    model.save_pretrained(tmp_path)
    assert '"Mamba2ForCausalLM"' in (tmp_path / "config.json").read_text()


def test_a_loss_that_reads_the_logits_is_refused() -> None:
    with pytest.raises(LossError, match=r"is not the cross-entropy of its logits alone: .* nan"):
        chunk_loss(build("bamba", z_loss_coefficient=0.1))


def test_a_loss_of_the_users_own_is_refused() -> None:
    model = build("mamba2")
    model.loss_function = lambda logits, labels, **_: logits.float().mean()
    with pytest.raises(LossError, match="is not the cross-entropy of its logits alone"):
        chunk_loss(model)
    assert model(input_ids=tokens()[0]).logits is not None


def test_what_cannot_be_chunked_says_why() -> None:
    with pytest.raises(LossError, match="Linear cannot be chunked: it is no causal language model"):
        chunk_loss(nn.Linear(2, 2))
    model = build("mamba2")
    chunk_loss(model)
    with pytest.raises(LossError, match="chunked already"):
        chunk_loss(model)
    hooked = build("mamba2")
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(LossError, match="has hooks"):
        chunk_loss(hooked)
    taken = build("mamba2")
    taken.forward = taken.forward
    with pytest.raises(LossError, match="as accelerate does when a trainer takes the model"):
        chunk_loss(taken)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
def test_in_trainer_the_losses_are_its_own(tmp_path: Path, wrapped: bool) -> None:
    """With accumulation, so that num_items_in_batch counts; rows have unequal numbers of labels."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = []
    for i in range(12):
        ids = [3 + (i * j) % 40 for j in range(10)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (i % 5) + ids[i % 5 :]})

    def losses(chunked: bool) -> list[float]:
        torch.manual_seed(0)
        model = build("mamba2")
        if wrapped:
            peft = pytest.importorskip("peft")
            from prodial_kernels.peft import ProdialPeftConfig

            model = peft.get_peft_model(model, ProdialPeftConfig(r=2))
        else:
            apply_prodial(model, ProdialConfig(r=2))
        if chunked:
            chunk_loss(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_accumulation_steps=2, logging_steps=1, report_to=[], disable_tqdm=True,
            use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        names = ("loss", "grad_norm", "eval_loss")
        return [record[name] for record in trainer.state.log_history for name in names
                if name in record]  # fmt: skip

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
