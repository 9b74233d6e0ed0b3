#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  model.double()(input_ids=..., labels=...).loss is computed in fp64, so that it can serve
#         as a reference for losses and gradients in fp32.
# Seen:   every causal language model's loss goes through ForCausalLMLoss, which calls .float() on
#         the logits whatever their dtype; Mamba, Mamba-2 and FalconMamba even return float32
#         logits. Loss and gradients are off by fp32's rounding.
# So:     an fp64 reference takes the hidden states, and computes head and cross-entropy itself.
#
# Output seen:
#   Mamba2ForCausalLM: hidden states torch.float64, logits torch.float32, loss torch.float32
#     off by more than 1e-12: loss True, gradients True; by more than 1e-5: loss False, gradients False
#   Zamba2ForCausalLM: hidden states torch.float64, logits torch.float64, loss torch.float32
#     off by more than 1e-12: loss True, gradients True; by more than 1e-5: loss False, gradients False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import torch
import transformers
from torch.nn import functional

MODELS = {
    "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "Zamba2": {
        "num_attention_heads": 2, "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1,
        "chunk_size": 4, "num_mem_blocks": 1, "intermediate_size": 24, "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
    },
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(found, exact, tolerance):
    found, exact = found.detach().double(), exact.detach()
    return bool((found - exact).abs().max() > tolerance * exact.abs().max())


for name, options in MODELS.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, pad_token_id=0, **options
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().train()
    ids = torch.randint(1, 64, (2, 12))
    output = model(input_ids=ids, labels=ids, use_cache=False)
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    print(
        f"{type(model).__name__}: hidden states {hidden.dtype}, logits {output.logits.dtype}, "
        f"loss {output.loss.dtype}"
    )
    exact = functional.cross_entropy(
        model.lm_head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    pairs = [(output.loss, exact), (gradients(model, output.loss), gradients(model, exact))]
    small, large = ([off(*pair, tolerance) for pair in pairs] for tolerance in (1e-12, 1e-5))
    print(
        f"  off by more than 1e-12: loss {small[0]}, gradients {small[1]}; "
        f"by more than 1e-5: loss {large[0]}, gradients {large[1]}"
    )
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" 2>/dev/null | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
Mamba2ForCausalLM: hidden states torch.float64, logits torch.float32, loss torch.float32
  off by more than 1e-12: loss True, gradients True; by more than 1e-5: loss False, gradients False
Zamba2ForCausalLM: hidden states torch.float64, logits torch.float64, loss torch.float32
  off by more than 1e-12: loss True, gradients True; by more than 1e-5: loss False, gradients False
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
