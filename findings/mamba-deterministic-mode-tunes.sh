#!/usr/bin/env bash
# mamba-ssm 2.3.2.post1 (with triton 3.6.0, torch 2.13.0, CPython 3.11, Linux), 2026-11-30.
#
# Guess:  MAMBA_DETERMINISTIC=1 fixes the launch configuration of every kernel, so that a step has
#         the same bits on every machine of a kind and nothing is timed at its first call.
# Seen:   only without TRITON_CACHE_AUTOTUNING=1, which any library of the process may have set and
#         which the mode's own warning recommends. With it every configuration stays a candidate:
#         the first call times them all, for minutes with Mamba-2's kernels, and the fastest on
#         that machine on that day is kept in Triton's cache.
# So:     "deterministic" is then up to the content of a cache directory: another machine, or the
#         same one after its cache was emptied, may sum in another order. Under a memory limit the
#         timing itself can run out of memory: Triton asks for 256 MB to flush the L2 cache.
#
# Output seen:
#   deterministic: 1 of 3 configurations left
#   deterministic and TRITON_CACHE_AUTOTUNING=1: 3 of 3 configurations left
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" --disable-pip-version-check "$@"; }
pip install --quiet torch==2.13.0 numpy setuptools wheel packaging ninja
pip install --quiet --no-deps triton==3.6.0
# Its Python files alone: no CUDA is needed to see what they choose among.
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --quiet --no-deps --no-build-isolation mamba-ssm==2.3.2.post1

cat > "$work/check.py" <<'CHECK'
import os
import runpy
import warnings
from importlib.metadata import files

import triton

warnings.simplefilter("ignore")
(source,) = (f for f in files("mamba-ssm") if str(f) == "mamba_ssm/utils/determinism.py")
module = runpy.run_path(str(source.locate()))
tiles = [triton.Config({"BLOCK_SIZE_M": m}, num_stages=2) for m in (32, 64, 128)]


def left():
    return f"{len(module['autotune_configs'](list(tiles)))} of {len(tiles)} configurations left"


os.environ["MAMBA_DETERMINISTIC"] = "1"
os.environ.pop("TRITON_CACHE_AUTOTUNING", None)
print("deterministic:", left())
os.environ["TRITON_CACHE_AUTOTUNING"] = "1"
print("deterministic and TRITON_CACHE_AUTOTUNING=1:", left())
CHECK
"$work/venv/bin/python" "$work/check.py" | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
deterministic: 1 of 3 configurations left
deterministic and TRITON_CACHE_AUTOTUNING=1: 3 of 3 configurations left
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
