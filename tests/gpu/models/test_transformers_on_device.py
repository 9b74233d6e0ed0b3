"""transformers' Mamba models, adapted, on the real kernels of mamba-ssm and causal-conv1d.

The exact values are those of transformers' own PyTorch functions in fp32, on plain linear layers
with weight W'; the same-dtype ones come from its unfused kernels, also on plain linear layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.linear import OFFSET
from prodial_kernels.models.mixers import hf
from prodial_kernels.models.mixers.arguments import is_cache
from prodial_kernels.models.mixers.hf import fused_function, unfused_forward
from support import mamba_ssm_loaded  # noqa: F401
from support.captured.on_device import captured
from support.mixers.adapted_families import forbid_reading_the_weight
from support.mixers.device_oracle import (
    assert_accurate_in_the_mean,
    modeling_of,
    pytorch_functions,
    tensors,
    with_effective_weights,
    without_fused_functions,
)
from support.models import Step, build, decoded, randomise_adapters, token_ids, training_step

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CONFIG = ProdialConfig(r=8, lora_alpha=1, block_size={"in_proj": 16, "out_proj": 32})
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
_GATE_FIRST = {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
    "bamba": _MIXER,
    "falcon_h1": {**_MIXER, **_GATE_FIRST, "mamba_d_ssm": 512},
}


def plain(name: str, dtype: torch.dtype) -> nn.Module:
    # Rounded to 16 bits in every dtype, so that all start from the same weights.
    model = build(name, hidden_size=256, **OPTIONS[name]).bfloat16()
    return model.to(DEVICE, dtype)


def adapted(name: str, config: ProdialConfig = CONFIG) -> nn.Module:
    model = plain(name, torch.bfloat16).cpu()
    apply_prodial(model, config)
    randomise_adapters(model)
    return model.to(DEVICE)


def ids() -> Tensor:
    return token_ids(2, 96).to(DEVICE)


def oracle(name: str, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    reference = plain(name, dtype).requires_grad_(False)
    return with_effective_weights(reference, model, DEVICE)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    modeling = modeling_of(model)
    mixers = [module for module in model.modules() if fused_function(module)]
    ours = "fused_mamba" if name == "mamba" else "scan_and_project"
    original, calls = getattr(hf, ours), []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(ours)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        forbid_reading_the_weight(patch)
        patch.setattr(hf, ours, recorded)
        result = tensors(training_step(model, ids()))
    assert len(calls) == len(mixers)

    with pytorch_functions(modeling):
        exact = tensors(training_step(oracle(name, model, torch.float32), ids()))
    unfused = without_fused_functions(oracle(name, model, torch.bfloat16))
    eager = tensors(training_step(unfused, ids()))
    assert_accurate_in_the_mean(result, exact, eager)


MORE_OPTIONS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "falcon_mamba": {"state_size": 16},
    "jamba": {"mamba_d_state": 16, "mamba_dt_rank": 16},
    "zamba": {"mamba_d_state": 16, "mamba_dt_rank": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 64, "mamba_d_state": 32, "chunk_size": 64},
    "granitemoehybrid": _MIXER,
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "chunk_size": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_OPTIONS)
def test_state_space_parameters(name: str) -> None:
    """A_log, D, the step's bias and the convolution, trained through whatever the family runs.

    Over several batches: a gradient of a handful of numbers, as A_log's is, has from batch to batch
    a tenth to three times the error of plain PyTorch's, whose errors scatter as much.
    """
    OPTIONS.setdefault(name, MORE_OPTIONS[name])
    config = ProdialConfig(r=8, lora_alpha=1, train_ssm="all")
    model = adapted(name, config)
    moved = {n: p for n, p in model.named_parameters() if OFFSET in n}
    with torch.no_grad():
        for offset in moved.values():
            offset.add_(torch.randn_like(offset) * 0.1)
    names = {own.replace(OFFSET, ""): own for own in moved}

    def plain_model(dtype: torch.dtype) -> nn.Module:
        reference = oracle(name, model, dtype)
        for own in moved:
            path, _, leaf = own.replace(OFFSET, "").rpartition(".")
            parameter = reference.get_submodule(path)._parameters[leaf]
            # As the model reads it, rounded.
            parameter.data = getattr(model.get_submodule(path), leaf).detach().to(dtype)
            parameter.requires_grad_()
        return reference

    exactly, fused = plain_model(torch.float32), plain_model(torch.bfloat16)
    separate = without_fused_functions(plain_model(torch.bfloat16))
    # The squares of ours, of separate kernels and of upstream's own fused ones, and of the values.
    squares = {own: torch.zeros(4, device=DEVICE) for own in moved}
    for seed in range(1, 9):
        tokens = token_ids(2, 96, seed).to(DEVICE)
        with pytorch_functions(modeling_of(model)):
            exact = trained_offsets(training_step(exactly, tokens), names)
        found = [trained_offsets(training_step(model, tokens), {own: own for own in moved})]
        found += [trained_offsets(training_step(m, tokens), names) for m in (separate, fused)]
        for own, total in squares.items():
            assert found[0][own].count_nonzero() > 0, f"{own} is dead"
            value = exact[own].float()
            errors = [one[own].float() - value for one in found]
            total += torch.stack([tensor.norm() ** 2 for tensor in (*errors, value)])
    for own, total in squares.items():
        error, apart, upstream, size = total.sqrt().tolist()
        print(f"{own}: {error:.2e}, separate {apart:.2e}, upstream fused {upstream:.2e}")
        allowed = 2 * max(apart, upstream) + torch.finfo(torch.bfloat16).eps / 2 * size
        assert error <= allowed, f"{own}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", MORE_OPTIONS)
def test_the_doctor_is_right_with_the_real_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's LoRA gets a gradient where it says so, and none where it says so."""
    from prodial_kernels.models.diagnosis import doctor
    from support.mixers.real_lora import live_loras, said

    monkeypatch.setattr(doctor, "_REFUSED_TYPES", ())
    model = build(name, hidden_size=256, **MORE_OPTIONS[name]).to(DEVICE, torch.bfloat16)
    statuses = said(model)
    live = live_loras(model, "all-linear", monkeypatch)
    assert live == {path: status == doctor.ADAPTED for path, status in statuses.items()}


