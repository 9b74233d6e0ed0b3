"""Captured blocks on a device: equal steps, dropout, checkpointing, memory, loops of others."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, capture
from prodial_kernels.captured import Captured, CaptureWarning, program
from prodial_kernels.captured.checkpointing import checkpoints_outside
from prodial_kernels.captured.cuda import CudaEngine
from prodial_kernels.captured.model import capture_with
from support import mamba_ssm_loaded  # noqa: F401
from support.models import build, randomise_adapters, token_ids

pytestmark = [
    pytest.mark.gpu,
    # Of mamba_ssm's own use of torch and Triton, and of names that transformers gives up.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LAYERS = 4
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16, "num_hidden_layers": LAYERS},
    "mamba2": {
        "num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64,
        "num_hidden_layers": LAYERS,
    },
    "falcon_mamba": {"state_size": 16, "num_hidden_layers": LAYERS},
    "bamba": _MIXER,
    "falcon_h1": {**_MIXER, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
                  "mamba_d_ssm": 512, "num_hidden_layers": LAYERS},
    "zamba2": {"n_mamba_heads": 8, "mamba_d_state": 32, "chunk_size": 64},
}  # fmt: skip


def model_of(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = build(name, hidden_size=256, **OPTIONS[name]).to(dtype)
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1, lora_dropout=dropout))
    randomise_adapters(model)
    return model.cuda()


def ids(seed: int = 1, batch: int = 2, length: int = 96) -> Tensor:
    return token_ids(batch, length, seed).cuda()


def step(model: nn.Module, tokens: Tensor, **options: Any) -> float:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    bound: float = 1e-2,
    again: dict[str, Tensor] | None = None,
) -> None:
    """Within what the order of upstream's atomic sums makes: in the mean, or as measured.

    ``again`` are the expected gradients of a second run: twice what they differ by may be added.
    """
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        wanted = expected[name].float()
        noise = 0.0 if again is None else (again[name].float() - wanted).norm()
        error = (gradient.float() - wanted).norm()
        assert error <= bound * wanted.norm() + 2 * noise + 1e-7, name


def blocks_of(captured: Captured) -> int:
    """How many are replayed, over all shapes."""
    programs = captured._chain.programs.values()
    return sum(section.blocks for program in programs for section in program.sections)


def sections_of(captured: Captured) -> list[int]:
    """How many blocks share each graph."""
    (program,) = captured._chain.programs.values()
    return [section.blocks for section in program.sections]


def warmed(
    model: nn.Module, *, norms: bool = False, together: bool = True, **options: Any
) -> Captured:
    engine = CudaEngine(torch.device("cuda"))
    captured = capture_with(model, engine, norms=norms, together=together)
    for _ in range(2):
        step(model, ids(), **options)
    model.zero_grad(set_to_none=True)
    return captured


def same_step(model: nn.Module, plain: nn.Module, seed: int) -> None:
    """A step of both from one seed; the plain one's again says what the order of sums makes."""

    def stepped(one: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(seed)
        return step(one, ids(seed)), gradients(one)

    loss, found = stepped(model)
    expected, wanted = stepped(plain)
    assert loss == pytest.approx(expected, rel=1e-4)
    close(found, wanted, again=stepped(plain)[1])


@pytest.mark.parametrize(
    ("name", "together"), [*((name, True) for name in OPTIONS), ("mamba", False), ("mamba2", False)]
)
def test_every_family(name: str, together: bool) -> None:
    model = model_of(name)
    plain = copy.deepcopy(model)
    with warmed(model, together=together) as captured:
        for seed in (3, 4, 5):
            same_step(model, plain, seed)
        assert blocks_of(captured) >= 3
    assert step(model, ids(3)) == pytest.approx(step(plain, ids(3)), rel=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_nodes_that_others_hold_see_whole_gradients_only(name: str) -> None:
    """As DistributedDataParallel does, from when a model is wrapped, on the stream of then."""
    model = model_of(name)
    plain = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in trained]  # type: ignore[union-attr]
    seen: list[int] = []
    for number, node in enumerate(nodes):
        node.register_hook(lambda *_, number=number: seen.append(number))  # type: ignore[misc]
    with warmed(model) as captured:
        seen.clear()
        for seed in (3, 4):
            same_step(model, plain, seed)
        assert sorted(seen) == sorted([*range(len(trained))] * 2)
        assert blocks_of(captured) == LAYERS


def test_experts_are_left_out_and_said() -> None:
    """A mixture of experts waits for the device, or is captured where it does not."""
    model = build("jamba", hidden_size=256, mamba_d_state=16).bfloat16()
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1))
    randomise_adapters(model)
    model.cuda()
    plain = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CaptureWarning)
        with warmed(model) as captured:
            step(model, ids(3))
            step(plain, ids(3))
            close(gradients(model), gradients(plain), 3e-2)
            left = len(captured._chain.blocks) - blocks_of(captured)
    said = [str(w.message) for w in caught if w.category is CaptureWarning]
    assert bool(left) == bool(said), said


