"""A tiny random Mamba-2 and a byte tokenizer on disk, and text to train them on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import prodial_kernels


def tiny_mamba2(*, hidden_size: int = 32) -> Any:
    """A random Mamba-2 of two layers over 257 tokens; the same one every time."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=264,
        hidden_size=hidden_size,
        state_size=8,
        num_hidden_layers=2,
        num_heads=2 * hidden_size // 8,
        head_dim=8,
        n_groups=1,
        expand=2,
        chunk_size=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Mamba2ForCausalLM(config)


def byte_tokenizer() -> Any:
    """One token per byte (1 to 256) and EOS (0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_tiny_model(folder: Path) -> Path:
    """Write the model and its tokenizer in transformers' format."""
    tiny_mamba2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, *, documents: int = 60) -> Path:
    """Write documents with something to learn in them."""
    colours = ("red", "green", "blue", "black", "white")
    texts = [
        f"The house with number {i} is {colours[i % 5]}, and number {i + 1} is "
        f"{colours[(i + 1) % 5]}."
        for i in range(documents)
    ]
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return file


def subprocess_environment() -> dict[str, str]:
    """An environment in which ``python -m prodial_kernels`` is this package, on one thread.

    Modules of the tests and what the caller's ``PYTHONPATH`` has can be imported too. Sums depend
    on the number of threads, so processes that are compared must share it.
    """
    root = str(Path(prodial_kernels.__file__).parents[1])
    paths = [root, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
