"""The file formats of a field, by the ending of a name or the first bytes of a file.

Each reader takes a path and a key, and returns an array with what files that are stacked must have in common. It
needs the library that the field keeps for it, which extras install: astropy (`astronomy`), pillow (`images`),
soundfile (`audio`), obspy (`seismology`), edfio (`neuroscience`).
"""

from collections.abc import Callable
from pathlib import Path

from dichroic.io.fits import FITS, GZIP, read_fits
from dichroic.io.pictures import read_picture
from dichroic.io.recorded import Recorded
from dichroic.io.recordings import BDF, EDF, read_edf, read_sound
from dichroic.io.seismograms import read_seismogram, seismic_format

Reader = Callable[[Path, str | None], Recorded]
_FITS_ENDINGS = ("fits", "fit", "fts")
READERS: dict[str, Reader] = {
    **dict.fromkeys((*_FITS_ENDINGS, *(f"{e}.gz" for e in _FITS_ENDINGS), "fz"), read_fits),
    **dict.fromkeys(("png", "tif", "tiff", "jpg", "jpeg", "bmp"), read_picture),
    **dict.fromkeys(("wav", "flac", "aif", "aiff", "ogg"), read_sound),
    **dict.fromkeys(("edf", "bdf"), read_edf),
    **dict.fromkeys(("mseed", "miniseed", "msd", "ms", "sac"), read_seismogram),
}
_MAGIC = {  # how files of a kind begin
    b"\x93NUMPY": "npy",
    b"PK\x03\x04": "npz",
    b"\x89HDF\r\n\x1a\n": "h5",
    FITS: "fits",
    GZIP: "fits.gz",
    b"\x89PNG\r\n": "png",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\xff\xd8\xff": "jpg",
    b"fLaC": "flac",
    b"OggS": "ogg",
    EDF: "edf",
    BDF: "bdf",
}
_CHUNKED = {b"RIFF": (b"WAVE", "wav"), b"FORM": (b"AIF", "aiff")}  # 8 bytes on


def kind_by_content(path: Path) -> str | None:
    """The ending that the file `path` could have, by its first bytes; `None` where they do not tell."""
    with path.open("rb") as file:
        begin = file.read(16)
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            return kind
    magic, kind = _CHUNKED.get(begin[:4], (None, ""))
    if magic and begin[8:].startswith(magic):
        return kind
    return "mseed" if seismic_format(path) else None
