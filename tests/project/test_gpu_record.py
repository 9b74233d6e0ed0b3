"""CI has no GPU: the record of the last run on a device must belong to these sources."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_tests import RECORD
from benchmarks.harness.sources import ROOT, gpu_test_files, hash_of, needed


def test_the_record_belongs_to_the_sources_as_they_are() -> None:
    record = json.loads(RECORD.read_text())
    if record["status"] == "pending":
        return  # and why, as below
    assert record["sources"] == hash_of(needed(gpu_test_files())), (
        "files that the tests of a GPU need changed after the last run on one; "
        "run python -m benchmarks.gpu_tests there, or record 'pending' and why"
    )


def test_the_record_says_what_passed_or_why_not() -> None:
    record = json.loads(RECORD.read_text())
    if record["status"] == "pending":
        assert len(record["reason"]) > 40
        return
    assert record["status"] == "passed"
    assert record["counts"]["failed"] == 0
    assert record["counts"]["passed"] > 0
    assert record["device"] != "none"


def test_the_hash_covers_what_the_tests_need_and_no_more() -> None:
    covered = {path.relative_to(ROOT).as_posix() for path in needed(gpu_test_files())}
    assert covered >= {
        "prodial_kernels/quantization/nf4.py",
        "prodial_kernels/training/step/chunked_loss.py",
        "prodial_kernels/models/layers/fused_norms.py",
        "prodial_kernels/linear.py",
        # Only an ``__init__`` on the way.
        "prodial_kernels/models/mixers/__init__.py",
        # Run as a process.
        "benchmarks/harness/worker.py",
        "tests/support/mamba_ssm_loaded.py",
        "tests/gpu/kernels/test_kernels_on_device.py",
        "tests/kernels/test_dequantize.py",
        "tests/conftest.py",
    }
    assert covered.isdisjoint(
        {
            "prodial_kernels/embedded/making/pretrain.py",
            "benchmarks/readme.py",
            "tests/project/test_gpu_record.py",
        }
    )


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def edit(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}\n{line}\n")


def test_every_way_to_need_a_file_is_followed(tmp_path: Path) -> None:
    package, lazy = "prodial_kernels", "prodial_kernels/lazy"
    files = {
        f"{package}/__init__.py": "",
        f"{package}/at_the_top.py": "import prodial_kernels.as_a_module",
        f"{package}/as_a_module.py": "def f():\n    from prodial_kernels import inside_a_function",
        f"{package}/inside_a_function.py": "from prodial_kernels.lazy import public",
        f"{lazy}/__init__.py": "_HOMES = {'public': 'home', 'other': 'deep.inside'}",
        f"{lazy}/home.py": "def public(): ...",
        f"{lazy}/deep/__init__.py": "",
        f"{lazy}/deep/inside.py": "task = 'prodial_kernels.named:function'",
        f"{package}/named.py": "command = [python, '-m', 'benchmarks', '--tiny']",
        "benchmarks/__init__.py": "",
        "benchmarks/__main__.py": "",
        "tests/conftest.py": "",
        "tests/support/__init__.py": "",
        "tests/support/cases.py": "",
        "tests/gpu/test_it.py": "from support.cases import x\nimport prodial_kernels.at_the_top",
        "tests/kernels/conftest.py": "",
        "tests/kernels/test_both.py": "@pytest.mark.gpu\ndef test(): ...",
    }
    others = {
        f"{package}/docs.py": "", f"{package}/unused.py": "", "tests/models/conftest.py": "",
        "tests/models/test_cpu.py": "import prodial_kernels.unused\n'pytest.mark.gpu'",
    }  # fmt: skip
    write(tmp_path, files | others)
    edit(tmp_path / f"{package}/named.py", "'see prodial_kernels.docs'")

    def paths_and_hash() -> tuple[set[str], str]:
        found = needed(gpu_test_files(tmp_path), tmp_path)
        return {p.relative_to(tmp_path).as_posix() for p in found}, hash_of(found, tmp_path)

    found, before = paths_and_hash()
    assert found == files.keys()
    for name, counts in ((f"{package}/unused.py", False), (f"{lazy}/home.py", True)):
        edit(tmp_path / name, "# edited")
        assert (paths_and_hash()[1] != before) is counts
