"""Everything frozen in 4 or 8 bits, on the real kernels: output, gradients, memory of every family.

The exact values are those of transformers' own PyTorch functions in fp32 on plain linear layers
with weight W', made from the dequantised weights; the same-dtype ones come from its unfused
kernels. Every expert is chosen, so that no rounding can choose another one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.models.layers.recompute import CHECKPOINT, OFFLOAD, apply_levels
from prodial_kernels.quantization.model import make_dense
from prodial_kernels.quantization.modules.experts import QuantizedExperts
from support import mamba_ssm_loaded  # noqa: F401
from support.mixers.device_oracle import (
    assert_accurate_in_the_mean,
    modeling_of,
    pytorch_functions,
    tensors,
    with_effective_weights,
    without_fused_functions,
)
from support.models import build, randomise_adapters, token_ids, training_step

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "falcon_mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
    "jamba": {"mamba_d_state": 16, "mamba_dt_rank": 16, "num_experts": 3, "num_experts_per_tok": 3},
    "zamba": {"mamba_d_state": 16, "mamba_dt_rank": 16},
    "bamba": _MIXER,
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 64, "mamba_d_state": 32, "chunk_size": 64},
    "falcon_h1": {
        **_MIXER, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_d_ssm": 512,
    },
    "granitemoehybrid": {**_MIXER, "num_local_experts": 3, "num_experts_per_tok": 3},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "chunk_size": 64,
        "n_routed_experts": 3, "num_experts_per_tok": 3,
    },
}  # fmt: skip


def stored(name: str, format: str = "nf4") -> nn.Module:
    model = build(name, hidden_size=256, **OPTIONS[name]).bfloat16().to(DEVICE)
    quantize_model(model, format, target_modules="all")
    return model


def ids() -> Tensor:
    return token_ids(2, 96).to(DEVICE)


def oracle(dense: nn.Module, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    reference = copy.deepcopy(dense).to(dtype).requires_grad_(False)
    return with_effective_weights(reference, model, DEVICE)


@pytest.mark.parametrize(
    ("name", "format"),
    [*((name, "nf4") for name in OPTIONS), ("nemotron_h", "int8"), ("nemotron_h", "fp8")],
)
def test_output_and_gradients(name: str, format: str) -> None:
    model = stored(name, format)
    dense = copy.deepcopy(model)
    make_dense(dense)
    pattern = r"(?!.*\.experts\.).*\.(in_proj|out_proj|q_proj|o_proj|up_proj|down_proj)"
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1, target_modules=pattern,
                                       allow_partial=True))  # fmt: skip
    randomise_adapters(model.cpu())
    model.to(DEVICE)
    result = tensors(training_step(model, ids()))
    with pytorch_functions(modeling_of(model)):
        exact = tensors(training_step(oracle(dense, model, torch.float32), ids()))
    unfused = without_fused_functions(oracle(dense, model, torch.bfloat16))
    eager = tensors(training_step(unfused, ids()))
    assert_accurate_in_the_mean(result, exact, eager)


def test_a_mixture_is_never_dense_as_a_whole() -> None:
    options = {"n_routed_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    model = build(
        "nemotron_h", hidden_size=1024, **{**OPTIONS["nemotron_h"], **options}
    ).bfloat16().to(DEVICE)  # fmt: skip
    whole = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    quantize_model(model, "nf4", target_modules="all")
    experts = next(m for m in model.modules() if isinstance(m, QuantizedExperts))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(64, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.randint(64, (64, 2), device=DEVICE)
    weights = torch.rand(64, 2, device=DEVICE)
    experts(x, chosen, weights).float().square().sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    # 128 MiB of the experts, which are 256 MiB, and little beside.
    assert whole == 2 * 64 * 1024 * 1024 * 2
    assert taken < 0.6 * whole
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mamba", "nemotron_h"])
def test_inputs_that_wait_in_the_hosts_memory(name: str) -> None:
    options = {**OPTIONS[name], "hidden_size": 512}
    if name == "mamba":
        options["num_hidden_layers"] = 8
    else:
        options["layers_block_type"] = ["mamba", "attention", "mamba", "moe"] * 2
        options["num_hidden_layers"] = 8
    model = build(name, **options).bfloat16().to(DEVICE)
    apply_prodial(model, ProdialConfig(r=8))
    # B is 0 to begin with, and then so is A's gradient.
    randomise_adapters(model.cpu())
    model.to(DEVICE)
    tokens = token_ids(4, 2048).to(DEVICE)
    found, peaks = {}, {}
    for run, level in (("again", CHECKPOINT), (CHECKPOINT, CHECKPOINT), (OFFLOAD, OFFLOAD)):
        with apply_levels(model, [level] * 8):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                torch.cuda.synchronize()
                peaks[level] = torch.cuda.max_memory_allocated() - before
        found[run] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for key, gradient in found[CHECKPOINT].items():
        # Mamba-1's scan adds up in any order.
        noise, error = (
            (found[run][key] - gradient).norm() / gradient.norm() for run in ("again", OFFLOAD)
        )
        assert error < 1e-3 + 3 * noise, f"{key}: {error:.1e}, from run to run {noise:.1e}"
    # The whole logits, which this loss makes, are the peak in either case.
    assert peaks[OFFLOAD] < peaks[CHECKPOINT]
