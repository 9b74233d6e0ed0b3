"""A byte-level tokenizer, tiny random models, and both ways to compute a cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

EOS = 0


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A fast tokenizer with one token per byte (1 to 256) and EOS (0), without BOS."""
    return make_tokenizer([])


@pytest.fixture(scope="session")
def merging_tokenizer() -> Any:
    """The same with a few merges, so that the boundary of two texts can fall inside a token."""
    return make_tokenizer([("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"), ("Ġ", "a")])


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """The byte-level one, but it begins every text with BOS (257)."""
    return make_tokenizer([], bos=True)


def make_tokenizer(merges: list[tuple[str, str]], *, bos: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<eos>", *alphabet, *(a + b for a, b in merges), *(["<bos>"] if bos else [])]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # One pre-token per line: merges may cross spaces, as the tests of the boundary need.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", **({"bos_token": "<bos>"} if bos else {})
    )


@pytest.fixture(scope="session")
def tiny_mamba2() -> Any:
    """A random Mamba-2 language model of two layers over 264 tokens."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=264,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        expand=2,
        chunk_size=16,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.5,
    )
    return Mamba2ForCausalLM(config).eval()


@pytest.fixture(params=["pytorch", "kernel"])
def by_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel computes the cross-entropy, interpreted."""
    from prodial_kernels.training.step import chunked_loss

    kernel: bool = request.param == "kernel"
    if kernel and torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU")
    monkeypatch.setattr(chunked_loss, "takes_kernel", lambda *_: kernel)
    return kernel
