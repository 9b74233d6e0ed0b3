#!/usr/bin/env bash
# llama.cpp's convert_hf_to_gguf.py (as llama-cpp-python 0.3.36 ships it) and llama.cpp itself
# (xllamacpp 2026.10.11549), transformers 5.24.0, torch 2.13.0, CPU, 2026-12-01.
#
# Guess:  what the converter writes without an error computes what the model computes.
# Seen:   of hybrids with random weights in fp32, a Bamba whose heads position turns whole does. One
#         that turns half of each, as the published ones, loads and computes something else: the
#         converter orders the rows of queries and keys as if all were turned.
#         Granite's hybrid, saved by transformers 5, does not load: its attention layers are called
#         "full_attention" there, the converter looks for "attention", and takes all for Mamba's.
# So:     after a conversion compare logits with the model's; write Granite's kinds of layers as
#         "mamba" and "attention", and convert with transformers 4.57, which leaves them so.
#
# Output seen:
#   Bamba, whole heads turned: converted, log probabilities off by less than 0.002
#   Bamba, half of each head turned: converted, log probabilities off by more than 0.02
#   Granite's hybrid: converted, llama.cpp does not load it
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" "$@" --quiet --disable-pip-version-check; }
pip install torch==2.13.0 transformers==5.24.0 numpy==2.3.5 xllamacpp==2026.10.11549 gguf==0.19.0 \
    sentencepiece==0.2.1
pip download --no-deps --no-binary llama-cpp-python --dest "$work" llama-cpp-python==0.3.36
mkdir "$work/llama.cpp"
# Its own sources, with what it converts by.
tar xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work/llama.cpp" --strip-components=3 \
    llama_cpp_python-0.3.36/vendor/llama.cpp
rm "$work"/llama_cpp_python-0.3.36.tar.gz

cat > "$work/make.py" <<'SCRIPT'
"""Saves one model of a family, and the log probabilities of the token behind some others."""
import sys

import torch
import transformers

family, part, place = sys.argv[1], float(sys.argv[2]), sys.argv[3]
assert transformers.__version__ == "5.24.0", transformers.__version__
sizes = {
    "vocab_size": 50304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 8, "mamba_n_groups": 1, "tie_word_embeddings": False, "pad_token_id": 0,
}
own = {
    "Bamba": {"attn_layer_indices": [1]},
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "shared_intermediate_size": 64,
    },
}[family]
config = getattr(transformers, f"{family}Config")(**sizes, **own)
if family == "Bamba":
    config.rope_parameters["partial_rotary_factor"] = part
    # By which name the converter reads it, and older configurations had it.
    config.attn_rotary_emb = int(part * 16)
torch.manual_seed(0)
model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(100, 500, (1, 12))
    expected = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
model.save_pretrained(place)
torch.save((ids[0].tolist(), expected), f"{place}/expected.pt")
SCRIPT

cat > "$work/run.py" <<'SCRIPT'
"""Runs the file in llama.cpp, and compares."""
import sys

import torch
import xllamacpp

ids, expected = torch.load(f"{sys.argv[1]}/expected.pt")
options = xllamacpp.CommonParams()
options.model.path = f"{sys.argv[1]}/model.gguf"
options.n_ctx, options.n_gpu_layers, options.warmup = 256, 0, False
try:
    server = xllamacpp.Server(options)
except RuntimeError:
    print("llama.cpp does not load it")
    sys.exit()
answer = server.handle_completions({
    "prompt": ids, "n_predict": 1, "logprobs": 500, "n_probs": 500, "temperature": 0.0,
    "samplers": ["top_k"], "top_k": 0, "ignore_eos": False,
})
top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
found = {one["id"]: one["logprob"] for one in top}
assert len(found) == 500, len(found)
off = max(abs(found[i] - float(expected[i])) for i in found)
print(off, file=sys.stderr)
kind = "less than 0.002" if off < 0.002 else "more than 0.02" if off > 0.02 else f"{off}"
print(f"log probabilities off by {kind}")
SCRIPT

try() {
    place="$work/$2$3"
    "$work/venv/bin/python" "$work/make.py" "$2" "$3" "$place" 2> "$work/log" || { cat "$work/log"; exit 1; }
    # Without a tokenizer the converter takes one of its own.
    "$work/venv/bin/python" "$work/llama.cpp/convert_hf_to_gguf.py" "$place" --outtype f32 \
        --outfile "$place/model.gguf" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    echo "$1: converted, $("$work/venv/bin/python" "$work/run.py" "$place" 2> "$work/log")"
    grep -m1 -E "^[0-9.e-]+$" "$work/log" >&2 || true
}

{
    try "Bamba, whole heads turned" Bamba 1
    try "Bamba, half of each head turned" Bamba 0.5
    try "Granite's hybrid" GraniteMoeHybrid 1
} | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
Bamba, whole heads turned: converted, log probabilities off by less than 0.002
Bamba, half of each head turned: converted, log probabilities off by more than 0.02
Granite's hybrid: converted, llama.cpp does not load it
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
