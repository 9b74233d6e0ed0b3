#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0, transformers 5.24.0, CPU, 2026-12-01.
#
# Guess:  `model.load_adapter(directory, "default")` makes "default" the adapter of the directory, its
#         adapter_config.json included, or refuses a name that is taken by an adapter of other
#         settings.
# Seen:   under a name that exists, the file of settings is not read: the tensors are loaded, and
#         lora_alpha (and use_rslora, lora_dropout) stay the old ones, without a warning. The model
#         computes neither adapter, and saving it writes the new tensors with the old alpha.
# So:     who switches adapters by loading over "default" has to delete it first
#         (model.delete_adapter), or compare the settings; peft's hotswap_adapter does, for LoRA.
#
# Output seen:
#   loaded under a new name: the saved adapter
#   loaded over "default": neither adapter, warnings: 0
#   lora_alpha of "default" then: 4, in the directory: 64
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.3.5
export HF_HOME="$work/home" HF_HUB_OFFLINE=1

cat > "$work/script.py" <<'SCRIPT'
import sys
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

assert peft.__version__ == "0.21.2", peft.__version__
folder = sys.argv[1]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def adapter(alpha, seed):
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


x = torch.ones(1, 8)
saved = adapter(64, 1)
saved.save_pretrained(folder)
model = adapter(4, 2)
old, new = model(x), saved(x)
other = PeftModel.from_pretrained(base(), folder, "other")
print("loaded under a new name:", "the saved adapter" if torch.allclose(other(x), new) else "?")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model.load_adapter(folder, "default")
y = model(x)
known = {"the saved adapter": new, "the old one": old}
found = [name for name, value in known.items() if torch.allclose(y, value)]
print('loaded over "default":', *(found or ["neither adapter,"]), "warnings:", len(seen))
alpha = model.peft_config["default"].lora_alpha
print('lora_alpha of "default" then:', f"{alpha}, in the directory:", saved.peft_config["default"].lora_alpha)
SCRIPT
"$work/venv/bin/python" "$work/script.py" "$work/adapter" | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
loaded under a new name: the saved adapter
loaded over "default": neither adapter, warnings: 0
lora_alpha of "default" then: 4, in the directory: 64
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
