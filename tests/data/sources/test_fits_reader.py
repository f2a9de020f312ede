import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from anomalymatch.data.sources import fits as fits_module
from anomalymatch.data.sources import fits_file
from anomalymatch.data.sources.fits import Extensions, FitsImages
from anomalymatch.errors import UnreadableImageError

PLANE = np.arange(20, dtype=np.int16).reshape(4, 5)


def write(path: Path, *units: Any) -> Path:
    fits.HDUList(list(units)).writeto(path)
    return path


def primary(pixels: np.ndarray | None = PLANE, **cards: Any) -> fits.PrimaryHDU:
    unit = fits.PrimaryHDU(pixels)
    unit.header.update(cards)
    return unit


def extension(pixels: np.ndarray, name: str = "", **cards: Any) -> fits.ImageHDU:
    unit = fits.ImageHDU(pixels, name=name)
    unit.header.update(cards)
    return unit


def read_all(path: Path, extensions: Extensions = None) -> tuple[Any, ...]:
    """Return everything that `FitsImages` reads from a file, or the reason why it cannot."""
    try:
        with FitsImages(path, extensions) as images:
            pixels = images.cut()
            return images.names, images.units, str(pixels.dtype), pixels.shape, pixels.tobytes()
    except UnreadableImageError as error:
        return (str(error),)


def read_all_by_astropy(path: Path, extensions: Extensions = None) -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits_module, "find_plain", lambda *_: None)
        return read_all(path, extensions)


def rich(path: Path) -> Path:
    """Write a file with every keyword in use and many others."""
    first = primary(None, FILTER="white", OBJECT="M 31")
    first.header["HIERARCH ESO DET EXPTIME"] = 30.0
    first.header["HISTORY"] = "BITPIX  = 64"
    second = extension(PLANE, "G", BUNIT="Jy", BLANK=3, BSCALE=0.5, FILTER="g")
    third = extension(np.stack([PLANE, PLANE + 1]).astype(np.float32), "CUBE", CTYPE3="FREQ", NOTE="x")
    return write(path, first, second, third, extension(PLANE, "R"))


CHOICES: list[Extensions] = [None, 0, 1, 2, 3, -1, 9, "g", "cube", " R ", "primary", "none", ["R", 1], [3, "R"]]


@pytest.mark.parametrize("extensions", CHOICES)
def test_plain_headers_are_read_as_astropy_reads_them(tmp_path: Path, extensions: Extensions) -> None:
    path = rich(tmp_path / "a.fits")
    assert read_all(path, extensions) == read_all_by_astropy(path, extensions)


ODD_CARDS = [
    b"bscale  =                  2.0",
    b"BSCALE= 2.0",
    b" BSCALE =                  2.0",
    b"HIERARCH BSCALE = 2.0",
    b"hierarch bscale = 2.0",
    b"BSCALE   2.0",
    b"BSCALE  = 'two     '",
    b"BSCALE  =                 2.D0",
    b"BLANK   =                    7",
    b"BLANK   =                    T",
    b"BUNIT   = 'nJy     '",
    b"GROUPS  =                    T",
    b"PCOUNT  =                    8",
    b"GCOUNT  =                   -1",
    b"NAXIS1  =                   10",
    b"BITPIX  =                    8",
    b"EXTNAME = 'OTHER   '",
    b"FILTER  = 'g&      '",
    b"END",
    b"ENDE",
    b"\0",
    b"\xff",
    b"=       = 1",
]


@pytest.mark.parametrize("card", ODD_CARDS)
@pytest.mark.parametrize("following", [b"", b"CONTINUE  'r'", b"CONTINUE  "])
def test_odd_cards(tmp_path: Path, card: bytes, following: bytes) -> None:
    sound = write(tmp_path / "a.fits", primary(BUNIT="Jy", AA="1", BB="2")).read_bytes()
    path = tmp_path / "b.fits"
    for at in (sound.index(b"AA  "), sound.index(b"EXTEND")):
        path.write_bytes(sound[:at] + card.ljust(80) + following.ljust(80) + sound[at + 160 :])
        assert read_all(path) == read_all_by_astropy(path)


def test_damaged_headers(tmp_path: Path) -> None:
    sound = rich(tmp_path / "a.fits").read_bytes()
    path, dice = tmp_path / "b.fits", random.Random(0)
    cards = [
        at for at in range(0, len(sound), 80) if sound[at : at + 80].strip(b" \0") and sound[at + 8 : at + 9] == b"="
    ]
    for trial in range(300):
        broken = bytearray(sound)
        at = dice.choice(cards) + dice.randrange(80 if trial % 3 else 10)
        broken[at] = dice.choice(b" =TEN/-'07\0\xe4") if trial % 2 else broken[at] ^ (1 << dice.randrange(8))
        path.write_bytes(broken)
        extensions = dice.choice(CHOICES)
        assert read_all(path, extensions) == read_all_by_astropy(path, extensions), (trial, at)


def test_header_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = write(tmp_path / "a.fits", primary()).read_bytes()
    path = tmp_path / "b.fits"
    path.write_bytes(sound[:2880].replace(b"END", b"AND") * 100)
    assert read_all(path) == read_all_by_astropy(path)
    path.write_bytes(sound[:2880].replace(b"END   ", b"COMMENT") + sound[2880:])
    assert read_all(path) == read_all_by_astropy(path)
    monkeypatch.setattr(fits_file, "MAX_BLOCKS", 0)  # astropy takes headers of any length
    assert len(read_all(tmp_path / "a.fits")) == 5