def test_fused_norms_change_no_more_than_rounding() -> None:
    model = model_of("mamba2")
    plain = copy.deepcopy(model)
    with warmed(model, norms=True):
        assert step(model, ids(3)) == pytest.approx(step(plain, ids(3)), rel=1e-2)
        close(gradients(model), gradients(plain), 0.1)
    assert not any("prodial_fused" in vars(module) for module in model.modules())


def test_accumulation_optimisers_evaluation_and_generation() -> None:
    model = model_of("mamba2", dtype=torch.float32)
    plain = copy.deepcopy(model)
    losses: list[list[float]] = []
    for one in (model, plain):
        captured = capture(one, norms=False) if one is model else None
        optimizer = torch.optim.AdamW(
            [p for p in one.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        found = []
        for number in range(6):
            found += [step(one, ids(2 * number)), step(one, ids(2 * number + 1))]
            found.append(float(nn.utils.clip_grad_norm_(one.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            if number == 3:
                one.eval()
                with torch.no_grad():
                    found.append(float(one(ids(), labels=ids()).loss))
                tokens = one.generate(ids(length=8), max_new_tokens=4, do_sample=False)
                assert tokens.shape == (2, 12)
                one.train()
        losses.append(found)
        if captured is not None:
            assert blocks_of(captured) == LAYERS
            captured.release()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def checkpointing(model: Any) -> None:
    if checkpoints_outside(model.backbone.layers[0]):
        pytest.skip("this transformers checkpoints around a block's forward")
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_draws_what_it_would_have_drawn(checkpointed: bool) -> None:
    model = model_of("mamba2", dropout=0.3)
    if checkpointed:
        checkpointing(model)
    plain = copy.deepcopy(model)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    with warmed(model) as captured:
        results = []
        for one in (model, plain):
            torch.manual_seed(7)
            results.append([step(one, ids(3)), step(one, ids(4)), generator.get_offset()])
        assert blocks_of(captured) == LAYERS
        assert all(p.sections[0].draws for p in captured._chain.programs.values())
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    close(gradients(model), gradients(plain))


@pytest.mark.parametrize(("name", "dropout"), [("mamba", 0.0), ("mamba2", 0.0), ("mamba2", 0.3)])
def test_recomputed_first_blocks_give_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, dropout: float
) -> None:
    monkeypatch.setattr(program, "RECOMPUTED_FROM", LAYERS)
    monkeypatch.setattr(program, "RECOMPUTED", 2)
    model = model_of(name, dropout=dropout)
    plain = copy.deepcopy(model)
    with warmed(model) as captured:
        for seed in (3, 4):
            same_step(model, plain, seed)
        assert sections_of(captured) == [2, LAYERS - 2]


def test_a_checkpointed_block_keeps_its_input_only() -> None:
    peaks = []
    for checkpointed in (False, True):
        model = model_of("mamba2")
        if checkpointed:
            checkpointing(model)
        with capture(model) as captured:
            for _ in range(3):
                step(model, ids(batch=8, length=1024))
            assert blocks_of(captured) == LAYERS
            peaks.append(captured._chain.engine.pool_bytes())  # type: ignore[attr-defined]
    assert peaks[1] < 0.6 * peaks[0]


def test_autocast_and_a_scaler() -> None:
    model = model_of("mamba2", dtype=torch.float32)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with capture(model, norms=False) as captured:
        for seed in (1, 2, 3, 4):
            for one in (model, plain):
                one.zero_grad()
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = one(input_ids=ids(seed), labels=ids(seed), use_cache=False).loss
                scaler.scale(loss).backward()
        assert blocks_of(captured) == LAYERS
        close(gradients(model), gradients(plain), 2e-2)


def test_other_shapes_share_the_pool_and_release_gives_it_back() -> None:
    model = model_of("mamba2")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    plain = copy.deepcopy(model)
    captured = capture(model, norms=False)
    sizes = []
    for length in (512, 256, 384):
        for _ in range(3):
            step(model, ids(batch=4, length=length))
        sizes.append(captured._chain.engine.pool_bytes())  # type: ignore[attr-defined]
    assert blocks_of(captured) == 3 * LAYERS
    assert sizes[2] <= 1.3 * sizes[0]
    model.zero_grad()
    for length in (256, 512, 384):
        step(model, ids(3, batch=4, length=length))
        step(plain, ids(3, batch=4, length=length))
    close(gradients(model), gradients(plain))
    captured.release()
    assert captured._chain.engine.pool_bytes() == 0  # type: ignore[attr-defined]
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (64 << 20)


def test_memory_is_near_that_of_launched_steps() -> None:
    """What a step takes from the device: the allocator's peak, and what graphs use beside it.

    Above it are a cuBLAS workspace (32 MiB on Hopper), which each stream has for itself, what
    rounds the pool's segments up, and what backward of one block needs, which the loss cannot
    borrow from the pool: much beside few and small blocks (an H200 showed 346 MiB for 281),
    31 MiB of 2,203 for Mamba-130M at 4x512.
    """
    peaks = []
    for captures in (False, True):
        model = model_of("mamba")
        captured = capture(model) if captures else None
        for _ in range(4):
            step(model, ids(batch=8, length=1024))
        model.zero_grad()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(model, ids(batch=8, length=1024))
        torch.cuda.synchronize()
        hidden = sum(
            s["total_size"] - s["allocated_size"]
            for s in torch.cuda.memory_snapshot()
            if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
        )
        peaks.append(torch.cuda.max_memory_allocated() + hidden)
        if captured is not None:
            assert blocks_of(captured) == LAYERS
            captured.release()
        del model, captured
    assert peaks[1] <= peaks[0] + (80 << 20), (
        f"{peaks[1] / 2**20:.0f} MiB, launched {peaks[0] / 2**20:.0f}"
    )


def test_kept_hidden_states_and_late_hooks_separate_the_blocks() -> None:
    model = model_of("mamba")
    plain = copy.deepcopy(model)
    with warmed(model) as captured:
        step(model, ids())
        model.zero_grad()
        assert sections_of(captured) == [LAYERS]
        with pytest.warns(CaptureWarning, match="is kept: from now on each block"):
            output = model(input_ids=ids(3), labels=ids(3), output_hidden_states=True)
        (output.loss + output.hidden_states[1].pow(2).mean()).backward()
        del output
        output = plain(input_ids=ids(3), labels=ids(3), output_hidden_states=True)
        (output.loss + output.hidden_states[1].pow(2).mean()).backward()
        close(gradients(model), gradients(plain))
        for _ in range(3):
            step(model, ids())
        assert sections_of(captured) == [1] * LAYERS
        model.zero_grad()
        step(model, ids(3))
        step(plain, ids(3))
        close(gradients(model), gradients(plain))


def test_hidden_states_that_are_kept() -> None:
    model = model_of("mamba2", dtype=torch.float32)
    plain = copy.deepcopy(model)
    with warmed(model, together=False):
        results = []
        for one in (model, plain):
            output = one(input_ids=ids(3), labels=ids(3), output_hidden_states=True)
            (output.loss + output.hidden_states[1].pow(2).mean()).backward()
            results.append([state.detach() for state in output.hidden_states])
            del output
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        close(gradients(model), gradients(plain))


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_models_of_mamba_ssm(layer: str) -> None:
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    options = MambaConfig(d_model=256, n_layer=4, vocab_size=512, ssm_cfg={"layer": layer})
    torch.manual_seed(0)
    model = MambaLMHeadModel(options, device="cuda", dtype=torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=8))
    model.cpu()
    randomise_adapters(model)
    model.cuda().train()
    plain = copy.deepcopy(model)

    def run(one: Any, tokens: Tensor) -> float:
        logits = one(tokens).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return float(loss.detach())

    with capture(model) as captured:
        for seed in range(4):
            assert run(model, ids(seed)) == pytest.approx(run(plain, ids(seed)), rel=1e-3)
            close(gradients(model), gradients(plain), 2e-2)
        assert blocks_of(captured) == 4


def test_a_graph_of_the_whole_step_is_left_to_its_owner() -> None:
    model = model_of("mamba2")
    with warmed(model) as captured:
        step(model, ids())
        model.zero_grad()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        tokens = ids()

        def whole() -> None:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

        captured.release()
        with torch.cuda.stream(stream):
            whole()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        again = capture(model, norms=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole()
        graph.replay()
        assert blocks_of(again) == 0
        again.release()
    assert all(g.isfinite().all() for g in gradients(model).values())


def _trained(folder: Path, callbacks: list[Any]) -> list[float]:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = model_of("mamba2")
    rows = [{"input_ids": row, "labels": row} for row in token_ids(32, 96)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, report_to=[],
            gradient_accumulation_steps=2, logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
            eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, seed=1,
        ),
        train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    keys = ("loss", "eval_loss", "grad_norm")
    return [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]


def test_in_trainer(tmp_path: Path) -> None:
    from prodial_kernels.captured.callback import CaptureCallback

    class Counting(CaptureCallback):
        graphs = 0

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            assert self.captured is not None
            self.graphs = blocks_of(self.captured)
            super().on_train_end(*args, **kwargs)

    if torch.cuda.device_count() > 1:
        pytest.skip("Trainer would use nn.DataParallel, which capture() refuses")
    callback = Counting(norms=False)
    found = _trained(tmp_path / "captured", [callback])
    assert callback.graphs == LAYERS
    assert found == pytest.approx(_trained(tmp_path / "plain", []), rel=2e-2)


def test_a_step_is_launched_in_less_time() -> None:
    """The host's part of it, which is what a small model waits for."""
    import time

    model = model_of("mamba2")

    def host_time(run: Callable[[], Any]) -> float:
        best = 1.0
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        return best

    tokens = ids(batch=1, length=64)

    def forward_and_backward() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    forward_and_backward()
    forward_and_backward()
    launched = host_time(forward_and_backward)
    with capture(model):
        for _ in range(3):
            forward_and_backward()
        replayed = host_time(forward_and_backward)
    assert replayed < 0.6 * launched, f"{1e3 * replayed:.2f} ms, launched {1e3 * launched:.2f}"
