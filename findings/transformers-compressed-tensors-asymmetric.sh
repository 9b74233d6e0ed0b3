#!/usr/bin/env bash
# transformers 5.24.0 and compressed-tensors 0.20.1 with torch 2.13.0, CPU, 2026-12-01.
#
# Guess:  a checkpoint whose layers compressed-tensors' own compressor packed (pack-quantized, 4 bits,
#         groups of 32) loads with from_pretrained, whether it is symmetric or not.
# Seen:   symmetric ones do. Of asymmetric ones, from_pretrained raises: the layers that it makes on
#         the meta device for the checkpoint's tensors have weight_zero_point unpacked, [rows,
#         groups] in int8, where the checkpoint holds int32 words of it. The compressor packs zero
#         points of real tensors, and returns before it does so for tensors without data.
# So:     asymmetric W4A16 checkpoints, which its decompressor unpacks as they are, want another
#         loader.
#
# Output seen:
#   symmetric: loaded
#   asymmetric: RuntimeError, weight_zero_point [16, 4] stored, [128, 4] expected
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5 compressed-tensors==0.20.1

cat > "$work/check.py" <<'CHECK'
import io
import json
import logging
import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

assert transformers.__version__ == "5.24.0", transformers.__version__
transformers.utils.logging.disable_progress_bar()
logger = logging.getLogger("transformers")

for symmetric in (True, False):
    folder = f"{sys.argv[1]}/{symmetric}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
               "symmetric": symmetric}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    tensors, exact = {}, {}
    for name, tensor in load_file(f"{folder}/model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, 32))
        low, high = groups.amin(-1), groups.amax(-1)
        state = {"weight": tensor, "weight_scale": groups.abs().amax(-1) / 7.5}
        if not symmetric:
            state["weight_scale"] = (high - low) / 15
            state["weight_zero_point"] = (-low / state["weight_scale"] - 8).round().to(torch.int8)
        packed = PackedQuantizationCompressor.compress(state, scheme)
        exact[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        for entry, value in packed.items():
            tensors[name.removesuffix("weight") + entry] = value
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    described = json.load(open(f"{folder}/config.json"))
    described["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    json.dump(described, open(f"{folder}/config.json", "w"))

    kind = "symmetric" if symmetric else "asymmetric"
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model(torch.zeros(1, 2, dtype=torch.long))
        assert all(torch.equal(model.get_parameter(name), exact[name]) for name in exact)
        print(f"{kind}: loaded")
    except RuntimeError as error:
        shapes = re.findall(r"zero_point.*?ckpt: torch.Size\((.*?)\) vs model:torch.Size\((.*?)\)",
                            said.getvalue())
        stored, expected = shapes[0]
        print(f"{kind}: {type(error).__name__}, weight_zero_point {stored} stored, "
              f"{expected} expected")
    logger.removeHandler(handler)
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>"$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }

cat > "$work/expected" <<'EXPECTED'
symmetric: loaded
asymmetric: RuntimeError, weight_zero_point [16, 4] stored, [128, 4] expected
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
