"""A long text is tokenised in pieces: the same tokens, little memory, and no more than is asked."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest

from prodial_kernels.embedded import embedded_model_path
from prodial_kernels.training.data import tokenization
from prodial_kernels.training.data.tokenization import encode, encode_up_to
from prodial_kernels.training.scoring.language_model import evaluate_language_model
from prodial_kernels.training.scoring.log_likelihood import Scorer

PROSE = "The state of a scan, kept small; it's 4,096 numbers (or so).\n\n    indented\tHere  ends. "


def draw(alphabet: str, n: int) -> str:
    rng = random.Random(0)
    return "".join(rng.choice(alphabet) for _ in range(n))


TEXTS = {
    "prose": PROSE * 60,
    "one line": " ".join(PROSE.split()) * 60,
    "white space": "a   \n\n   b " * 500,
    "digits": draw("0123456789", 5000),
    "base64": draw("abcDEF0123+/", 5000),
    "cjk": draw("日本語漢字文章。、", 5000),
    "anything": draw(" \n\tabcé1.'e\u0301", 5000),
    "returns": "x y\r\n" * 1000,
}


def trained(pre_tokenizer: Any, *, words: bool = True) -> Any:
    """A BPE of 600 tokens over the texts, behind a pre-tokenizer."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([text[:2000] for text in TEXTS.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    return {
        "embedded": AutoTokenizer.from_pretrained(embedded_model_path()),
        # As GPT-NeoX has it, which most Mamba models use.
        "gpt": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        # As SentencePiece has it: every text begins with a space that is not there.
        "metaspace": trained(pre_tokenizers.Metaspace(prepend_scheme="always")),
        "words": trained(pre_tokenizers.Whitespace()),
    }


@pytest.mark.parametrize("name", ["embedded", "gpt", "metaspace", "words"])
@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_give_the_tokens_of_the_whole(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    tokenizer, text = tokenizers[name], TEXTS[kind]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for size in (300, 1024):
        monkeypatch.setattr(tokenization, "CHARACTERS_AT_ONCE", size)
        before, ids, after = encode(tokenizer, ["short", text, "end"])
        assert ids.tolist() == whole
        assert before.tolist() == tokenizer("short", add_special_tokens=False)["input_ids"]
        assert after.tolist() == tokenizer("end", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["embedded", "gpt", "metaspace", "words"])
def test_the_tokenizer_never_gets_a_long_text_whole(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tokenization, "CHARACTERS_AT_ONCE", 1000)
    longest = 0
    ids_of = tokenization._ids

    def watched(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return ids_of(tokenizer, texts)

    monkeypatch.setattr(tokenization, "_ids", watched)
    for kind in ("prose", "one line", "base64", "cjk"):
        list(encode(tokenizers[name], [TEXTS[kind]]))
    assert longest <= 1000 + 128


def test_memory_does_not_grow_with_the_text(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["embedded"]
    text = " ".join(PROSE.split()) * 12_000
    tracemalloc.start()
    try:
        (ids,) = encode(tokenizer, [text])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Python's part alone: lists of the whole would be some 40 bytes a token.
    assert len(ids) > 200_000
    assert peak < 6 * 2**20


def test_no_more_is_tokenised_than_is_asked_for(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["embedded"]
    monkeypatch.setattr(tokenization, "CHARACTERS_AT_ONCE", 1000)
    (found,) = encode_up_to(tokenizer, [TEXTS["prose"], "never read"], 50)
    text, ids = found
    assert TEXTS["prose"].startswith(text)
    assert len(ids) >= 50
    assert len(text) <= 1000
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_limit_counts_tokens_and_bytes_that_belong_together(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=4096, hidden_size=16, state_size=8, num_hidden_layers=1, num_heads=4,
            head_dim=8, n_groups=1, expand=2, chunk_size=16,
        )
    )  # fmt: skip
    monkeypatch.setattr(tokenization, "CHARACTERS_AT_ONCE", 1000)
    documents = ["a short one", TEXTS["prose"], "never read"]
    metrics = evaluate_language_model(
        Scorer(model, tokenizers["embedded"], seq_len=32), documents, max_tokens=80
    )
    assert 70 < metrics.n_tokens <= 80
    assert metrics.n_documents == 2
    assert len("a short one") < metrics.n_bytes < 500
