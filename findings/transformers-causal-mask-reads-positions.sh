#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  a training forward of a hybrid without an attention mask, without a cache and without
#         position_ids has nothing to look up: causal attention, no value read on the host, so that
#         on a GPU the step can be captured in a CUDA graph, and attention runs the same there.
# Seen:   the model counts up positions, and masking_utils then reads on the host whether they do
#         count up, to find packed rows: on a GPU every forward waits for the device. A pure Mamba-2
#         reads nothing. While a graph is captured the look is left out, and instead of no mask
#         there is one of [batch, 1, length, length], with which attention takes another kernel than
#         in the eager step.
# So:     whoever captures a hybrid's step has to answer for transformers that rows hold one text.
#
# Output seen:
#   bamba: values read in ['masking_utils.py']
#   mamba2: values read in []
#   mask of an eager step: None; of a captured one: (2, 1, 8, 8)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BambaConfig, BambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, masking_utils


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.files = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = [f.filename for f in traceback.extract_stack() if "transformers" in f.filename]
            self.files.add(frames[-1].rpartition("/")[2])
        return function(*args, **(kwargs or {}))


sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
bamba = BambaConfig(
    **sizes, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
    attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
)
models = {
    "bamba": BambaForCausalLM(bamba),
    "mamba2": Mamba2ForCausalLM(
        Mamba2Config(**sizes, num_heads=4, head_dim=8, state_size=4, n_groups=1)
    ),
}
found = {}
for name, model in models.items():
    with Reads() as reads:
        model.train()(input_ids=torch.ones(2, 8, dtype=torch.int64), use_cache=False)
    found[name] = sorted(reads.files)
    print(f"{name}: values read in {found[name]}")
assert found == {"bamba": ["masking_utils.py"], "mamba2": []}

bamba._attn_implementation = "sdpa"
given = (bamba, torch.zeros(2, 8, 16), None, None, torch.arange(8)[None])
eager = masking_utils.create_causal_mask(*given)
# What transformers asks to know whether a graph is being captured.
torch.cuda.is_current_stream_capturing = lambda: True
captured = masking_utils.create_causal_mask(*given)
print(f"mask of an eager step: {eager}; of a captured one: {tuple(captured.shape)}")
assert eager is None and captured.shape == (2, 1, 8, 8)
CHECK
"$work/venv/bin/python" -W ignore "$work/check.py"
