"""Generating text: the tokens of one forward, in whole characters, ended where it should be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import apply_prodial
from prodial_kernels.training.data.examples import DataError, Message
from prodial_kernels.training.generating import (
    GenerationError,
    Sampling,
    end_tokens,
    generate,
    text_of,
)
from support.mixers.adapted_families import CONFIG
from support.models import FAMILIES, build, randomise_adapters

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Scripted(nn.Module):
    """A model that writes given tokens, whatever it reads."""

    def __init__(self, tokens: list[int], vocabulary: int = 264) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, 1)
        self.tokens = tokens
        self.start: int | None = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor) -> Any:
        length = input_ids.shape[1]
        self.start = length if self.start is None else self.start
        logits = torch.zeros(1, length, self.embeddings.num_embeddings)
        logits[0, -1, self.tokens[(length - self.start) % len(self.tokens)]] = 1
        return SimpleNamespace(logits=logits, items=lambda: ())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_text_of_every_family_is_that_of_one_forward(name: str, byte_tokenizer: Any) -> None:
    model = build(name, vocab_size=264)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    said: list[str] = []
    result = generate(
        model, byte_tokenizer, "A house", Sampling(max_new_tokens=12), on_text=said.append
    )
    assert model.training
    ids = byte_tokenizer("A house")["input_ids"]
    tokens = list(result.tokens)
    logits = model.eval()(torch.tensor([ids + tokens[:-1]]), use_cache=False).logits[0]
    assert tokens == logits[len(ids) - 1 :].argmax(-1).tolist()
    assert result.text == "".join(said) == text_of(byte_tokenizer, tokens)
    assert result.prompt_tokens == len(ids)
    assert not result.notes


def test_drawn_tokens_follow_seed_and_likelihood(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    def drawn(**options: Any) -> list[int]:
        sampling = Sampling(max_new_tokens=24, **options)
        return list(generate(tiny_mamba2, byte_tokenizer, "A", sampling).tokens)

    greedy = drawn()
    hot = drawn(temperature=2.0, seed=1)
    assert hot == drawn(temperature=2.0, seed=1)
    assert hot != drawn(temperature=2.0, seed=2)
    assert hot != greedy
    assert greedy == drawn(temperature=2.0, top_p=1e-9, seed=5) == drawn(temperature=1e-300)


def test_no_token_outside_top_p_is_drawn(byte_tokenizer: Any) -> None:
    class Even(Scripted):
        def forward(self, input_ids: torch.Tensor) -> Any:
            output = super().forward(input_ids)
            output.logits[0, -1] = torch.tensor([0.1] * 260 + [5.0, 6.0, 7.0, 5.5])
            return output

    def drawn(top_p: float) -> set[int]:
        sampling = Sampling(200, temperature=1.0, top_p=top_p)
        return set(generate(Even([1]), byte_tokenizer, "A", sampling).tokens)

    # By likelihood: 262 has 0.50 of it, 261 0.19, 263 0.11, 260 0.07.
    assert drawn(0.5) == {262}
    assert drawn(0.6) == {262, 261}
    assert drawn(0.75) == {262, 261, 263}
    assert len(drawn(1.0)) > 4


def test_text_ends_at_an_end_token_of_tokenizer_or_model(byte_tokenizer: Any) -> None:
    a, b, stop = (byte_tokenizer(c)["input_ids"][0] for c in "ab#")
    for config, script in (({}, [a, b, 0]), ({"eos_token_id": [263, stop]}, [a, b, stop])):
        model = Scripted([*script, a, a, a])
        model.generation_config = type("Settings", (), config)()
        said: list[str] = []
        result = generate(model, byte_tokenizer, "x", on_text=said.append)
        assert (result.text, result.ended) == ("ab", "end token")
        assert said == ["a", "b"]
        assert list(result.tokens) == script
        assert 0 in end_tokens(model, byte_tokenizer)
    cut = generate(Scripted([a]), byte_tokenizer, "x", Sampling(max_new_tokens=3))
    assert (cut.text, cut.ended) == ("aaa", "max_new_tokens")
    assert "3 written" in cut.summary
    assert str(cut) == "aaa"


def test_text_comes_in_whole_characters(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("né 😀!")["input_ids"]
    said: list[str] = []
    generate(Scripted([*tokens, 0]), byte_tokenizer, "x", on_text=said.append)
    assert said == ["n", "é", " ", "😀", "!"]
    # What never becomes a character is not waited for without end.
    broken = byte_tokenizer("😀")["input_ids"][:1] * 20
    said.clear()
    result = generate(Scripted([*broken, 0]), byte_tokenizer, "x", on_text=said.append)
    assert len(said) > 1
    assert set(result.text) == {"\ufffd"}


def test_a_prompt_begins_as_the_tokenizer_begins_texts(
    byte_tokenizer: Any, bos_tokenizer: Any
) -> None:
    sampling = Sampling(max_new_tokens=1)
    read = [
        generate(Scripted([5]), tokenizer, prompt, sampling).prompt_tokens
        for tokenizer, prompt in (
            (byte_tokenizer, "ab"), (byte_tokenizer, ""), (bos_tokenizer, "ab"), (bos_tokenizer, "")
        )
    ]  # fmt: skip
    assert read == [2, 1, 3, 1]


def test_a_conversation_is_read_by_the_template(byte_tokenizer: Any, bos_tokenizer: Any) -> None:
    turns = [Message("system", "be brief"), Message("user", "hi")]
    with pytest.raises(GenerationError, match="no chat template"):
        generate(Scripted([5]), byte_tokenizer, turns)
    for tokenizer, start in ((byte_tokenizer, ""), (bos_tokenizer, "<bos>")):
        tokenizer.chat_template = start + TEMPLATE
        try:
            result = generate(Scripted([5]), tokenizer, turns, Sampling(max_new_tokens=1))
        finally:
            tokenizer.chat_template = None
        text = "[system]be brief[user]hi[assistant]"
        assert result.prompt == text
        assert result.prompt_tokens == len(text) + bool(start)


def test_a_prompt_that_ends_in_a_space_is_noted(byte_tokenizer: Any) -> None:
    (note,) = generate(Scripted([5]), byte_tokenizer, "A: ", Sampling(1)).notes[-1:]
    assert "ends in a space" in note


def test_what_cannot_be_generated_is_refused(byte_tokenizer: Any) -> None:
    for options, message in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "0 or more"),
        ({"temperature": float("nan")}, "0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "above 0"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
        ({"seed": -1}, "0 or more"),
    ):
        with pytest.raises(GenerationError, match=message):
            Sampling(**options)
    with pytest.raises(DataError, match="outside the model's vocabulary of 4"):
        generate(Scripted([1], vocabulary=4), byte_tokenizer, "zz")

    class Overflown(Scripted):
        def forward(self, input_ids: torch.Tensor) -> Any:
            output = super().forward(input_ids)
            output.logits[...] = float("nan")
            return output

    with pytest.raises(GenerationError, match="not finite"):
        generate(Overflown([1]), byte_tokenizer, "a")
