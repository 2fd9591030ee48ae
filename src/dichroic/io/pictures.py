"""Pictures: PNG, TIFF, JPEG and BMP files as arrays, with full range 1."""

from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError, ShapeError
from dichroic.io.recorded import Recorded, no_key, reader_library
from dichroic.runtime.limits import check_array

_FULL_RANGE = {"uint8": 255, "uint16": 65535}
_PAGED = ("TIFF", "PNG", "GIF")  # pictures of the same kind; the others of a JPEG are previews


def read_picture(path: Path, key: str | None) -> Recorded:
    """A picture, `(H, W)` or `(C, H, W)`, with full range 1 (8 and 16 bits); of several pages, `(pages, …)`."""
    no_key(path, key)
    image = reader_library("PIL.Image", "images", path)
    with image.open(path) as picture:
        count = getattr(picture, "n_frames", 1) if picture.format in _PAGED else 1
        size, first = picture.size, _page(picture)
        common = {"colours": _colours(picture)}
        if count == 1:
            return Recorded(first, common)
        check_array((count, *first.shape), first.itemsize, path.name, held=path.stat().st_size)
        pages = np.empty((count, *first.shape), first.dtype)
        for i in range(count):
            picture.seek(i)
            page = (
                _page(picture) if picture.size == size else None
            )  # what is too large is not unpacked
            if page is None or page.shape != first.shape:
                found = picture.size[::-1] if page is None else page.shape
                raise ShapeError(
                    f"page {i} of {path.name!r} has shape {found} and page 0 {first.shape}: pages are stacked, "
                    "and need the same"
                )
            if _colours(picture) != common["colours"]:
                raise DataError(
                    f"page {i} of {path.name!r} has colours {_colours(picture)} and page 0 {common['colours']}: "
                    "pages are stacked, and need the same"
                )
            pages[i] = page
    return Recorded(pages, common)


def _colours(picture: Any) -> str:
    """The colours of a picture: pictures of the same have the same channels and range."""
    if picture.mode in ("P", "1"):
        return "RGB" if picture.mode == "P" else "L"
    return "L" if picture.mode.startswith("I;16") else picture.mode


def _page(picture: Any) -> np.ndarray:
    """The page of `picture` that is open."""
    if picture.mode in ("P", "1"):
        picture = picture.convert(_colours(picture))
    array = np.asarray(picture)
    full = _FULL_RANGE.get(array.dtype.name)
    wide = array.dtype.kind in "iu" and array.itemsize > 2
    as_it_is = np.float64 if wide else np.float32
    array = array.astype(as_it_is) if full is None else array / np.float32(full)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array
