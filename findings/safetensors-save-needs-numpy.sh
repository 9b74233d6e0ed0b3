#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0 and no numpy, CPU, 2026-11-30.
#
# Guess:  safetensors.torch needs torch and nothing else: neither safetensors nor torch requires
#         numpy, and a tensor need not become an array to be written. What loads, saves.
# Seen:   load() and load_file() work without numpy. save() and save_file() raise
#         ModuleNotFoundError, after everything was computed that was to be saved.
# So:     in an environment with no more than the two libraries ask for, a model can be loaded and
#         trained, and the result not be written. The extra safetensors[torch] brings numpy; a package
#         that saves must require it.
#
# Output seen:
#   numpy is installed: False
#   load_file: [0.0, 1.0, 2.0]
#   load: [0.0, 1.0, 2.0]
#   save_file: ModuleNotFoundError: No module named 'numpy'
#   save: ModuleNotFoundError: No module named 'numpy'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0

cat > "$work/check.py" <<'CHECK'
import json
import struct
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

warnings.simplefilter("ignore")
import torch
from safetensors.torch import load, load_file, save, save_file

print("numpy is installed:", find_spec("numpy") is not None)
# The format by hand: the header's length, the header, the values.
header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
content = struct.pack("<Q", len(header)) + header + struct.pack("<3f", 0, 1, 2)
file = Path(sys.argv[1], "w.safetensors")
file.write_bytes(content)
print("load_file:", load_file(file)["w"].tolist())
print("load:", load(content)["w"].tolist())
tensors = {"w": torch.arange(3.0)}
for name, write in (("save_file", lambda: save_file(tensors, file)), ("save", lambda: save(tensors))):
    try:
        write()
        print(f"{name}: written")
    except ModuleNotFoundError as error:
        print(f"{name}: ModuleNotFoundError: {error}")
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>/dev/null | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
numpy is installed: False
load_file: [0.0, 1.0, 2.0]
load: [0.0, 1.0, 2.0]
save_file: ModuleNotFoundError: No module named 'numpy'
save: ModuleNotFoundError: No module named 'numpy'
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
