"""From clean documents to training input: the byte-level BPE tokenizer and the token shards."""

import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prodial_kernels.embedded.making.corpus import SPLITS, Document, read_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "END_OF_TEXT",
    "build_shards",
    "load_shard",
    "load_tokenizer",
    "save_tokenizer",
    "token_byte_lengths",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"  # token 0: document separator, and the model's bos, eos and pad
# A line break takes the next line's indentation along, so that code spends one token on both; a
# word takes the one space, dot, underscore or bracket in front of it; digits stand alone.
_PATTERN = (
    r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?![^ \t\r\n])|\s+"
)
# Little-endian 16-bit values: positions alternate between two contexts.
_LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}
]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer; token 0 is :data:`END_OF_TEXT`.

    Args:
        texts: Training documents.
        vocab_size: Number of tokens, counting the 256 bytes and the separator.

    Returns:
        The tokenizer; it encodes any Unicode text and decodes it back unchanged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without white space the file is a third smaller; it ships in the package.
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the tokenizer that :func:`save_tokenizer` wrote into ``folder``."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_byte_lengths(tokenizer: "Tokenizer") -> torch.Tensor:
    """Return how many bytes of text each token stands for.

    Returns:
        An int64 tensor ``[vocab_size]``; 0 for :data:`END_OF_TEXT`.
    """
    # Byte-level BPE writes every byte as one printable character.
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return torch.tensor(lengths, dtype=torch.int64)


def _encode(tokenizer: "Tokenizer", documents: list[Document]) -> torch.Tensor:
    """Token ids of the documents, each preceded by the separator: int16 ``[tokens]``."""
    separator = tokenizer.get_vocab()[END_OF_TEXT]
    ids: list[torch.Tensor] = []
    for i in range(0, len(documents), 512):
        batch = tokenizer.encode_batch([document.text for document in documents[i : i + 512]])
        ids += [torch.tensor([separator, *row.ids], dtype=torch.int16) for row in batch]
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int16)


def _text_sample(documents: list[Document], seed: int, limit_bytes: int) -> Iterator[str]:
    """Yield a random sample of training texts of at most ``limit_bytes`` bytes."""
    order = [document for document in documents if document.split == "train"]
    random.Random(seed).shuffle(order)
    for document in order:
        limit_bytes -= len(document.text.encode())
        if limit_bytes < 0:
            return
        yield document.text


def build_shards(corpus: Path, out: Path, vocab_size: int, seed: int = 0) -> dict[str, int]:
    """Train the tokenizer on a corpus's training split and write every split as a token shard.

    Args:
        corpus: The file :func:`prodial_kernels.embedded.making.corpus.gather` wrote.
        out: Folder for the tokenizer and the shards ``<split>.bin.xz``: xz-compressed
            little-endian 16-bit token ids, documents separated by :data:`END_OF_TEXT`.
        vocab_size: Number of tokens; at most 32,768, so that ids fit in int16.
        seed: Which documents the tokenizer is trained on.

    Returns:
        The number of tokens of each split.

    Raises:
        ValueError: ``vocab_size`` exceeds 32,768.
    """
    if vocab_size > 32768:
        raise ValueError(
            f"vocab_size: expected at most 32768 (shards hold 16-bit ids), got {vocab_size}"
        )
    documents = list(read_corpus(corpus))
    tokenizer = train_tokenizer(_text_sample(documents, seed, 60_000_000), vocab_size)
    save_tokenizer(tokenizer, out)
    counts = {}
    for split in SPLITS:
        ids = _encode(tokenizer, [document for document in documents if document.split == split])
        counts[split] = ids.numel()
        with lzma.open(out / f"{split}.bin.xz", "wb", filters=_LZMA_FILTERS) as file:
            file.write(ids.numpy().astype("<i2").tobytes())
    return counts


def load_shard(path: Path) -> torch.Tensor:
    """Read a token shard.

    Returns:
        An int16 tensor ``[tokens]``.

    Raises:
        ValueError: There is no such file.
    """
    if not path.is_file():
        raise ValueError(
            f"shards: expected the file {path}, found none; make it with the corpus command"
        )
    return torch.frombuffer(bytearray(lzma.open(path).read()), dtype=torch.int16)
