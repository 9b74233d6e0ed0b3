"""One file that a user names, read as text: what is no text is refused."""

from __future__ import annotations

from pathlib import Path

from prodial_kernels.files.reading import read_bytes
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.findings import Findings

MOST_OF_A_PIPE = 1 << 29
"""The most bytes that are taken from a pipe."""

# Formats that are often given as text by mistake, by how their files begin.
_SIGNATURES = (
    (b"%PDF-", "a PDF; extract its text first, for example with pdftotext"),
    (b"{\\rtf", "an RTF document; save it as plain text"),
    (b"PK\x03\x04", "a ZIP archive, or an office document in one; unpack it, or save it as text"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"(\xb5/\xfd", "compressed by zstd; unpack it first"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow file; save it as Parquet or JSONL"),
    (b"SQLite format 3", "an SQLite data base; export its rows as JSONL or CSV"),
    (b"\xd0\xcf\x11\xe0", "an old office document; save it as plain text"),
    (b"\xff\xfe\x00\x00", "not UTF-8 but UTF-32; convert it: iconv -f utf-32 -t utf-8"),
    (b"\x00\x00\xfe\xff", "not UTF-8 but UTF-32; convert it: iconv -f utf-32 -t utf-8"),
    (b"\xff\xfe", "not UTF-8 but UTF-16; convert it: iconv -f utf-16 -t utf-8"),
    (b"\xfe\xff", "not UTF-8 but UTF-16; convert it: iconv -f utf-16 -t utf-8"),
)
_UTF_8_MARK = b"\xef\xbb\xbf"


class NotTextError(DataError):
    """A file holds something else than UTF-8 text."""


def read_text(path: Path, findings: Findings) -> str:
    """Read a UTF-8 file, with line feeds as line ends and without a byte-order mark.

    ``findings`` are told what was changed to get that.

    Raises:
        NotTextError: It is of another format or encoding, or holds NUL characters.
        DataError: Missing, not readable, a device, or a pipe that does not end.
    """
    try:
        content = read_bytes(path, most_of_a_pipe=MOST_OF_A_PIPE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    for signature, what in _SIGNATURES:
        if content.startswith(signature):
            raise NotTextError(f"{path}: this is {what}")
    zero = content.find(0)
    if zero >= 0:
        raise NotTextError(f"{path}: NUL bytes, the first at offset {zero}: {_zeros(content)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark does not count in the error's offsets.
        offset = error.start + (len(_UTF_8_MARK) if content.startswith(_UTF_8_MARK) else 0)
        raise NotTextError(
            f"{path}: not UTF-8 text (byte {content[offset]:#04x} at offset {offset}); convert it "
            "to UTF-8, or unpack it if it is compressed"
        ) from None
    if content.startswith(_UTF_8_MARK):
        findings.count("byte-order mark left out", "file")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        findings.count("line ends \\r\\n or \\r read as \\n", "file")
    return text


def _zeros(content: bytes) -> str:
    start = content[:4096]
    of_two = max(start[0::2].count(0), start[1::2].count(0))
    if of_two > len(start) // 4:
        return (
            "this looks like UTF-16 without a byte-order mark; convert it: iconv -f utf-16le (or "
            "utf-16be) -t utf-8"
        )
    return "this is binary, or damaged; remove them if the rest is text"
