"""Glyphs of Debian's fonts: what the vision base is pretrained on, and two tasks.

Glyphs are drawn in grey, 32 × 32 pixels, in 16 shades. A font family is in one split. The base sees
letters of three scripts and digits; the tasks ask for the style of a family, and for letters of
scripts that the base has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.packages import package_version, unpacked
from benchmarks.quality.tasks.task import CAPS, SPLITS, ImageTask, capped, digest

__all__ = ["PACKAGES", "make_letters", "make_scripts", "make_style"]

SIDE = 32
# Debian packages and the licence of their fonts.
PACKAGES: dict[str, str] = {
    "fonts-dejavu-core": "Bitstream-Vera", "fonts-dejavu-extra": "Bitstream-Vera",
    "fonts-liberation": "OFL-1.1", "fonts-freefont-ttf": "GPL-3.0 with font exception",
    "fonts-linuxlibertine": "OFL-1.1", "fonts-cantarell": "OFL-1.1", "fonts-lato": "OFL-1.1",
    "fonts-roboto-unhinted": "Apache-2.0", "fonts-open-sans": "Apache-2.0",
    "fonts-firacode": "OFL-1.1", "fonts-inconsolata": "OFL-1.1", "fonts-oldstandard": "OFL-1.1",
    "fonts-ebgaramond": "OFL-1.1", "fonts-crosextra-carlito": "OFL-1.1",
    "fonts-crosextra-caladea": "Apache-2.0", "fonts-sil-gentium": "OFL-1.1",
    "fonts-sil-charis": "OFL-1.1", "fonts-sil-andika": "OFL-1.1", "fonts-quattrocento": "OFL-1.1",
    "fonts-comfortaa": "OFL-1.1", "fonts-dosis": "OFL-1.1", "fonts-play": "OFL-1.1",
    "fonts-vollkorn": "OFL-1.1", "fonts-cabin": "OFL-1.1", "fonts-lobster": "OFL-1.1",
    "fonts-croscore": "OFL-1.1", "fonts-texgyre": "GUST-Font-License",
    "fonts-lmodern": "GUST-Font-License", "fonts-yanone-kaffeesatz": "OFL-1.1",
    "fonts-jura": "OFL-1.1", "fonts-mononoki": "OFL-1.1", "fonts-anonymous-pro": "OFL-1.1",
    "fonts-averia-serif-gwf": "OFL-1.1", "fonts-averia-sans-gwf": "OFL-1.1",
    "fonts-fanwood": "OFL-1.1", "fonts-goudybookletter": "OFL-1.1", "fonts-prociono": "OFL-1.1",
    "fonts-karla": "OFL-1.1", "fonts-jetbrains-mono": "OFL-1.1", "fonts-courier-prime": "OFL-1.1",
    "fonts-gfs-didot": "OFL-1.1", "fonts-hack": "MIT", "fonts-inter": "OFL-1.1",
    "fonts-tuffy": "public-domain", "fonts-humor-sans": "OFL-1.1", "fonts-noto-core": "OFL-1.1",
}  # fmt: skip

# Without letters that look alike in two scripts, or in both cases at this size.
LETTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijklmnqrtuy0123456789"
    "ÄÇÈÉÑÖØÜßàâçéêëîñôöùûæœ"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπστφψω"
    "БДЖИЙЛУЦЧШЩЪЫЭЮЯбвгджийлптфцчшщъыэюя"
)
SCRIPTS = {
    "Armenian": range(0x531, 0x557), "Georgian": range(0x10D0, 0x10F1),
    "Hebrew": range(0x5D0, 0x5EB), "Thai": range(0xE01, 0xE2F),
    "Devanagari": range(0x905, 0x93A), "Ethiopic": range(0x1200, 0x1250, 8),
}  # fmt: skip
_PAIRS = 40  # images of a face in the task of styles
_STYLES = ("regular", "bold", "italic", "bold italic", "mono", "mono bold")


@dataclass(frozen=True)
class Face:
    """One font file, and what its name table says."""

    path: Path
    family: str
    style: str
    characters: frozenset[int]


def _faces(work: Path, packages: Iterable[str]) -> Iterator[Face]:
    """Yield the TrueType and OpenType files of packages, each face once."""
    from fontTools.ttLib import TTFont, TTLibError

    seen = set()
    folders = unpacked(packages, work)
    for folder in folders.values():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in (".ttf", ".otf") or path.is_symlink():
                continue
            try:
                with TTFont(path, lazy=True) as font:
                    names, table = font["name"], font.getBestCmap() or {}
                    family = names.getBestFamilyName() or path.stem
                    style = names.getBestSubFamilyName() or ""
                    characters = frozenset(table)
            except (TTLibError, KeyError, AssertionError):  # no outlines, or no names
                continue
            # Variable fonts show their default instance alone.
            key = family, style
            if key in seen or "Symbol" in family or "Math" in family:
                continue
            seen.add(key)
            yield Face(path, family, style, characters)


def draw(face: Face, texts: Iterable[str], size: int = 22) -> Iterator[np.ndarray | None]:
    """Draw texts, each [1, 32, 32] uint8 in 16 shades; None for what the font draws empty."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(face.path), size)
    for text in texts:
        image = Image.new("L", (SIDE, SIDE), 0)
        left, _, right, _ = font.getbbox(text, anchor="ls")
        # Centred across, on one base line: so the case of a letter stays visible.
        x = (SIDE - (right - left)) / 2 - left
        ImageDraw.Draw(image).text((x, 24), text, fill=255, font=font, anchor="ls")
        pixels = np.asarray(image)
        yield None if pixels.max() == 0 else ((pixels >> 4) * 17)[None]


