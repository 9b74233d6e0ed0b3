#!/usr/bin/env bash
# safetensors 0.8.0 (with numpy 2.3.5, CPython 3.11, Linux), 2026-11-30.
#
# Guess:  save_file() writes a file as open(path, "wb") would: readable as the umask says, and
#         into the file that is there, so that its mode, its owner and its hard links stay.
# Seen:   the file is made beside and renamed over the old one: its mode is 0600 whatever the
#         umask says and whatever mode the old file had, its inode is new, and a second hard link
#         keeps the old content. safetensors.numpy.save() with an ordinary write does none of it.
# So:     a model that one person writes for a group cannot be read by the group, and a server
#         that holds a hard link to the weights serves the old ones.
#
# Output seen:
#   umask 0022, new file: mode 0600
#   mode 0664 before, overwritten: mode 0600, another inode: True
#   the second hard link holds the new tensor: False
#   save() and an ordinary write: mode 0644
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import os
import sys
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save, save_file

folder = Path(sys.argv[1])
os.umask(0o022)


def mode(path):
    return f"{path.stat().st_mode & 0o777:04o}"


new = folder / "new.safetensors"
save_file({"a": numpy.zeros(3)}, new)
print("umask 0022, new file: mode", mode(new))

old = folder / "old.safetensors"
old.write_bytes(save({"a": numpy.zeros(3)}))
old.chmod(0o664)
link = folder / "link.safetensors"
link.hardlink_to(old)
inode = old.stat().st_ino
save_file({"a": numpy.ones(3)}, old)
print(f"mode 0664 before, overwritten: mode {mode(old)}, another inode:", old.stat().st_ino != inode)
print("the second hard link holds the new tensor:", bool(load_file(link)["a"].all()))

plain = folder / "plain.safetensors"
plain.write_bytes(save({"a": numpy.zeros(3)}))
print("save() and an ordinary write: mode", mode(plain))
CHECK
"$work/venv/bin/python" "$work/check.py" "$work" | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
umask 0022, new file: mode 0600
mode 0664 before, overwritten: mode 0600, another inode: True
the second hard link holds the new tensor: False
save() and an ordinary write: mode 0644
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
