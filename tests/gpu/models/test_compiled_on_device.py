"""Adapted models in torch.compile on a device: whole steps in one graph, and the Trainer's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from prodial_kernels import ProdialConfig, apply_prodial
from support import mamba_ssm_loaded  # noqa: F401
from support.models import build, randomise_adapters, token_ids

pytestmark = [
    pytest.mark.gpu,
    # Of mamba_ssm's own use of torch and Triton, of names that transformers gives up, of inductor.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model_of(name: str) -> nn.Module:
    options: dict[str, Any] = {"state_size": 16, "num_hidden_layers": 2}
    if name == "mamba2":
        options |= {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64}
    model = build(name, hidden_size=256, **options).to(torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1))
    randomise_adapters(model)
    return model.cuda()


def steps_of(model: nn.Module, run: Callable[..., Any]) -> list[dict[str, Tensor]]:
    """Losses and gradients of some steps; a graph is recorded in the second or third."""
    found = []
    for number in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        ids = token_ids(2, 96, number).cuda()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().float().clone(), **grads})
        model.zero_grad(set_to_none=True)
    return found


def assert_same(model: nn.Module, **options: Any) -> None:
    """Within what rounding in another order makes: 2% of a gradient's norm, in every step."""
    plain = copy.deepcopy(model)
    expected = steps_of(plain, plain)
    for one, other in zip(steps_of(model, torch.compile(model, **options)), expected, strict=True):
        assert one.keys() == other.keys()
        assert len(one) > 4
        for name, value in one.items():
            assert (value - other[name]).norm() <= 2e-2 * other[name].norm() + 1e-7, name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_one_graph_with_the_results_of_eager_steps(name: str, mode: str) -> None:
    assert_same(model_of(name), fullgraph=True, mode=mode)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # With reduce-overhead: forward and backward are CUDA graphs, not launched after all.
    assert not counters["inductor"]["cudagraph_skips"]


def test_mamba2_around_what_upstream_does_not_let_it_trace() -> None:
    assert_same(model_of("mamba2"))
    assert counters["stats"]["unique_graphs"] >= 1


def test_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = model_of("mamba")
    losses = []
    for number, one in enumerate((copy.deepcopy(model), model)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(number)), per_device_train_batch_size=2, max_steps=3,
            bf16=True, report_to=[], logging_steps=1, disable_tqdm=True, seed=1,
            save_strategy="no", torch_compile=number == 1,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in token_ids(6, 96)]
        trainer = Trainer(model=one, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
