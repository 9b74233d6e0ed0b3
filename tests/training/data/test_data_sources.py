"""Where data comes from, how it is split and cut to a budget, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from prodial_kernels.training.data.examples import DataError, MultipleChoice, PromptCompletion
from prodial_kernels.training.data.sources import paths, text_files
from prodial_kernels.training.data.splits import load_documents, read_whole

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"


def make_files(root: Path, n: int, suffix: str = ".py") -> Path:
    for i in range(n):
        path = root / f"part{i % 3}" / f"module_{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name_{i} = {i}\n" * 10, encoding="utf-8")
    return root


def total_bytes(texts: tuple[object, ...]) -> int:
    return sum(len(str(text).encode()) for text in texts)


# --- the standard library ------------------------------------------------------------------------


def test_stdlib_is_the_default_and_within_the_budget() -> None:
    split = load_documents(max_bytes=400_000)
    assert split == load_documents("stdlib", max_bytes=400_000)
    assert split.kind == "text"
    assert "standard library" in str(split)
    assert 350_000 < total_bytes(split.train) <= 360_000
    assert 35_000 < total_bytes(split.held_out) <= 40_000
    assert not set(split.train) & set(split.held_out)


def test_stdlib_budgets_are_nested() -> None:
    small, large = load_documents(max_bytes=300_000), load_documents(max_bytes=600_000)
    assert small.train[:-1] == large.train[: len(small.train) - 1]
    assert str(large.train[len(small.train) - 1]).startswith(str(small.train[-1]))
    assert str(small.train[-1]).endswith("\n")  # cut at the end of a line
    assert small.held_out[:-1] == large.held_out[: len(small.held_out) - 1]


def test_stdlib_leaves_out_tests_and_generated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ["a.py", "json/b.py", "json/tool/c.py"]
    leave = [
        "site-packages/x.py",
        "dist-packages/x.py",
        "test/x.py",
        "unittest/tests/x.py",
        "idlelib/idle_test/x.py",
        "lib2to3/x.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "config-3.11-x/x.py",
        "_sysconfigdata__linux.py",
        "__pycache__/x.py",
        "json/notes.txt",
    ]
    for name in keep + leave:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    split = load_documents()
    assert {*split.train, *split.held_out} == {f"# {name}\n" for name in keep}
    assert set(split.notes) == {
        "left out, nothing but white space: 1 document",
        "skipped, not UTF-8 text: 1 file",
    }
    assert "\n  skipped, not UTF-8 text: 1 file" in str(split)


def test_stdlib_without_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no standard-library source \(.py files\) in .*; give a"):
        load_documents()


# --- the split -----------------------------------------------------------------------------------


def test_split_does_not_depend_on_order_or_hash_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, 60)
    split = load_documents(tmp_path)
    assert len(split.train) + len(split.held_out) == 60
    assert 1 <= len(split.held_out) <= 15

    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: reversed(list(walk(*a, **k))))
    assert load_documents(tmp_path) == split

    code = (
        "import sys; from prodial_kernels.training.data.splits import load_documents;"
        "print(''.join(load_documents(sys.argv[1]).held_out), end='')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "".join(map(str, split.held_out))


def test_adding_files_moves_none_to_the_other_side(tmp_path: Path) -> None:
    before = load_documents(make_files(tmp_path, 110), held_out_fraction=0.3)
    after = load_documents(make_files(tmp_path, 150), held_out_fraction=0.3)
    assert set(before.train) < set(after.train)
    assert set(before.held_out) < set(after.held_out)


def test_held_out_fraction_is_roughly_kept(tmp_path: Path) -> None:
    make_files(tmp_path, 300)
    for fraction in (0.1, 0.5, 0.9):
        share = len(load_documents(tmp_path, held_out_fraction=fraction).held_out) / 300
        assert abs(share - fraction) < 0.1


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_at_least_one_of_two(tmp_path: Path, fraction: float) -> None:
    make_files(tmp_path, 2)
    split = load_documents(tmp_path, held_out_fraction=fraction)
    assert len(split.train) == len(split.held_out) == 1


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"text": "row {i % 10}"}}' for i in range(50)]
    path.write_text("\n".join(lines), encoding="utf-8")
    split = load_documents(path, held_out_fraction=0.3)
    assert len(split.train) + len(split.held_out) == 50
    assert not set(split.train) & set(split.held_out)


def test_only_equal_rows_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match="all 3 documents are equal"):
        load_documents(path)


def test_stable_position_is_pinned() -> None:
    # A change here moves every user's held-out files; it would have to be deliberate.
    assert paths.stable_position("json/decoder.py") == 0.07602736661107656
    positions = [paths.stable_position(str(i)) for i in range(2000)]
    assert all(0 <= p < 1 for p in positions)
    assert abs(sum(positions) / 2000 - 0.5) < 0.03


# --- files ---------------------------------------------------------------------------------------


def test_text_file_is_split_at_blank_lines() -> None:
    split = load_documents(FIXTURES / "paragraphs.txt", held_out_fraction=0.3)
    chunks = {*split.train, *split.held_out}
    assert len(chunks) == 4
    assert "Nobody noticed it before the morning,\nwhen the milk had already turned." in chunks
    assert split.held_out


def test_single_text_gives_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    lines = [f"line {i}\n" for i in range(100)]
    path.write_text("".join(lines), encoding="utf-8")
    split = load_documents(path, held_out_fraction=0.2)
    assert "".join(map(str, split.train + split.held_out)) == "".join(lines)
    assert str(split.train[0]).endswith("\n")
    assert len(str(split.held_out[0])) / len("".join(lines)) == pytest.approx(0.2, abs=0.02)
    assert "line 99" in str(split.held_out[0])


def test_a_program_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text("def f():\n\n    return 1\n\n\ndef g():\n    return 2\n", encoding="utf-8")
    split = load_documents(path, held_out_fraction=0.5)
    assert (len(split.train), len(split.held_out)) == (1, 1)


def test_byte_order_mark_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n\r\nthree\r\n")
    assert set(read_whole(path).examples) == {"one", "two", "three\n"}


@pytest.mark.parametrize(
    ("name", "kind", "n"),
    [
        ("text.jsonl", str, 3),
        ("prompt_completion.jsonl", PromptCompletion, 4),
        ("multiple_choice.jsonl", MultipleChoice, 3),
        ("hellaswag.jsonl", MultipleChoice, 2),
        ("winogrande.jsonl", MultipleChoice, 2),
        ("arc.jsonl", MultipleChoice, 3),
    ],
)
def test_json_lines_of_each_schema(name: str, kind: type, n: int) -> None:
    split = load_documents(FIXTURES / name)
    assert all(type(example) is kind for example in split.train + split.held_out)
    assert len(split.train) + len(split.held_out) == n
    assert sorted(map(repr, read_whole(FIXTURES / name).examples)) == sorted(
        map(repr, split.train + split.held_out)
    )


def test_line_separators_inside_json_strings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert set(read_whole(path).examples) == {"a\u2028b", "c"}


def test_directory_takes_suffixes_and_enters_no_hidden_or_dependency_folder(
    tmp_path: Path,
) -> None:
    names = ["a.txt", "b.MD", "src/c.rs", "src/d.bin", ".git/e.txt", "node_modules/f.js", ".g.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert set(read_whole(tmp_path).examples) == {"a.txt", "b.MD", "src/c.rs"}
    assert set(read_whole(tmp_path, suffixes=["txt", ".bin"]).examples) == {"a.txt", "src/d.bin"}


def test_held_out_source_takes_all_of_both(tmp_path: Path) -> None:
    make_files(tmp_path / "a", 5)
    make_files(tmp_path / "b", 3)
    split = load_documents(tmp_path / "a", held_out_source=tmp_path / "b")
    assert (len(split.train), len(split.held_out)) == (5, 3)
    with pytest.raises(DataError, match=r"text examples, but .* holds multiple choice"):
        load_documents(tmp_path / "a", held_out_source=FIXTURES / "arc.jsonl")


# --- the budget ----------------------------------------------------------------------------------


def test_budget_reads_no_more_files_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, 50)
    read: list[Path] = []
    read_text = paths.read_text
    monkeypatch.setattr(
        paths, "read_text", lambda path, found: read.append(path) or read_text(path, found)
    )
    split = load_documents(tmp_path, max_bytes=400, held_out_fraction=0.5)
    assert total_bytes(split.train) <= 200
    assert total_bytes(split.held_out) <= 200
    assert len(read) == len(split.train) + len(split.held_out) < 10


def test_budget_takes_whole_rows_but_at_least_one() -> None:
    split = load_documents(FIXTURES / "arc.jsonl", max_bytes=10)
    assert (len(split.train), len(split.held_out)) == (1, 1)
    assert len(read_whole(FIXTURES / "prompt_completion.jsonl", max_bytes=60).examples) < 4


def test_budget_never_cuts_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("é" * 50 + " " + "ü" * 50, encoding="utf-8")
    for budget in range(8, 30):
        split = load_documents(path, max_bytes=budget, held_out_fraction=0.5)
        assert total_bytes(split.train) <= budget / 2
        assert "\ufffd" not in str(split.train) + str(split.held_out)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "a/b/missing", "~/missing-file"])
def test_missing_file(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: no such file or directory \(looked in "):
        load_documents(name)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=r"data.txt: not UTF-8 text \(byte 0xff at offset 3\)"):
        load_documents(path)


@pytest.mark.parametrize("name", ["e.txt", "e.py", "e.jsonl"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\n")
    with pytest.raises(DataError, match=rf"{name}: empty"):
        load_documents(tmp_path / name)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")

    def refuse(path: Path, **options: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(text_files, "read_bytes", refuse)
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=r"secret.txt: cannot be read: Permission denied"):
            read_whole(source)


@pytest.mark.parametrize("line", ["{'text': 'x'}", '{"text": "x"', '[{"text": "x"}', "text"])
def test_invalid_json_names_file_line_and_reason(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:3: not valid JSON: .* at column \d+"):
        load_documents(path)


def test_bad_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"content": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:2: unknown keys \(content\)"):
        load_documents(path)


def test_directory_without_text_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no files at all"):
        load_documents(tmp_path)
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "LICENSE").write_text("x")
    with pytest.raises(DataError, match=r"no file ends in .*; it has .parquet, LICENSE"):
        load_documents(tmp_path)


def test_all_files_undecodable(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xff" + name.encode())
    with pytest.raises(DataError, match="the train split is empty"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="no usable text"):
        read_whole(tmp_path)


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="a single document that cannot be divided; give at least"):
        load_documents(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out_fraction": 0.0}, "held_out_fraction must lie between 0 and 1, got 0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between 0 and 1, got 1.0"),
        ({"max_bytes": 0}, "max_bytes must be at least 2, got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents(FIXTURES / "text.jsonl", **arguments)  # type: ignore[arg-type]
