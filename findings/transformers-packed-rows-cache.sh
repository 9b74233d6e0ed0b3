#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU, 2026-11-30; 5.17.0 does the same.
#
# Guess:  a row of several documents with position_ids that begin again for each keeps the documents
#         apart in attention, in any forward of a causal language model: transformers finds the
#         places by itself. A mask that is 1 everywhere says what no mask says.
# Seen:   only without a cache and without a mask. Models make a cache unless use_cache=False, in
#         training mode too, and with one (or with a mask of ones) the documents see each other,
#         without a word. Trainer passes use_cache=False by default, so its users do not notice;
#         a training loop or an evaluation of one's own leaks.
# So:     model(input_ids, position_ids=packed) computes something else than the documents one by
#         one; model(input_ids, position_ids=packed, use_cache=False) is right.
#
# Output seen:
#   Llama eager: use_cache=False equal, default different, attention_mask of ones different
#   Llama sdpa: use_cache=False equal, default different, attention_mask of ones different
#   Qwen3 eager: use_cache=False equal, default different, attention_mask of ones different
#   Qwen3 sdpa: use_cache=False equal, default different, attention_mask of ones different
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
import transformers

transformers.utils.logging.set_verbosity(logging.CRITICAL)
ids = torch.arange(3, 15)[None]
packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
options = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16,
)
for name in ("Llama", "Qwen3"):
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{name}Config")(**options), attn_implementation=attention
        ).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

        @torch.no_grad()
        def logits(tokens, **given):
            return model(tokens, **given).logits

        documents = [logits(part, use_cache=False) for part in (ids[:, :5], ids[:, 5:])]
        expected = torch.cat(documents, dim=1)

        def compared(**given):
            found = logits(ids, position_ids=packed, **given)
            error = float((found - expected).norm() / expected.norm())
            return "equal" if error < 1e-5 else "different" if error > 0.1 else error

        ones = torch.ones_like(ids)
        print(
            f"{name} {attention}: use_cache=False {compared(use_cache=False)}, "
            f"default {compared()}, "
            f"attention_mask of ones {compared(use_cache=False, attention_mask=ones)}"
        )
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" 2>/dev/null | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
Llama eager: use_cache=False equal, default different, attention_mask of ones different
Llama sdpa: use_cache=False equal, default different, attention_mask of ones different
Qwen3 eager: use_cache=False equal, default different, attention_mask of ones different
Qwen3 sdpa: use_cache=False equal, default different, attention_mask of ones different
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
