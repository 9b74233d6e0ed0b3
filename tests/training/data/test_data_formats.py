"""Files are read as what they are, or refused; what reading changes or drops is counted."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from prodial_kernels.files import reading
from prodial_kernels.training.data.chat import rendered
from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Message,
    MultipleChoice,
    PromptCompletion,
)
from prodial_kernels.training.data.sources import text_files
from prodial_kernels.training.data.splits import load_documents, make_batches, read_whole
from prodial_kernels.training.scoring.language_model import evaluate_examples
from prodial_kernels.training.scoring.log_likelihood import Scorer


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"What, now?","a ""b""\nc"\nq,r\n'),
        ("a.CSV", '\ufeffprompt;completion\r\n"What, now?";"a ""b""\r\nc"\r\nq;r\r\n'),
        ("a.tsv", 'prompt\tcompletion\nWhat, now?\t"a ""b""\nc"\n\nq\tr\n'),
        ("a.json", '[{"prompt": "What, now?", "completion": "a \\"b\\"\\nc"},\n'
                   ' {"prompt": "q", "completion": "r"}]'),
        ("a.jsonl", '{"prompt": "What, now?", "completion": "a \\"b\\"\\nc"}\n'
                    '{"prompt": "q", "completion": "r"}'),
    ],
)  # fmt: skip
def test_every_form_of_a_table_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    rows = {PromptCompletion("What, now?", 'a "b"\nc'), PromptCompletion("q", "r")}
    assert set(read_whole(write(tmp_path / name, content)).examples) == rows


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"context": "1+1", "choices": ["=2", "=3"], "label": 0}
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    assert read_whole(tmp_path / "a.parquet").examples == (
        MultipleChoice(("1+1", "1+1"), ("=2", "=3"), 0),
    ) * 2  # fmt: skip
    with pytest.raises(DataError, match=r"b.parquet: cannot be read as Parquet: ArrowInvalid"):
        read_whole(write(tmp_path / "b.parquet", "only text"))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install datasets; or save the rows as JSONL"):
        read_whole(write(tmp_path / "a.parquet", b"PAR1"))


def test_columns_of_no_schema_are_refused_not_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "two.csv", "question,answer\na,b\n")
    with pytest.raises(DataError, match=r"two.csv:2: unknown keys \(answer, question\). Rename"):
        load_documents(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,text\na,b\n", "a.csv:1: the first line must name every column, each differently"),
        ("text,\na,b\n", "a.csv:1: the first line must name every column"),
        ("A first text.\nA second one.\n", "a.csv:1: .* If the file has no line of names, add one"),
        ("the sky,is blue\na,b\n", "a.csv:1: the first line must name the columns, and none of"),
        ('text,id\n"a\nb",1\nc\n', "a.csv:4: 1 fields, but the first line names 2 columns"),
        ('text\n"never closed\n', "a.csv:2: not valid CSV"),
        ("text,label\n", "a.csv: empty"),
    ],
)
def test_malformed_tables_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_whole(write(tmp_path / "a.csv", content))


def test_fields_may_be_long(tmp_path: Path) -> None:
    assert read_whole(write(tmp_path / "a.csv", f"text\n{'x' * 300_000}\n")).examples == (
        "x" * 300_000,
    )


# --- JSON that Python's parser does not take, or takes in silence --------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "JSON that is nested too deeply"),
        ('{"text": "a", "text": "b"}', "not usable JSON: the key .text. is given twice"),
        ('{"label": ' + "1" * 5000 + "}", r"not usable JSON: Exceeds the limit"),
        ('{"context": "c", "choices": ["a", "b"], "label": "' + "1" * 5000 + '"}',
         "'label' must be a whole number"),
        ("{", "not valid JSON"),
        ("7", "expected a JSON object with named values, got int"),
    ],
)  # fmt: skip
def test_lines_that_are_no_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    fine = '{"context": "c", "choices": ["a", "b"], "label": 0}\n'
    file = write(tmp_path / "a.jsonl", fine + line + "\n")
    with pytest.raises(DataError, match=rf"a.jsonl:2: {message}"):
        read_whole(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', "a.json:2: not valid JSON: .* at column 11"),
        ('[{"text": "a"}, ["b"]]', r"a.json\[1\]: expected a JSON object"),
        ("[" * 100_000, "a.json:1: JSON that is nested too deeply"),
        ('{\n "data": []\n}', "a.json:1: not valid JSON: .*or the file one JSON array of them"),
    ],
)
def test_arrays_name_the_place(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s){message}"):
        read_whole(write(tmp_path / "a.json", content))


# --- what is no text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"%PDF-1.7\nplain as it may look", "this is a PDF"),
        ("a.txt", rb"{\rtf1 Hello}", "this is an RTF document"),
        ("a.jsonl", b"\x1f\x8b\x08", "this is compressed by gzip"),
        ("a.csv", b"PK\x03\x04", "this is a ZIP archive, or an office document"),
        ("a.txt", "héllo".encode("utf-16"), "not UTF-8 but UTF-16; convert it: iconv"),
        ("a.txt", "héllo".encode("utf-32"), "not UTF-8 but UTF-32"),
        ("a.txt", "plain ASCII text".encode("utf-16le"), "UTF-16 without a byte-order mark"),
        ("a.txt", "plain ASCII text".encode("utf-16be"), "UTF-16 without a byte-order mark"),
        ("a.txt", b"one\x00two and three and four", "NUL bytes, the first at offset 3: .* binary"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"not UTF-8 text \(byte 0xff at offset 5\)"),
    ],
)
def test_formats_that_are_no_text_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        read_whole(write(tmp_path / name, content))


def test_a_device_is_not_read() -> None:
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(DataError, match="it is a device, which need not end; give a file"):
            read_whole(path)


def test_a_pipe_is_read_until_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("one\n\ntwo"))
    writer.start()
    assert set(read_whole(pipe).examples) == {"one", "two"}
    writer.join()
    assert f"reading {pipe}, a pipe" in capsys.readouterr().err


def test_pipes_that_never_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(reading, "SILENT_PIPE_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"pipe through which nothing came for 0.01 s; give a file"):
        read_whole(pipe)
    monkeypatch.setattr(reading, "SILENT_PIPE_SECONDS", 10.0)
    monkeypatch.setattr(text_files, "MOST_OF_A_PIPE", 1000)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    os.write(writer, b"x" * 2000)
    with pytest.raises(DataError, match="pipe that did not end within 1,000 bytes"):
        read_whole(pipe)
    os.close(writer)
    os.close(reader)


def test_an_empty_name_is_no_data() -> None:
    for name in ("", " "):
        with pytest.raises(DataError, match="the name of the data is empty"):
            read_whole(name)


def test_a_misspelt_file_finds_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(DataError, match=r"nots.txt: no such file.*did you mean '.*/notes.txt'\?"):
        read_whole(str(tmp_path / "nots.txt"))
    with pytest.raises(DataError, match="there is no directory"):
        read_whole(str(tmp_path / "elsewhere" / "other" / "notes.txt"))


# --- what is told --------------------------------------------------------------------------------


def test_changes_and_losses_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1, "source": "x"}, {"text": " "}, {"text": "a"}, {"text": "b\0"}]
    file = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows)))
    assert set(read_whole(file).notes) == {
        "byte-order mark left out: 1 file",
        "line ends \\r\\n or \\r read as \\n: 1 file",
        "ignored, not part of the schema: 2 values ('id', 'source')",
        "left out, nothing but white space: 1 row",
        "kept, though it holds NUL characters: 1 row",
        "kept, repeats another one of 3: 1 example",
    }


def test_a_directory_tells_what_it_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.csv", "d.csv", "e.pdf", "LICENSE"):
        write(tmp_path / name, name)
    write(tmp_path / "f.txt", b"\x00")
    write(tmp_path / "g.txt", " \n")
    assert set(read_whole(tmp_path).notes) == {
        "left out, by its ending: 4 files (.csv ×2, no ending, .pdf)",
        "skipped, not UTF-8 text: 1 file",
        "left out, nothing but white space: 1 document",
    }


def test_examples_on_both_sides_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", "a\n\nb\n\nc")
    held_out = write(tmp_path / "held.txt", "b\n\nd")
    notes = load_documents(train, held_out_source=held_out).notes
    assert "held out, though trained on as well: 1 example" in notes
    assert "as well" not in " ".join(load_documents(train).notes)


def test_a_budget_tells_what_it_cut(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\n\n".join(f"text {i:05}" for i in range(50)))
    notes = load_documents(file, max_bytes=100, held_out_fraction=0.5).notes
    assert "a.txt: divided at blank lines into 50 texts" in notes
    assert "left out, over max_bytes: 40 documents" in notes


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.html", "<p>x</p>", "a.html: read as one plain text, as it stands"),
        ("a.txt", '{"text": "x"}\n{"text": "y"}\n', "a.txt: .*look like JSON; name it .jsonl"),
        ("a.csv", "text;id\nx;1\n", "a.csv: columns are taken to be divided by ';'"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}', "put into Alpaca's prompt template"),
    ],
)
def test_guesses_are_told(tmp_path: Path, name: str, content: str, note: str) -> None:
    import re

    notes = read_whole(write(tmp_path / name, content)).notes
    assert [line for line in notes if re.search(note, line)]


@pytest.mark.parametrize("n", [10, 30, 40, 80, 100])
def test_of_few_documents_the_nearest_count_is_held_out(tmp_path: Path, n: int) -> None:
    file = write(tmp_path / "a.txt", "\n\n".join(f"text {i}" for i in range(n)))
    split = load_documents(file)
    assert len(split.held_out) == n // 10


def test_rows_that_are_cut_are_counted(byte_tokenizer: Any) -> None:
    rows = [
        PromptCompletion("p" * 10, "c" * 10),
        PromptCompletion("p" * 40, "c" * 10),
        PromptCompletion("p" * 40, "c" * 50),
    ]
    batches = make_batches(rows, byte_tokenizer, seq_len=32, batch_size=2)
    assert batches.n_truncated == 2
    assert list(batches.notes) == [
        "each completion is ended by '<eos>'; what stands before it is read, not learned",
        "2 of 3 rows were longer than seq_len 32 and were cut: 1 lost the start of the prompt, 1 "
        "lost all of the prompt but a token, 1 lost the end of what is learned, with its end "
        "token; a seq_len of 91 holds all",
    ]
    assert "cut" not in " ".join(make_batches(rows, byte_tokenizer, seq_len=91, batch_size=2).notes)


def test_texts_tell_how_they_are_ended(byte_tokenizer: Any) -> None:
    stream = make_batches(["a text", "b"], byte_tokenizer, seq_len=4, batch_size=1)
    assert list(stream.notes) == ["texts follow on each other in windows, each ended by '<eos>'"]
    apart = make_batches(
        ["a text", "b"], byte_tokenizer, seq_len=4, batch_size=1, packing="documents"
    )
    assert "1 of 2 texts were longer than seq_len 4 and were cut into pieces" in apart.notes[1]


# --- instructions and conversations --------------------------------------------------------------


def test_alpaca_rows_get_their_template(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add {input}.", "input": "1 and 2", "output": "3", "text": "the whole"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    file = write(tmp_path / "a.json", json.dumps(rows))
    whole = read_whole(file)
    with_input, without = sorted(whole.examples, key=lambda e: -len(e.prompt))  # type: ignore[union-attr]
    assert with_input == PromptCompletion(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add {input}.\n\n### Input:\n1 and 2\n\n### Response:\n",
        "3",
    )
    assert without == PromptCompletion(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n",
        "hi",
    )
    assert "ignored, not part of the schema: 1 value ('text')" in whole.notes


TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": "5"},
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> Any:
    from support.tiny_model import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_messages_and_sharegpt_are_the_same_conversation(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    expected = Conversation(tuple(Message(t["role"], t["content"]) for t in TALK))
    for row in ({"messages": TALK}, {"conversations": shared}):
        file = write(tmp_path / "a.jsonl", json.dumps(row))
        assert read_whole(file).examples == (expected,)


def learned_in(batches: Any, tokenizer: Any, batch: int = 0) -> set[tuple[str, str]]:
    """Of every sequence the text up to what is learned last, and what of it is learned."""
    input_ids, labels = batches.batch(batch)[:2]
    return {
        (
            tokenizer.decode(ids[: int((row != -100).nonzero().max()) + 1]),
            tokenizer.decode(row[row != -100]),
        )
        for ids, row in zip(input_ids, labels, strict=True)
    }


def test_every_turn_of_the_assistant_is_learned_and_ends_once(chat_tokenizer: Any) -> None:
    talk = Conversation(tuple(Message(t["role"], t["content"]) for t in TALK))
    first = "[user]2+2?\n[assistant]4<eos>"
    whole = f"{first}\n[user]+1?\n[assistant]5<eos>"
    batches = make_batches([talk], chat_tokenizer, seq_len=128, batch_size=2)
    # One sequence, in which no turn is read twice.
    assert learned_in(batches, chat_tokenizer) == {(whole, "4<eos>5<eos>")}
    # Too long for one: each turn after as much as there is room for.
    length = len(chat_tokenizer(whole)["input_ids"])
    batches = make_batches([talk], chat_tokenizer, seq_len=length - 1, batch_size=2)
    assert learned_in(batches, chat_tokenizer) == {(first, "4<eos>"), (whole[1:], "5<eos>")}
    # Without EOS in the template it stands after every turn's last token only where it is learned.
    chat_tokenizer.chat_template = TEMPLATE.replace("<eos>", "|")
    batches = make_batches([talk], chat_tokenizer, seq_len=128, batch_size=2)
    assert {learned for _, learned in learned_in(batches, chat_tokenizer)} == {
        "4|\n<eos>", "5|\n<eos>"
    }  # fmt: skip


def test_conversations_in_one_sequence_give_the_gradient_of_their_turns(
    chat_tokenizer: Any, tiny_mamba2: Any
) -> None:
    """The same labels after the same tokens: what each turn gives by itself, added up."""
    turns = [("user", "2+2?"), ("assistant", "4"), ("user", "+1?"), ("assistant", "5, of course"),
             ("user", "no"), ("assistant", "!")]  # fmt: skip
    talk = Conversation(tuple(Message(*turn) for turn in turns))
    joined = make_batches([talk], chat_tokenizer, seq_len=256, batch_size=1)
    apart = make_batches(rendered([talk], chat_tokenizer)[::-1], chat_tokenizer, seq_len=256,
                         batch_size=3)  # fmt: skip
    assert (len(joined.batch(0).labels), len(apart.batch(0).labels)) == (1, 3)
    model = copy.deepcopy(tiny_mamba2).double()
    found = []
    for batches in (joined, apart):
        model.zero_grad()
        input_ids, labels = batches.batch(0)[:2]
        hidden = model.backbone(input_ids, use_cache=False)[0]
        loss = functional.cross_entropy(
            model.lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    # The scan's own sums are in fp32.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_conversations_are_evaluated(chat_tokenizer: Any, tiny_mamba2: Any) -> None:
    talk = Conversation(tuple(Message(t["role"], t["content"]) for t in TALK))
    metrics = evaluate_examples(Scorer(tiny_mamba2, chat_tokenizer), [talk])
    assert (metrics.n_tokens, metrics.n_documents) == (2, 2)  # type: ignore[union-attr]


def test_conversations_need_a_template_that_takes_them(
    byte_tokenizer: Any, chat_tokenizer: Any
) -> None:
    talk = Conversation((Message("user", "x"), Message("assistant", "y")))
    with pytest.raises(DataError, match=r"has no chat template .*give rows with 'prompt'"):
        make_batches([talk], byte_tokenizer, seq_len=64, batch_size=1)
    chat_tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match=r"conversation 1: .*refuses it: TemplateError: no such"):
        make_batches([talk], chat_tokenizer, seq_len=64, batch_size=1)
    chat_tokenizer.chat_template = "{% if add_generation_prompt %}A{% else %}B{% endif %}"
    with pytest.raises(DataError, match="does not continue what it prompts for"):
        make_batches([talk], chat_tokenizer, seq_len=64, batch_size=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "'messages' must be a list of messages, got str"),
        ({"messages": [{"role": "user"}]}, r"'messages'\[0\] must be an object with 'role' and"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message has the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
         r"'messages'\[0\].content must be a string, got list"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
         r"'messages'\[0\] has tool_calls; only text messages"),
        ({"instruction": "x", "output": ""}, "'output' is empty"),
    ],
)  # fmt: skip
def test_bad_conversations_and_instructions_say_what(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(DataError, match=rf"a.jsonl:1: {message}"):
        read_whole(file)