def _about(what: str, work: Path, packages: Iterable[str], **more: Any) -> dict[str, Any]:
    sources = [
        {"package": name, "version": package_version(name, work), "licence": PACKAGES[name]}
        for name in packages
    ]
    return {"what": what, **more, "sources": sources}


def _task(
    name: str,
    about: dict[str, Any],
    classes: tuple[str, ...],
    keyed: list[tuple[str, tuple[np.ndarray, int]]],
    caps: dict[str, int],
) -> ImageTask:
    splits = {}
    for split, rows in capped(keyed, caps).items():
        images = [image for image, _ in rows]
        shape = keyed[0][1][0].shape
        stacked = np.stack(images) if images else np.zeros((0, *shape), np.uint8)
        splits[split] = (stacked, np.array([label for _, label in rows], dtype=np.int64))
    return ImageTask(name, about, classes, splits)


def make_letters(
    name: str, work: Path, caps: dict[str, int] | None = None, packages: Iterable[str] = ()
) -> ImageTask:
    """What the vision base is pretrained on: a glyph -> its character, families held out."""
    packages = list(packages) or list(PACKAGES)
    keyed = []
    for face in _faces(work, packages):
        texts = [c for c in LETTERS if ord(c) in face.characters]
        if len(texts) < 50:
            continue
        for text, image in zip(texts, draw(face, texts), strict=True):
            if image is not None:
                keyed.append((face.family, (image, LETTERS.index(text))))
    many = dict.fromkeys(SPLITS, 10**9)
    about = _about("character of a glyph, font families held out", work, packages)
    return _task(name, about, tuple(LETTERS), keyed, caps or many)


def make_scripts(
    name: str, work: Path, caps: dict[str, int] = CAPS, packages: Iterable[str] = ()
) -> ImageTask:
    """A glyph of one of six scripts -> its character; which fonts and characters: by hash."""
    packages = list(packages) or [
        "fonts-dejavu-core", "fonts-dejavu-extra", "fonts-freefont-ttf", "fonts-noto-core",
    ]  # fmt: skip
    characters = [chr(code) for codes in SCRIPTS.values() for code in codes]
    keyed = []
    for face in _faces(work, packages):
        texts = [c for c in characters if ord(c) in face.characters]
        for text, image in zip(texts, draw(face, texts), strict=True):
            if image is not None:
                key = f"{face.family}/{face.style}/{text}"
                keyed.append((key, (image, characters.index(text))))
    about = _about(f"character of a glyph: {', '.join(SCRIPTS)}", work, packages)
    return _task(name, about, tuple(characters), keyed, caps)


def _style(face: Face) -> int | None:
    """The class of a face, from the names of its family and style."""
    words = f"{face.family} {face.style}".lower()
    bold = "bold" in words or "black" in words or "heavy" in words
    italic = "italic" in words or "oblique" in words
    if "mono" in words or "code" in words or "courier" in words or "hack" in words:
        return None if italic else 4 + bold
    if any(part in words for part in ("semi", "demi", "light", "thin", "medium", "condensed")):
        return None
    return bold + 2 * italic


def make_style(
    name: str, work: Path, caps: dict[str, int] = CAPS, packages: Iterable[str] = ()
) -> ImageTask:
    """Two letters in one face -> its style; families held out."""
    packages = list(packages) or list(PACKAGES)
    keyed = []
    for face in _faces(work, packages):
        label = _style(face)
        if label is None or not {ord("a"), ord("g")} <= face.characters:
            continue
        pairs = []
        for i in range(_PAIRS):
            number = digest(f"pair/{face.family}/{face.style}/{i}")
            first, second = number % 26, number // 26 % 26
            pairs.append(chr(65 + first) + chr(97 + second))
        for image in draw(face, pairs, size=16):
            if image is not None:
                keyed.append((face.family, (image, label)))
    about = _about("style of a face, families held out", work, packages)
    return _task(name, about, _STYLES, keyed, caps)
