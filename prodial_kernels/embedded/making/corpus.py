"""Gather the pretraining text: documentation packages to clean, deduplicated, split documents."""

import gzip
import hashlib
import json
import lzma
import multiprocessing
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from prodial_kernels.embedded.making.html_text import html_to_text
from prodial_kernels.embedded.making.sources import Source

__all__ = ["SPLITS", "Document", "gather", "read_corpus"]

SPLITS = ("train", "heldout_docs", "heldout_project")
_HELD_OUT_SHARE = 100  # one file in so many of every package is held out
_LONG_PARAGRAPH = 80  # characters; longer ones are kept once in the whole corpus
_SHORT_PARAGRAPH = 24  # characters; shorter ones ("Parameters", "Examples") are never dropped
_REPEATS = 20  # how often a paragraph between the two may occur
_MIN_DOCUMENT = 400  # bytes
_GENERATED = (
    "/_sources/ /_modules/ /_static/ /search/ genindex modindex search.html print.html "
    "_source.html /changelog -index.html blacklist"
)
_ENGLISH_WORDS = (
    "a an and are as at be by can for from has if in is it not of on or that the this to when "
    "which will with you"
)
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Document:
    """One page of clean text: which package and file it came from and its split."""

    package: str
    name: str
    split: str
    text: str


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _download(sources: Iterable[Source], folder: Path) -> dict[str, Path]:
    """Fetch the packages that ``folder`` lacks; returns each package's archive."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s.package for s in sources if not any(folder.glob(f"{s.package}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=folder, check=True)
    return {s.package: next(folder.glob(f"{s.package}_*.deb")) for s in sources}


def _unpack(archive: Path, folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)


def _version(archive: Path) -> str:
    command = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _is_prose(text: str) -> bool:
    """Whether a page reads as English rather than as a table, a dump or another language."""
    words = _WORD.findall(text)
    if len(words) < 40 or sum(len(word) for word in words) < 0.45 * len(text):
        return False
    foreign = sum(not character.isascii() for character in text)
    common = sum(word.lower() in _ENGLISH for word in words)
    return common >= 0.12 * len(words) and foreign <= 0.02 * len(text)


def _pages(source: Source, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` of a package's pages, in an order that samples it evenly."""
    files = [
        (str(path.relative_to(folder)), path)
        for path in folder.rglob("*.html*")
        if path.is_file()
        and not path.is_symlink()
        and not any(mark in f"/{path.relative_to(folder)}" for mark in _GENERATED.split())
    ]
    for name, path in sorted(files, key=lambda item: _digest(f"order/{item[0]}")):
        wanted = not source.only or any(part in name for part in source.only)
        if not wanted or any(part in name for part in source.skip):
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield name, html_to_text(raw.decode("utf-8", errors="replace"))
    for path in sorted(folder.rglob("*.dict.dz")):  # dictd's format is seekable gzip
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        pieces = re.split(r"\n(?=\S)", text)
        for i in range(0, len(pieces), 100):
            yield f"{path.relative_to(folder)}/{i // 100:05d}", "\n".join(pieces[i : i + 100])


def _read_package(job: tuple[Source, Path]) -> list[tuple[str, str]]:
    source, folder = job
    pages: list[tuple[str, str]] = []
    taken = 0
    for name, text in _pages(source, folder):
        if "\ufffd" in text or not _is_prose(text):
            continue
        pages.append((name, text))
        taken += len(text.encode())
        if taken >= source.limit_mb * 1e6:
            break
    return sorted(pages)


class _Deduplicator:
    """Drops paragraphs that were seen before anywhere in the corpus."""

    def __init__(self) -> None:
        self._long: set[int] = set()
        self._short: Counter[int] = Counter()

    def clean(self, text: str) -> str:
        kept = []
        for paragraph in text.split("\n\n"):
            stripped = paragraph.strip()
            if len(stripped) > _SHORT_PARAGRAPH:
                key = _digest(stripped)
                if len(stripped) > _LONG_PARAGRAPH:
                    if key in self._long:
                        continue
                    self._long.add(key)
                else:
                    self._short[key] += 1
                    if self._short[key] > _REPEATS:
                        continue
            kept.append(paragraph)
        return "\n\n".join(kept).strip("\n")


def _split_of(source: Source, name: str) -> str:
    if source.held_out:
        return "heldout_project"
    held_out = _digest(f"split/{source.package}/{name}") % _HELD_OUT_SHARE == 0
    return "heldout_docs" if held_out else "train"


def gather(sources: Iterable[Source], work: Path, processes: int = 2) -> Path:
    """Download, clean, deduplicate and split the packages into one compressed corpus.

    Exact repeats of a paragraph over 80 characters are dropped across the whole corpus, so no such
    paragraph of a held-out page occurs in training.

    Args:
        sources: The packages to read.
        work: Folder for archives, unpacked packages and the result; reused when run again.
        processes: Worker processes for the conversion to text.

    Returns:
        ``work/corpus.jsonl.xz``: one JSON object a line with the fields of :class:`Document`.
        ``work/manifest.json`` beside it lists each package's version, licence, documents and bytes.

    Raises:
        subprocess.CalledProcessError: ``apt-get`` or ``dpkg-deb`` failed.
    """
    sources = list(sources)
    archives = _download(sources, work / "deb")
    for source in sources:
        _unpack(archives[source.package], work / "unpacked" / source.package)
    jobs = [(source, work / "unpacked" / source.package) for source in sources]
    deduplicator = _Deduplicator()
    manifest = []
    target = work / "corpus.jsonl.xz"
    with (
        multiprocessing.Pool(processes) as pool,
        lzma.open(target, "wt", encoding="utf-8", preset=1) as out,
    ):
        for source, pages in zip(sources, pool.imap(_read_package, jobs), strict=True):
            counts: Counter[str] = Counter()
            for name, page in pages:
                text = deduplicator.clean(page)
                size = len(text.encode())
                if size < _MIN_DOCUMENT:
                    continue
                document = Document(source.package, name, _split_of(source, name), text)
                counts[document.split] += size
                counts["documents"] += 1
                out.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            row = {
                "package": source.package,
                "version": _version(archives[source.package]),
                "licence": source.licence,
                "documents": counts["documents"],
                **{f"{split}_bytes": counts[split] for split in SPLITS},
            }
            manifest.append(row)
            print(json.dumps(row), flush=True)
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


def read_corpus(path: Path) -> Iterator[Document]:
    """Yield the documents of a corpus that :func:`gather` wrote."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))
