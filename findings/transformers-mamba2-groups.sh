#!/usr/bin/env bash
# transformers 5.21.1 and 5.24.0 with torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  a checkpoint in transformers' own format computes the same on a newer transformers, up to
#         rounding, or the release refuses it or warns.
# Seen:   Mamba-2 with several groups (n_groups > 1, as Codestral Mamba has) does not. Up to 5.21
#         the gated norm before out_proj is taken over all groups together, from 5.24 on over each
#         by itself, and so for Bamba and GraniteMoeHybrid. Nothing in the checkpoint says which, and
#         nothing is reported. mamba_ssm's fused function, which transformers trains by where it is
#         installed, norms each group in every release: up to 5.21 training and evaluation of such a
#         model on a GPU are two functions (read in mamba_ssm 2.3.2, not run here).
# So:     what was fine-tuned or evaluated on one of the two is another model on the other.
#
# Output seen:
#   logits of one checkpoint, 5.21.1 and 5.24.0: n_groups 1 equal, n_groups 2 differ
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.3.5
python="${PY:-$work/venv/bin/python}"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    --target "$work/older" transformers==5.21.1

cat > "$work/check.py" <<'CHECK'
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
import transformers

transformers.utils.logging.set_verbosity(logging.CRITICAL)
root, release = sys.argv[1:]
assert transformers.__version__ == release, transformers.__version__
ids = torch.arange(3, 19)[None]
for groups in (1, 2):
    folder = f"{root}/groups-{groups}"
    if not os.path.exists(folder):
        torch.manual_seed(0)
        model = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4,
                head_dim=8, n_groups=groups, chunk_size=4,
            )
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(ids, use_cache=False).logits, f"{root}/{release}-{groups}.pt")
CHECK
PYTHONPATH="$work/older${PYTHONPATH:+:$PYTHONPATH}" "$python" "$work/check.py" "$work" 5.21.1 2>"$work/log" || { cat "$work/log"; exit 1; }
"$python" "$work/check.py" "$work" 5.24.0 2>"$work/log" || { cat "$work/log"; exit 1; }
"$python" - "$work" <<'COMPARE' | tee "$work/seen"
import sys

import torch

words = []
for groups in (1, 2):
    older, newer = (torch.load(f"{sys.argv[1]}/{v}-{groups}.pt") for v in ("5.21.1", "5.24.0"))
    error = float((older - newer).norm() / newer.norm())
    verdict = "equal" if error < 1e-5 else "differ" if error > 0.05 else error
    words.append(f"n_groups {groups} {verdict}")
print("logits of one checkpoint, 5.21.1 and 5.24.0:", ", ".join(words))
COMPARE

cat > "$work/expected" <<'EXPECTED'
logits of one checkpoint, 5.21.1 and 5.24.0: n_groups 1 equal, n_groups 2 differ
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
