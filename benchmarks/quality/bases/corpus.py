"""The pretraining text of the language bases: English and code from packages, as token ids."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.bases.sources import CodeSource
from benchmarks.quality.packages import package_version, unpacked
from prodial_kernels.embedded.making.corpus import Document, gather, read_corpus
from prodial_kernels.embedded.making.sources import Source
from prodial_kernels.embedded.making.tokens import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

__all__ = ["SPLITS", "build", "read_split"]

SPLITS = ("train", "english", "code", "unseen_english", "unseen_code")
"""``english`` and ``code``: one file in a hundred of every package; ``unseen_*``: packages that
training never saw."""

_TOKENIZER_BYTES = 20_000_000
_SMALLEST, _LARGEST = 400, 200_000  # bytes of a file of code
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _code(source: CodeSource, folder: Path, seen: set[int]) -> Iterator[Document]:
    """Yield a package's files in an order that samples it evenly, exact repeats left out."""
    files = [
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*")
        if path.suffix in source.suffixes and path.is_file() and not path.is_symlink()
    ]
    left = source.limit_mb * 1e6
    for name, path in sorted(files, key=lambda item: _digest(f"order/{item[0]}")):
        raw = path.read_bytes()
        if not _SMALLEST <= len(raw) <= _LARGEST:
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        key = _digest(text)
        # Tables of numbers or of non-Latin text teach a small model nothing.
        letters = sum(c.isascii() and c.isalpha() for c in text)
        if key in seen or letters < 0.35 * len(text):
            continue
        seen.add(key)
        if source.held_out:
            split = "unseen_code"
        else:
            held = _digest(f"split/{source.package}/{name}") % 100 == 0
            split = "code" if held else "train"
        yield Document(source.package, name, split, text)
        left -= len(raw)
        if left <= 0:
            return


def build(
    english: Iterable[Source],
    code: Iterable[CodeSource],
    work: Path,
    out: Path,
    *,
    vocab_size: int = 8192,
) -> dict[str, Any]:
    """Download, clean, tokenise; write one compressed file per split and the tokenizer.

    Args:
        english: Packages with documentation.
        code: Packages with source code.
        work: Folder for archives and intermediate text; used again when run again.
        out: Folder for ``tokenizer.json``, ``<split>.bin.xz`` (little-endian 16-bit ids, documents
            separated by token 0) and ``corpus.json`` (sources, versions, licences, sizes).
        vocab_size: Tokens of the byte-level BPE.

    Returns:
        What ``corpus.json`` holds.
    """
    english, code = list(english), list(code)
    documents: list[Document] = []
    sources: list[dict[str, Any]] = []
    if english:
        text_work = work / "english"
        renamed = {"heldout_docs": "english", "heldout_project": "unseen_english"}
        corpus = gather(english, text_work, processes=1)
        for document in read_corpus(corpus):
            split = renamed.get(document.split, document.split)
            documents.append(Document(document.package, document.name, split, document.text))
        sources += json.loads((text_work / "manifest.json").read_text())
    folders = unpacked([source.package for source in code], work)
    seen: set[int] = set()
    for source in code:
        found = list(_code(source, folders[source.package], seen))
        documents += found
        sources.append(
            {
                "package": source.package,
                "version": package_version(source.package, work),
                "licence": source.licence,
                "documents": len(found),
                "bytes": sum(len(d.text.encode()) for d in found),
            }
        )
    # English and code side by side in every part of the stream.
    random.Random(0).shuffle(documents)
    tokenizer = train_tokenizer(_sample(documents), vocab_size)
    save_tokenizer(tokenizer, out)
    record: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "splits": {}}
    separator = tokenizer.get_vocab()[END_OF_TEXT]
    for split in SPLITS:
        texts = [d.text for d in documents if d.split == split]
        ids: list[np.ndarray] = []
        for i in range(0, len(texts), 256):
            for row in tokenizer.encode_batch(texts[i : i + 256]):
                ids.append(np.array([separator, *row.ids], dtype="<i2"))
        stream = np.concatenate(ids) if ids else np.empty(0, dtype="<i2")
        with lzma.open(out / f"{split}.bin.xz", "wb", filters=_LZMA) as file:
            file.write(stream.tobytes())
        size = sum(len(text.encode()) for text in texts)
        record["splits"][split] = {"documents": len(texts), "bytes": size, "tokens": len(stream)}
    record["sources"] = sources
    (out / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _sample(documents: list[Document]) -> Iterator[str]:
    left = _TOKENIZER_BYTES
    for document in documents:
        if document.split == "train":
            left -= len(document.text.encode())
            if left < 0:
                return
            yield document.text


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's ids, int16 [tokens], and the bytes that each token stands for.

    Raises:
        ValueError: The folder has no such split.
    """
    path = folder / f"{split}.bin.xz"
    if not path.is_file():
        raise ValueError(f"corpus: expected the file {path}, found none; make it with `corpus`")
    data = bytearray(lzma.decompress(path.read_bytes()))
    ids = torch.frombuffer(data, dtype=torch.int16) if data else torch.empty(0).short()
    tokenizer = load_tokenizer(folder)
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return ids, torch.tensor(lengths)
