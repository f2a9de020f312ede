"""Pictures of one colour, archives of them, damage, and world coordinates for the tests of sources."""

import io
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from astropy.wcs import WCS
from PIL import Image as PillowImage


def png(value: int = 1, height: int = 2, width: int = 3) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(paths: Sequence[Path]) -> None:
    """Write dark noisy pictures of 30 x 24 pixels, every fifth with a bright square."""
    rng = np.random.default_rng(0)
    for i, path in enumerate(paths):
        pixels = rng.integers(0, 60, (24, 30, 3), dtype=np.uint8)
        if i % 5 == 0:
            pixels[5:15, 5:15] = 240
        PillowImage.fromarray(pixels).save(path)


def stack(n: int, start: int = 0) -> np.ndarray:
    """Return `n` images of 4 x 5 pixels, whose colours are `start`, `start + 1` and so on."""
    return np.arange(start, start + n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), dtype=np.uint8)


def colours(source: Any, ids: Any = None) -> list[int]:
    return [int(image[0, 0, 0]) for image in source.read(source.ids if ids is None else ids)]


def wcs(ra: float = 10.0, dec: float = 20.0, arcsec: float = 1.0, kind: str = "RA/DEC", shape: Any = (30, 40)) -> WCS:
    """Return a tangential projection whose reference is the centre of an image of `shape`."""
    made = WCS(naxis=2)
    made.wcs.ctype = {"RA/DEC": ["RA---TAN", "DEC--TAN"], "DEC/RA": ["DEC--TAN", "RA---TAN"]}.get(
        kind, ["GLON-TAN", "GLAT-TAN"]
    )
    steps = [-arcsec / 3600, arcsec / 3600]
    made.wcs.crval = [dec, ra] if kind == "DEC/RA" else [ra, dec]
    made.wcs.cdelt = steps[::-1] if kind == "DEC/RA" else steps
    made.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    return made


def write_zip(file: Path, members: Mapping[str, int | str | bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write a zip archive; a number as a member is a picture of that colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, png(content) if isinstance(content, int) else content)
    return file


def write_tar(
    file: Path, members: Mapping[str, int | str | bytes], form: int = tarfile.GNU_FORMAT, mode: Any = "w"
) -> Path:
    """Write a tar archive; a number as a member is a picture of that colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode, format=form) as archive:
        for name, content in members.items():
            data = png(content) if isinstance(content, int) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def write_encoded_hdf5(path: Path, files: Sequence[bytes], **others: Any) -> Path:
    """Write an HDF5 file of image files, and other datasets beside them."""
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (len(files),), dtype=h5py.vlen_dtype(np.uint8))
        for row, data in enumerate(files):
            images[row] = np.frombuffer(data, dtype=np.uint8)
        for name, values in others.items():
            file[name] = values
    return path


def damaged(sound: bytes, trials: int, seed: int = 0) -> Iterator[tuple[bytes, bool]]:
    """Yield damaged copies of a file, in turn with a few flipped bits and cut short, and whether it was cut."""
    dice = random.Random(seed)
    for trial in range(trials):
        broken = bytearray(sound)
        if trial % 2:
            broken = broken[: dice.randrange(len(broken))]
        else:
            for _ in range(dice.randint(1, 4)):
                broken[dice.randrange(len(broken))] ^= 1 << dice.randrange(8)
        yield bytes(broken), bool(trial % 2)
