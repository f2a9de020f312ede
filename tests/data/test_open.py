import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from pictures import png, write_tar

from anomalymatch.config import compose
from anomalymatch.data import download
from anomalymatch.data import open as auto
from anomalymatch.data.open import open_path
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import ConfigError, DataError

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def opened(monkeypatch: pytest.MonkeyPatch, stand_in: ImageSource) -> list[tuple[str, Path]]:
    """Replace the sources by a function that records the kind and the path."""
    calls: list[tuple[str, Path]] = []

    def opener(kind: auto.Kind) -> Any:
        def note(root: Path, *, rendering: Rendering) -> ImageSource:
            calls.append((kind.dataset, root))
            return stand_in

        return note

    monkeypatch.setattr(auto.Kind, "opener", opener)
    return calls


def refused_in(cache: Path) -> Callable[[str, Path | str | None], None]:
    """Return a check that a path is refused with a message."""

    def refuse(message: str, root: Path | str | None) -> None:
        with pytest.raises(DataError, match=message):
            open_path(root, cache_dir=cache)

    return refuse


def test_zarr_in_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_source: Any) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("zarr.json", "{}")
    (tmp_path / "a.folder").mkdir()
    (tmp_path / "a.folder/zarr.json").write_text("{}")
    calls = opened(monkeypatch, make_source())
    open_path(tmp_path / "a.zip", cache_dir=tmp_path)
    open_path(tmp_path / "a.folder", cache_dir=tmp_path)
    assert calls == [("zarr", tmp_path / "a.zip"), ("zarr", tmp_path / "a.folder")]


def test_labels_rejects_and_metadata_are_no_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_source: Any
) -> None:
    calls = opened(monkeypatch, make_source())
    for name in ["x.png", ".hidden.zip", ".cache/y.zip", "README.md", "rejects.parquet", "a_metadata.parquet"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png())
    (tmp_path / "in/labels.csv").write_text("filename,label\nx.png,cat\n")
    open_path(tmp_path / "in", cache_dir=tmp_path)
    assert calls == [("folder", tmp_path / "in")]


def test_tables_with_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_source: Any) -> None:
    calls = opened(monkeypatch, make_source())
    (tmp_path / "x.png").write_bytes(png())
    for name, header in [("a.csv", "RA,Dec"), ("b.csv", "tile,x,y"), ("c.csv", "name,alpha")]:
        (tmp_path / name).write_text(header + "\n")
    open_path(tmp_path / "a.csv", cache_dir=tmp_path)
    open_path(tmp_path / "b.csv", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="dataset=catalogue has no option ra_column"):  # the stand-in has none
        open_path(tmp_path / "c.csv", cache_dir=tmp_path, ra_column="alpha")
    (tmp_path / "b.csv").unlink()
    open_path(tmp_path, cache_dir=tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/d.csv").write_text("id,Tile,RA,dec\n")
    open_path(tmp_path / "one", cache_dir=tmp_path)
    assert calls[:2] == [("catalogue", tmp_path / "a.csv"), ("catalogue", tmp_path / "b.csv")]
    assert calls[2:] == [("folder", tmp_path), ("catalogue", tmp_path / "one/d.csv")]


def test_images_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/1.PNG", "a/2.jpg", "a/notes.txt", ".c/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    listed = []
    scandir = os.scandir

    def spy(path: str) -> Any:
        listed.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", spy)
    source = open_path(tmp_path, cache_dir=tmp_path)
    assert listed == [tmp_path.name, "a", "b"]
    assert (source.ids, source.fingerprint) == (["a/2.jpg", "b/1.PNG"], FolderSource(tmp_path).fingerprint)


def test_several_kinds_are_listed(tmp_path: Path) -> None:
    for name in ["a.png", "b/c.png", "d.fits", "f.npy"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    refused_in(tmp_path)(r"\(2 images, 1 FITS files, 1 NumPy files\): choose one by .*dataset=folder", tmp_path)


def test_options_reach_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = tmp_path / "in"
    root.mkdir()
    (root / "x.png").write_bytes(png(8))
    labels = tmp_path / "elsewhere.csv"
    labels.write_text("filename,label\nx.png,anomaly\n")
    words = [f"data.root={root}", f"data.cache_dir={tmp_path}", f"dataset.source.labels_file={labels}"]
    config = compose("dataset=auto", *words, "stretch.limits={grey:[0,16]}", "+dataset.source.channels=1")
    source: Any = instantiate(config.dataset.source)
    assert source.labels == {"x.png": "anomaly"}
    assert source.read(["x.png"])[0].tolist() == [[[128]] * 3] * 2
    assert "opened as dataset=folder" in caplog.text
    with pytest.raises(ConfigError, match=r"found images, and dataset=folder has no option colour: choose from bands"):
        open_path(root, cache_dir=tmp_path, colour=1)


def test_urls(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, make_source: Any) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    kinds = {"zip": "zip", "tar": "webdataset", "parquet": "parquet", "h5": "hdf5", "npy": "numpy", "fits.gz": "fits"}
    for suffix, dataset in kinds.items():
        memory.pipe(f"/{suffix}/a.{suffix}", b"x")
        for url in [f"memory://{suffix}/a.{suffix}", f"memory://{suffix}"]:
            calls = opened(monkeypatch, make_source())
            open_path(url, cache_dir=tmp_path / "cache")
            assert [call[0] for call in calls] == [dataset]
            assert calls[0][1].exists()
            monkeypatch.undo()
    memory.pipe("/images/a.png", png(3))
    source = open_path("memory://images", cache_dir=tmp_path, storage_options={})
    assert source.read(["a.png"])[0][0, 0, 0] == 3
    memory.pipe("/images/b.zip", b"")
    refuse = refused_in(tmp_path)
    refuse("more than one kind of data in it", "memory://images")
    refuse("there is nothing in it that can be opened", "memory://none")
    refuse("single image", "memory://images/a.png")
    refuse("Zarr stores are not read over the network", "memory://images/a.zarr")


def test_messages(tmp_path: Path) -> None:
    refuse = refused_in(tmp_path)
    refuse(r"dataset=auto needs data\.root=PATH", None)
    refuse("expected a folder of images or an archive, found nothing", tmp_path / "none")
    (tmp_path / "a.csv").write_text("filename,label\n")
    refuse("with the columns ra and dec, or tile, x and y; this is none of them", tmp_path / "a.csv")
    refuse("nothing in it that can be opened: expected one of images, zip archives", tmp_path)
    (tmp_path / "a.doc").write_text("")
    refuse(r"a file that ends in \.csv, \.fit", tmp_path / "a.doc")
    (tmp_path / "a.png").symlink_to("nowhere.png")
    refuse(r"no images in it \(links and names of images", tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").write_bytes(png())
    refuse(r"this is a single image, set data\.root to the folder", tmp_path / "a.png")
    (tmp_path / "bad.zip").write_bytes(b"")
    refuse("expected a zip archive", tmp_path / "bad.zip")
    write_tar(tmp_path / "a.tar.gz", {}, mode="w:gz")
    refuse("compressed", tmp_path / "a.tar.gz")
