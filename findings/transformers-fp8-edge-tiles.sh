#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  an FP8 checkpoint with weight_block_size [128, 128], loaded where there is no GPU and so
#         dequantised, has the weights that its codes and scales stand for: tile (i // 128, j // 128)
#         scales element (i, j), and the last tile of a side that is no multiple of 128 is smaller.
# Seen:   the side of a tile is taken from the number of scales instead of the configuration: 192
#         columns with two scales make two tiles of 96, so that columns 96 to 127 get the scale of
#         the second. Where the number of scales does not divide the side, it raises.
# So:     such a model loads without a word and computes something else than on a GPU, where
#         FP8Linear reads the same file by tiles of 128.
#
# Output seen:
#   128 x 256: columns that are not codes times scales: none
#   128 x 192: columns that are not codes times scales: 96 to 127
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors.torch import load_file, save_file

assert transformers.__version__ == "5.24.0", transformers.__version__
transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()

for width in (256, 192):
    folder = f"{sys.argv[1]}/{width}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=width,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

    # The linear layers of the block as FP8 checkpoints hold them.
    tensors, expected = {}, {}
    for name, weight in load_file(f"{folder}/model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        tiles = (-(-rows // 128), -(-columns // 128))
        scales = torch.arange(1.0, 1 + tiles[0] * tiles[1]).reshape(tiles)
        codes = weight.float().mul(100).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        expected[name] = (codes.float() * spread).to(torch.bfloat16)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    described = json.load(open(f"{folder}/config.json"))
    described["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    if width == 192:
        # 192 rows: the same in the other direction, so the wide projections are left dense here.
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.0.mlp.{name}.weight"
            tensors[key] = expected.pop(key)
            del tensors[f"{key}_scale_inv"]
            described["quantization_config"]["modules_to_not_convert"].append(name)
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    json.dump(described, open(f"{folder}/config.json", "w"))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    found = model.get_parameter(name)
    wrong = [j for j in range(width) if not torch.equal(found[:, j], expected[name][:, j])]
    said = f"{wrong[0]} to {wrong[-1]}" if wrong else "none"
    assert wrong == list(range(wrong[0], wrong[-1] + 1)) if wrong else True
    print(f"128 x {width}: columns that are not codes times scales: {said}")
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>"$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }

cat > "$work/expected" <<'EXPECTED'
128 x 256: columns that are not codes times scales: none
128 x 192: columns that are not codes times scales: 96 to 127
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
