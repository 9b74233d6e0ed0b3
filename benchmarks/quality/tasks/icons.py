"""A task from Debian's icon themes: the category of an icon, as freedesktop names them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.quality.packages import package_version, unpacked
from benchmarks.quality.tasks.task import CAPS, ImageTask, capped, digest

__all__ = ["CATEGORIES", "PACKAGES", "make_icons"]

PACKAGES = {
    "gnome-icon-theme": "LGPL-3.0 OR CC-BY-SA-3.0",
    "tango-icon-theme": "public-domain",
    "mate-icon-theme": "LGPL-3.0 OR CC-BY-SA-3.0",
    "elementary-xfce-icon-theme": "GPL-3.0",
    "oxygen-icon-theme": "LGPL-3.0",
}
CATEGORIES = (
    "actions",
    "apps",
    "categories",
    "devices",
    "emblems",
    "mimetypes",
    "places",
    "status",
)
_SIDE = 32


def _pixels(path: Path) -> np.ndarray | None:
    """An icon on white, [3, 32, 32] uint8 in 32 shades; None if it is no picture of that size."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError):
        return None
    if image.width != image.height or image.width not in (_SIDE, 48):
        return None
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB").resize((_SIDE, _SIDE))
    return (np.asarray(flat).transpose(2, 0, 1) & 0xF8).copy()


def make_icons(
    name: str, work: Path, caps: dict[str, int] = CAPS, packages: Iterable[str] = ()
) -> ImageTask:
    """An icon -> its category; icons of one name are in one split, each picture once."""
    packages = list(packages) or list(PACKAGES)
    keyed, seen = [], set()
    for folder in unpacked(packages, work).values():
        for path in sorted(folder.rglob("*.png")):
            category = next((part for part in path.parts if part in CATEGORIES), None)
            if category is None or path.is_symlink():
                continue
            pixels = _pixels(path)
            if pixels is None or (picture := digest(pixels.tobytes().hex())) in seen:
                continue
            seen.add(picture)
            keyed.append((path.stem, (pixels, CATEGORIES.index(category))))
    splits = {}
    for split, rows in capped(keyed, caps).items():
        labels = np.array([label for _, label in rows], dtype=np.int64)
        shape = (0, 3, _SIDE, _SIDE)
        images = np.stack([image for image, _ in rows]) if rows else np.zeros(shape, np.uint8)
        splits[split] = (images, labels)
    sources = [
        {"package": p, "version": package_version(p, work), "licence": PACKAGES[p]}
        for p in packages
    ]
    about = {"what": "freedesktop category of an icon", "sources": sources}
    return ImageTask(name, about, CATEGORIES, splits)
