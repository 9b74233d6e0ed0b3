"""What the README files show works: Python runs, commands parse, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from prodial_kernels.cli import commands

ROOT = Path(__file__).resolve().parents[2]
FRONT = ROOT / "README.md"
PAGES = sorted(
    path
    for pattern in ("*.md", "benchmarks/**/*.md", "prodial_kernels/**/*.md")
    for path in ROOT.glob(pattern)
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prodial_lines(page: Path) -> list[str]:
    lines = (line for block in code_blocks(page, "bash") for line in block.splitlines())
    # Several processes have a launcher before it.
    lines = (re.sub(r"^torchrun .* -m prodial_kernels ", "prodial ", line) for line in lines)
    return [line for line in lines if line.startswith("prodial ")]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if code_blocks(page, "python")], ids=name_of
)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code_blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)
    if page == FRONT:
        assert "in_proj" in capsys.readouterr().out  # the report
        assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
        assert type(names["plain"]).__name__ == "Linear"


def test_the_pages_that_have_code_are_found() -> None:
    shown = {name_of(page) for page in PAGES if code_blocks(page, "python")}
    assert shown >= {
        "README.md", "prodial_kernels/peft/README.md", "prodial_kernels/quantization/README.md"
    }  # fmt: skip
    assert len(code_blocks(FRONT, "python")) == 3
    assert sum(len(prodial_lines(page)) for page in PAGES) >= 12


@pytest.mark.parametrize("page", [page for page in PAGES if prodial_lines(page)], ids=name_of)
def test_prodial_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in prodial_lines(page):
        _, command, *options = shlex.split(line, comments=True)
        ran: list[str] = []
        entry = commands.COMMANDS[command]
        stub = entry._replace(run=lambda _, ran=ran: ran.append("ran") or 0)
        monkeypatch.setitem(commands.COMMANDS, command, stub)
        assert commands.main([command, *options]) == 0, line
        assert ran, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_local_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name == "README.md"], ids=name_of)
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(r"`([\w./]+\.py)(?:::\w+)?`", page.read_text()):
        folders = (ROOT / part for part in ("prodial_kernels", "benchmarks", "tests"))
        found = any(any(folder.glob(f"**/{name}")) for folder in folders)
        assert found or (ROOT / name).exists(), name


def test_ci_runs_the_readme_test_command() -> None:
    commands = [block.strip() for block in code_blocks(FRONT, "bash") if "pytest" in block]
    assert len(commands) == 1
    assert "\n" not in commands[0]


def test_ci_names_tests_that_exist() -> None:
    named = re.findall(r"tests/[\w/*.]+\.py", (ROOT / ".ci" / "run").read_text())
    assert len(named) >= 6
    for pattern in named:
        assert list(ROOT.glob(pattern)), pattern


def test_the_first_sentence_gives_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
    rows = json.loads((results / "mixers.json").read_text())["rows"]
    ratios = [row["time_ratio"] for row in rows if row["variant"] == "prodial"]
    text = FRONT.read_text().split("![")[0].replace("\n", " ")
    assert f"in {min(ratios):.2f} to {max(ratios):.2f} times the frozen model's time" in text
    jobs = {row["name"]: row for row in json.loads((results / "finetune.json").read_text())["rows"]}
    here, before = jobs["1.4b-bf16"]["peak_bytes"] / 1e9, jobs["1.4b-bf16"]["before"][1]
    assert f"Mamba-1.4B in {here:.0f} GB where LoRA takes {before:.0f} (H100)" in text
