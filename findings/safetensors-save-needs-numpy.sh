#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0 and no numpy, CPU, 2026-11-30.
#
# Guess:  safetensors.torch needs torch and nothing else: neither safetensors nor torch requires
#         numpy, and tensors need not become arrays to be written. Writing to a file and to bytes
#         go the same way.
# Seen:   save_file() and load_file() work without numpy. save(), which returns bytes, raises
#         ModuleNotFoundError; load() reads the bytes again without it.
# So:     code that sends tensors through a pipe or a store works where numpy happens to be
#         installed, and fails in an image that has what the two libraries ask for.
#
# Output seen:
#   numpy is installed: False
#   save_file and load_file: equal
#   save: ModuleNotFoundError: No module named 'numpy'
#   load of the file's bytes: equal
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0

cat > "$work/check.py" <<'CHECK'
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

warnings.simplefilter("ignore")
import torch
from safetensors.torch import load, load_file, save, save_file

print("numpy is installed:", find_spec("numpy") is not None)
tensors = {"weight": torch.arange(6.0).view(2, 3)}
file = Path(sys.argv[1], "weight.safetensors")
save_file(tensors, file)


def verdict(found):
    return "equal" if torch.equal(found["weight"], tensors["weight"]) else "different"


print("save_file and load_file:", verdict(load_file(file)))
try:
    print("save:", len(save(tensors)) == file.stat().st_size)
except ModuleNotFoundError as error:
    print(f"save: ModuleNotFoundError: {error}")
print("load of the file's bytes:", verdict(load(file.read_bytes())))
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>/dev/null | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
numpy is installed: False
save_file and load_file: equal
save: ModuleNotFoundError: No module named 'numpy'
load of the file's bytes: equal
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
