#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  `accelerate launch --cpu --num_processes 2 script.py` starts the script in two processes,
#         or refuses. "--num_processes: the total number of processes to be launched in parallel".
# Seen:   it starts one, which is told of no other, and says nothing of it. The same options with
#         --multi_gpu instead of --cpu start two on this machine without a GPU.
# So:     training that is tried out on CPUs runs in one process, with half of the batch that was
#         meant, and every test of what several processes do passes. torchrun starts two.
#
# Output seen:
#   --cpu --num_processes 2: 1 process, of 1
#   --multi_gpu --num_processes 2: 2 processes, of 2
#   torchrun --nproc-per-node 2: 2 processes, of 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 accelerate==1.15.0 numpy==2.3.5
# No configuration of the user's.
export HF_HOME="$work/home" PATH="$work/venv/bin:$PATH"

cat > "$work/script.py" <<'SCRIPT'
import sys

import accelerate

assert accelerate.__version__ == "1.15.0", accelerate.__version__
state = accelerate.PartialState(cpu=True)
with open(f"{sys.argv[1]}.{state.process_index}", "w") as file:
    file.write(str(state.num_processes))
SCRIPT

count() {
    name=$1
    shift
    "$@" "$work/script.py" "$work/$name" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    files=("$work/$name".*)
    several=$([ ${#files[@]} -gt 1 ] && echo es || true)
    echo "${#files[@]} process$several, of $(cat "${files[0]}")"
}

{
    echo "--cpu --num_processes 2: $(count cpu accelerate launch --cpu --num_processes 2)"
    echo "--multi_gpu --num_processes 2: $(count gpu accelerate launch --multi_gpu --num_processes 2)"
    echo "torchrun --nproc-per-node 2: $(count torchrun torchrun --nproc-per-node 2)"
} | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
--cpu --num_processes 2: 1 process, of 1
--multi_gpu --num_processes 2: 2 processes, of 2
torchrun --nproc-per-node 2: 2 processes, of 2
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
