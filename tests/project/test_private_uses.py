"""The page on other libraries' insides lists what the sources touch, all of it and nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import prodial_kernels
from prodial_kernels.models.layers import attention_masks, decoding
from prodial_kernels.models.mixers import hf, mamba2_scan, mamba_ssm
from prodial_kernels.upstream import TESTED
from support.private_uses import private_uses

ROOT = Path(prodial_kernels.__file__).parent
PAGE = (ROOT / "models" / "mixers" / "README.md").read_text(encoding="utf-8")

ALL = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}

# Globals of upstream's modules, which are named by strings.
GLOBALS = (
    hf.FUSED_S6, hf.FUSED_SSD, hf.MASK_PADDING,
    mamba_ssm._MAMBA[0], mamba_ssm._MAMBA2[0], mamba2_scan._RULE, mamba2_scan._NORM,
    "mamba_inner_fn_no_out_proj", "forward_with_checkpointing", "LayerNormFn",
    "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", decoding.STEP,
    attention_masks._FIND, attention_masks._TRACING,
)  # fmt: skip


def listed() -> dict[str, set[str]]:
    """Names of the page's tables, and the files that their rows give."""
    names: dict[str, set[str]] = defaultdict(set)
    for line in PAGE.splitlines():
        cells = line.split("|")
        if len(cells) == 6:
            throughout = cells[2].strip() == "throughout"
            files = ALL if throughout else set(re.findall(r"`([^`]+)`", cells[2]))
            for name in re.findall(r"`([^`]+)`", cells[1]):
                names[name] |= files
    return dict(names)


def test_every_use_is_listed() -> None:
    page = listed()
    for name, files in private_uses(ROOT).items():
        missing = files - page.get(name, set())
        assert not missing, (
            f"{name} is used in {sorted(missing)}: add it to models/mixers/README.md"
        )
    assert set(GLOBALS) <= page.keys()


def test_nothing_is_listed_that_is_not_used() -> None:
    used = private_uses(ROOT)
    assert len(used) > 40
    for name, files in listed().items():
        assert name in used or name in GLOBALS, f"{name} is listed and not used"
        for file in files:
            assert (ROOT / file).is_file(), file
        assert any(name in (ROOT / file).read_text(encoding="utf-8") for file in files), name


def test_the_tested_releases_are_listed() -> None:
    (checked,) = re.findall(r"^Checked: .*?\.$", PAGE, re.MULTILINE | re.DOTALL)
    for library, releases in TESTED.items():
        (named,) = re.findall(rf"\b{library} ([^;(]+)", checked)
        assert set(releases) <= set(re.findall(r"[\d.]+\d(?:\.post\d)?", named)), library


def test_the_scan_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""`_not_this`."""\n'
        "import torch._dynamo, triton\n"
        "from transformers.deep import _hidden\n"
        "_OWN = getattr(torch, '_by_string')\n"
        "def run(x, tuple):\n"
        "    return x._private, x['_by_key'], _OWN, x.public, tuple._replace(a='_not_that, too')\n"
        "class Module:\n"
        "    def _apply(self): return self._own\n"
        "    def _own(self): return run.__code__\n",
        encoding="utf-8",
    )
    assert set(private_uses(tmp_path)) == {
        "torch._dynamo", "transformers.deep", "_hidden", "_by_string", "_private", "_by_key",
        "_apply", "__code__",
    }  # fmt: skip
