"""Rows of each schema become the examples that lm-evaluation-harness would score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.training.data.examples import (
    DataError,
    MultipleChoice,
    PromptCompletion,
    kind_of,
    text_bytes,
)
from prodial_kernels.training.data.schemas import clean_hellaswag, parse_rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"


def rows(name: str) -> list[tuple[str, Any]]:
    lines = (FIXTURES / name).read_text(encoding="utf-8").splitlines()
    return [(f"row {i}", json.loads(line)) for i, line in enumerate(lines) if line.strip()]


def test_hellaswag_is_labelled_capitalised_and_cleaned() -> None:
    first, second = parse_rows(rows("hellaswag.jsonl"))
    assert isinstance(first, MultipleChoice)
    assert isinstance(second, MultipleChoice)
    assert first.contexts[0] == ("Potting a plant: A gardener fills a clay pot with dark soil. She")
    assert first.label == 0
    assert first.pair(0)[1] == " presses a seedling into the middle."
    # " [title]" becomes ". ", other brackets vanish, and double spaces shrink once.
    assert second.contexts[0] == (
        "Home and Garden: How to oil a squeaking hinge. Find the hinge. Move the door slowly and "
        "listen."
    )
    # The harness, too, strips before it removes brackets, so a leading one leaves its space.
    assert second.choices[1] == " Drop some oil on the pin. Wipe off the rest."
    assert second.label == 1


def test_hellaswag_without_the_context_in_two_parts() -> None:
    row = {"ctx": "He lifts the lid and", "endings": ["looks in.", "[x]"], "label": 0}
    (example,) = parse_rows([("row", row)])
    assert isinstance(example, MultipleChoice)
    assert example.contexts == ("He lifts the lid and",) * 2
    # An ending of mark-up only is empty; the space before it is still there to score.
    assert example.pair(1) == ("He lifts the lid and", " ")
    with pytest.raises(DataError, match="needs 'ctx', or 'ctx_a' and 'ctx_b'"):
        parse_rows([("row", {"endings": ["a", "b"], "label": 0})])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a [title] b ", "a. b"),
        ("[title] a", " a"),
        ("a [x] b [y z] c", "a b c"),
        ("a    b", "a  b"),
    ],
)
def test_hellaswag_cleaning_step_by_step(raw: str, clean: str) -> None:
    assert clean_hellaswag(raw) == clean


def test_winogrande_scores_the_common_ending_after_each_option() -> None:
    first, second = parse_rows(rows("winogrande.jsonl"))
    assert isinstance(first, MultipleChoice)
    assert isinstance(second, MultipleChoice)
    assert first.pair(0) == (
        "The bucket would not fit under the tap because the bucket",
        " was too tall.",
    )
    assert first.pair(1)[0].endswith("because the tap")
    assert first.pair(1)[1] == first.pair(0)[1]
    assert (first.label, second.label) == (0, 1)


def test_arc_takes_letters_digits_and_a_key_of_the_other_alphabet() -> None:
    first, digits, mixed = parse_rows(rows("arc.jsonl"))
    assert isinstance(first, MultipleChoice)
    assert isinstance(digits, MultipleChoice)
    assert isinstance(mixed, MultipleChoice)
    assert first.pair(2) == (
        "Question: Which of these gives off its own light?\nAnswer:",
        " a candle flame",
    )
    assert (first.label, digits.label, mixed.label) == (2, 1, 0)
    assert len(mixed.choices) == 5


def test_generic_multiple_choice_adds_a_space_only_where_none_is() -> None:
    plain, after, before = parse_rows(rows("multiple_choice.jsonl"))
    assert isinstance(plain, MultipleChoice)
    assert isinstance(after, MultipleChoice)
    assert isinstance(before, MultipleChoice)
    assert plain.pair(0) == ("The sky on a clear day is", " blue")
    assert after.pair(1) == ("Two plus two is ", "four")
    assert before.pair(1) == ("Bread is baked in", " an oven")
    assert (plain.label, after.label, before.label) == (0, 1, 1)


def test_text_and_completions() -> None:
    texts = parse_rows(rows("text.jsonl"))
    assert [str(t)[:5] for t in texts] == ["The k", "Three", "Rain "]  # the blank one is left out
    completions = parse_rows(rows("prompt_completion.jsonl"))
    assert completions[0] == PromptCompletion("Translate to French: bread ->", " pain")
    assert kind_of(completions) == "prompt/completion"
    assert text_bytes(completions[1]) == len(
        "Translate to French: the water of the river -> l'eau de la rivière".encode()
    )


WINOGRANDE = {"sentence": "The _ is here.", "option1": "a", "option2": "b", "answer": "1"}
ARC = {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
GENERIC = {"context": "c", "choices": ["x", "y"], "label": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"body": "x", "id": 1},
            r"unknown keys \(body, id\).*\n  text: text\n  prompt/completion:",
        ),
        (
            {"prompt": "x", "id": 1},
            "'completion' is missing, which rows of the schema 'prompt/completion' need beside "
            "'prompt'",
        ),
        ({"text": "x", "prompt": "p", "completion": "c"}, "'text' and 'prompt/completion'"),
        ({"text": 5}, "'text' must be a string, got int: 5"),
        ({"text": "\ud800"}, "'text' is not valid Unicode"),
        (["x"], "expected a JSON object with named values, got list; write it as one"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        (GENERIC | {"label": 2}, "label 2 is out of range: there are 2 choices"),
        (GENERIC | {"label": -1}, "label -1 is out of range"),
        (GENERIC | {"label": ""}, "'label' is empty: test splits often come without labels"),
        (GENERIC | {"label": True}, "'label' must be a whole number, got True"),
        (GENERIC | {"label": "x"}, "'label' must be a whole number, got 'x'"),
        (GENERIC | {"choices": ["x"]}, "at least 2 choices, got 1"),
        (GENERIC | {"choices": "xy"}, "'choices' must be a list of strings, got str"),
        (GENERIC | {"choices": ["x", 1]}, r"'choices'\[1\] must be a string"),
        (GENERIC | {"context": "", "choices": ["", "x"]}, "choice 0 is empty"),
        (WINOGRANDE | {"sentence": "No gap."}, "no blank '_'"),
        (WINOGRANDE | {"answer": "3"}, "'answer' must be '1' or '2', got '3'"),
        (WINOGRANDE | {"answer": ""}, "'answer' is empty"),
        (ARC | {"answerKey": "D"}, "'answerKey' 'D' is not among the labels A, B"),
        (ARC | {"choices": ["x", "y"]}, "must be an object with the lists 'text' and 'label'"),
        (ARC | {"choices": {"text": ["x"], "label": ["A", "B"]}}, "1 texts but 2 labels"),
    ],
)
def test_bad_rows_say_where_and_what(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^data\.jsonl:7: .*{message}"):
        parse_rows([("data.jsonl:7", row)])


def test_mixed_schemas_name_both_rows() -> None:
    with pytest.raises(DataError, match=r"b:2: .* 'prompt/completion', but b:1 follows 'text'"):
        parse_rows([("b:1", {"text": "x"}), ("b:2", {"prompt": "x", "completion": "y"})])


def test_kind_of_refuses_none_mixed_and_foreign() -> None:
    with pytest.raises(DataError, match="no examples"):
        kind_of([])
    with pytest.raises(DataError, match="one kind, got prompt/completion, text"):
        kind_of(["x", PromptCompletion("", "y")])
    with pytest.raises(TypeError, match="got dict"):
        kind_of([{"text": "x"}])  # type: ignore[list-item]


def test_multiple_choice_wants_a_context_for_each_choice() -> None:
    with pytest.raises(DataError, match="1 contexts for 2 choices"):
        MultipleChoice(("c",), ("x", "y"), 0)