def trained_offsets(step: Step, names: dict[str, str]) -> dict[str, Tensor]:
    return {own: step.gradients[name] for name, own in names.items()}


def test_another_fused_function_is_followed_by_the_projector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a hub kernel would be: one that does not bring mamba-ssm's rule along."""
    model = adapted("mamba2")
    expected = tensors(training_step(model, ids()))
    modeling = modeling_of(model)
    original, widths = modeling.mamba2_split_conv1d_scan_combined, []

    def foreign(*args: Any, **kwargs: Any) -> Tensor:
        output = original(*args, **kwargs)
        widths.append(output.shape[-1])
        return output

    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", foreign)
    for name, tensor in tensors(training_step(model, ids())).items():
        assert (tensor - expected[name]).norm() <= 0.03 * expected[name].norm(), name
    assert widths == [512, 512], "it stopped before the projection"


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_training_evaluation_and_decoding_agree(name: str) -> None:
    model = adapted(name)
    trained = training_step(model, ids()).logits
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids(), use_cache=False).logits
        one_by_one = decoded(model, ids()[:, :24])
    for other in (evaluated[:, :24], one_by_one):
        difference = (other.float() - trained[:, :24].float()).norm()
        assert difference < 0.05 * trained[:, :24].float().norm()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_cache_in_training_is_filled(name: str) -> None:
    """The fused path has no states to write, whatever the cache is called."""
    filled = []
    for model in (plain(name, torch.bfloat16), plain(name, torch.bfloat16)):
        if filled:
            apply_prodial(model, CONFIG)
        with torch.no_grad():
            output = model.train()(input_ids=ids(), use_cache=True)
        cache = next(value for key, value in output.items() if is_cache(key, value))
        states = [vars(layer) for layer in cache.layers]
        filled.append([output.logits, *tensors_in(states)])
    assert len(filled[0]) == len(filled[1]) > 2
    for found, expected in zip(*filled, strict=True):
        assert expected.norm() > 0
        assert (found.float() - expected.float()).norm() <= 0.05 * expected.float().norm()


def tensors_in(states: Any) -> list[Tensor]:
    """The floating-point tensors in nested lists, tuples and dicts, in order."""
    if isinstance(states, Tensor):
        return [states] if states.is_floating_point() else []
    if not isinstance(states, list | tuple | dict):
        return []
    parts = states.values() if isinstance(states, dict) else states
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_fused_training_needs_less_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeping the fast path is for."""

    def peak(model: nn.Module) -> int:
        mixer = next(module for module in model.modules() if fused_function(module))
        x = torch.randn(4, 2048, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            mixer(x).float().square().mean().backward()
            used = torch.cuda.max_memory_allocated() - before
            model.zero_grad(set_to_none=True)
            x.grad = None
        return used

    fused = peak(adapted(name))
    policy = "mamba_forward" if name == "mamba" else "ssd_forward"
    monkeypatch.setattr(f"prodial_kernels.models.mixers.hf.{policy}", unfused_forward)
    unfused = peak(adapted(name))
    print(f"{name}: fused {fused / 2**20:.0f} MiB, unfused {unfused / 2**20:.0f} MiB")
    assert fused < 0.9 * unfused


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_cuda_graph_replays_a_mixer(name: str) -> None:
    model = adapted(name)
    mixer = next(module for module in model.modules() if fused_function(module))
    trained = [p for p in mixer.parameters() if p.requires_grad]
    x = torch.randn(2, 96, 256, device=DEVICE, dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        output = mixer(x)
        return [output, *torch.autograd.grad(output.float().square().mean(), trained)]

    replay, results = captured(step)
    replay()
    stale = [result.clone() for result in results]
    x.copy_(torch.randn_like(x))
    replay()
    # Upstream's Mamba-1 scan adds up gradients atomically and rounds the sums to bf16: elements
    # differ by a few percent from run to run, norms by much less.
    for got, expected, again, old in zip(results, step(), step(), stale, strict=True):
        noise, size = (again - expected).float().norm(), expected.float().norm()
        assert (got - expected).float().norm() <= 1e-2 * size + 2 * noise
        assert (old - expected).float().norm() > 0.1 * size > 0, "the comparison would see old ones"
