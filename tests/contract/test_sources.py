"""Contract of every image source; a test of one format belongs in tests/data/sources only if others cannot share it."""

import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from astropy.io import fits
from hydra.utils import instantiate

from anomalymatch.checks import trusting
from anomalymatch.config import compose
from anomalymatch.data.open import KINDS, _options, open_path
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError, LabelError, UnreadableImageError
from anomalymatch.types import Reject

VALUES = [11, 22, 33, 44, 55]
SIDE = 4


def image(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, dtype=np.uint8)


png = partial(pictures.png, height=SIDE, width=SIDE)


def stack(values: Sequence[int]) -> np.ndarray:
    return np.stack([image(value) for value in values])


def write_folder(root: Path, values: Sequence[int]) -> Path:
    root.mkdir()
    for i, value in enumerate(values):
        (root / f"{i}.png").write_bytes(png(value))
    return root


def write_memory(root: Path, values: Sequence[int]) -> str:
    files = fsspec.filesystem("memory")
    for i, value in enumerate(values):
        files.pipe(f"/{root.name}/{i}.png", png(value))
    return f"memory://{root.name}"


def write_zip(root: Path, values: Sequence[int]) -> Path:
    return pictures.write_zip(root.with_suffix(".zip"), {f"{i}.png": png(value) for i, value in enumerate(values)})


def write_tar(root: Path, values: Sequence[int]) -> Path:
    return pictures.write_tar(root.with_suffix(".tar"), {f"{i}.png": png(value) for i, value in enumerate(values)})


def write_parquet(root: Path, values: Sequence[int]) -> Path:
    path = root.with_suffix(".parquet")
    pq.write_table(pa.table({"image": [png(value) for value in values]}), path, row_group_size=2)
    return path


def write_hdf5(root: Path, values: Sequence[int], **options: Any) -> Path:
    with h5py.File(root.with_suffix(".h5"), "w") as file:
        file.create_dataset("images", data=stack(values), **options)
    return root.with_suffix(".h5")


def write_hdf5_encoded(root: Path, values: Sequence[int]) -> Path:
    return pictures.write_encoded_hdf5(root.with_suffix(".h5"), [png(value) for value in values])


def write_zarr(root: Path, values: Sequence[int]) -> Path:
    group = zarr.open_group(root.with_suffix(".zarr"), mode="w")
    group.create_array("images", data=stack(values), chunks=(2, SIDE, SIDE, 3))
    return root.with_suffix(".zarr")


def write_zarr_zip(root: Path, values: Sequence[int]) -> Path:
    store = zarr.storage.ZipStore(root.with_suffix(".zarr.zip"), mode="w")
    zarr.open_group(store, mode="w").create_array("images", data=stack(values), chunks=(2, SIDE, SIDE, 3))
    store.close()
    return root.with_suffix(".zarr.zip")


def write_npy(root: Path, values: Sequence[int]) -> Path:
    np.save(root.with_suffix(".npy"), stack(values))
    return root.with_suffix(".npy")


def write_npz(root: Path, values: Sequence[int]) -> Path:
    np.savez_compressed(root.with_suffix(".npz"), images=stack(values))
    return root.with_suffix(".npz")


def write_fits(root: Path, values: Sequence[int]) -> Path:
    root.mkdir()
    for i, value in enumerate(values):
        fits.PrimaryHDU(np.moveaxis(image(value), 2, 0)).writeto(root / f"{i}.fits")
    return root


def write_catalogue(root: Path, values: Sequence[int]) -> Path:
    root.mkdir()
    for i, value in enumerate(values):
        np.save(root / f"{i}.npy", image(value))
    rows = "".join(f"{i},2,2,{i}.npy\n" for i in range(len(values)))
    (root / "cat.csv").write_text("id,x,y,tile\n" + rows)
    return root / "cat.csv"


@dataclass(frozen=True)
class Format:
    """A format and how to write an archive of it.

    Attributes:
        dataset: name of its configuration.
        write: writes an archive of constant images.
        options: options of the source.
        exact: whether damage is always noticed, so that no wrong image ever comes back.
        local: whether the archive is on this machine.
        channels: whether there is an option `channels`.
    """

    dataset: str
    write: Callable[[Path, Sequence[int]], Any]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    local: bool = True
    channels: bool = True

    def open(self, root: Any, **options: Any) -> ImageSource:
        return KINDS[self.dataset].opener()(root, **self.options | options)


FORMATS = {
    "folder": Format("folder", write_folder, exact=True),
    "url": Format("folder", write_memory, local=False),
    "zip": Format("zip", write_zip, exact=True),
    "tar": Format("webdataset", write_tar, exact=True),
    "parquet": Format("parquet", write_parquet, exact=True),
    "hdf5": Format("hdf5", write_hdf5),
    "hdf5 in chunks": Format(
        "hdf5", lambda root, values: write_hdf5(root, values, chunks=(2, SIDE, SIDE, 3), compression="gzip")
    ),
    "hdf5 of files": Format("hdf5", write_hdf5_encoded),
    "zarr": Format("zarr", write_zarr),
    "zarr.zip": Format("zarr", write_zarr_zip),
    "npy": Format("numpy", write_npy),
    "npz": Format("numpy", write_npz, exact=True),
    "fits": Format("fits", write_fits, channels=False),
    "catalogue": Format("catalogue", write_catalogue, {"x_column": "x", "y_column": "y", "size": SIDE}, channels=False),
}
LOCAL = [name for name, kind in FORMATS.items() if kind.local]


@dataclass
class Archive:
    kind: Format
    root: Any
    place: Path

    def open(self, **options: Any) -> ImageSource:
        return self.kind.open(self.root, **options)

    def files(self) -> list[Path]:
        """All files of the archive, but not a catalogue."""
        if self.kind.dataset == "catalogue":
            return sorted(self.root.parent.glob("*.npy"))
        return sorted(p for p in self.root.rglob("*") if p.is_file()) if self.root.is_dir() else [self.root]

    def remove(self) -> None:
        for file in self.files():
            file.unlink()

    def rewrite(self, values: Sequence[int]) -> None:
        if self.kind.local:
            root = self.root.parent if self.kind.dataset == "catalogue" else self.root
            shutil.rmtree(root) if root.is_dir() else root.unlink()
        self.kind.write(self.place, values)


@pytest.fixture
def archive(request: pytest.FixtureRequest, tmp_path: Path, memory: Any) -> Archive:
    """An archive of the format that the test names, or of every format."""
    kind = FORMATS[request.param]
    return Archive(kind, kind.write(tmp_path / "set", VALUES), tmp_path / "set")


every_format = pytest.mark.parametrize("archive", FORMATS, indirect=True)
every_local_format = pytest.mark.parametrize("archive", LOCAL, indirect=True)


def values(source: ImageSource, positions: Sequence[int] = range(len(VALUES))) -> list[int]:
    """Colours of constant images."""
    images = source.read([source.ids[i] for i in positions])
    assert all(isinstance(image, np.ndarray) for image in images), images
    assert all((image == image.flat[0]).all() for image in images)
    return [int(image.flat[0]) for image in images]


@every_format
def test_images_come_in_the_order_of_the_ids(archive: Archive) -> None:
    source = archive.open()
    assert isinstance(source, ImageSource)
    assert len(source) == len(source.ids) == len(set(source.ids)) == len(VALUES)
    assert all(isinstance(id_, str) for id_ in source.ids)
    assert source.channels == len(source.rendering.channels(source.bands)) == 3
    assert (source.labels, source.truth, source.holdout) == ({}, None, frozenset())
    picks = [4, 0, 3, 3, 1]
    assert values(source, picks) == [VALUES[i] for i in picks]
    assert source.read([]) == []
    first = source.read(source.ids[:1])[0]
    assert (first.dtype, first.shape, first.flags.c_contiguous) == (np.uint8, (SIDE, SIDE, 3), True)
    for i, id_ in enumerate(source.ids):
        assert source.position(id_) == i
        assert (source.pixels(id_) == image(VALUES[i])).all()


@every_format
def test_images_are_copies(archive: Archive) -> None:
    source = archive.open()
    source.read(source.ids[1:2])[0][:] = 99
    source.pixels(source.ids[1])[:] = 99
    assert values(source) == VALUES


@every_format
def test_optional_information_has_the_declared_form(archive: Archive) -> None:
    source = archive.open()
    for id_ in source.ids:
        assert source.coordinates(id_) is None
        assert isinstance(source.header(id_), dict)
        file = source.file(id_)
        assert (file is None) == (source.folder is None)
        assert file is None or file.is_file()
        if source.encoded:
            assert source.raw_bytes(id_) == png(VALUES[source.position(id_)])
        else:
            with pytest.raises(DataError, match="no encoded image files"):
                source.raw_bytes(id_)
    table = source.metadata()
    assert table is None or len(table) == len(VALUES)


@every_format
def test_unknown_ids_are_errors(archive: Archive) -> None:
    source = archive.open()
    for method in (
        source.pixels,
        source.position,
        source.file,
        source.coordinates,
        source.header,
        lambda id_: source.read([source.ids[0], id_]),
    ):
        with pytest.raises(DataError, match="has no image 'z'"):
            method("z")


@every_format
def test_many_threads(archive: Archive) -> None:
    source = archive.open(cache_bytes=1) if "cache_bytes" in _options(type(archive.open())) else archive.open()
    picks = [random.Random(seed).choices(range(len(VALUES)), k=6) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda pick: values(source, pick), picks)) == [[VALUES[i] for i in p] for p in picks]


def _read_in_child(source: ImageSource, queue: Any) -> None:
    queue.put(values(source))


@every_format
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_other_processes(archive: Archive) -> None:
    source = archive.open()
    assert values(source) == VALUES
    assert values(pickle.loads(pickle.dumps(source))) == VALUES
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(source, queue))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert queue.get() == VALUES


@every_local_format
def test_other_pixels_of_the_same_size_and_time_are_told(archive: Archive) -> None:
    if archive.root.is_dir():
        pytest.skip("only single files are sampled: an archive may have millions of files")
    first, before = archive.open().fingerprint, archive.root.stat()
    archive.rewrite([*VALUES[:-1], 66])
    os.utime(archive.root, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert archive.open().fingerprint != first


@every_format
def test_fingerprint_follows_pixels_and_options(archive: Archive) -> None:
    first = archive.open().fingerprint
    assert archive.open().fingerprint == first
    prints = {first, archive.open(rendering=Rendering(curve="asinh")).fingerprint}
    if archive.kind.channels:
        prints.add(archive.open(channels=1).fingerprint)
    archive.rewrite([*VALUES[:-1], 66])
    prints.add(archive.open().fingerprint)
    archive.rewrite([*VALUES, 77])
    prints.add(archive.open().fingerprint)
    assert len(prints) == 4 + archive.kind.channels


@every_local_format
def test_missing_files_give_rejects(archive: Archive) -> None:
    source = archive.open()
    archive.remove()
    results = source.read(source.ids)
    assert [result.id for result in results if isinstance(result, Reject)] == list(source.ids)
    assert all("no such file" in result.reason.lower() or "cannot be" in result.reason for result in results)
    with pytest.raises(UnreadableImageError):
        source.pixels(source.ids[0])


@every_local_format
def test_damage_gives_errors_or_rejects(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    dice = random.Random(0)
    names = list(archive.open().ids)
    refused = rejected = 0
    for trial in range(60):
        file = dice.choice(archive.files())
        whole = file.read_bytes()
        file.write_bytes(list(pictures.damaged(whole, 2, seed=trial))[trial % 2][0])
        try:
            source = archive.open()
            results = source.read(source.ids)
        except DataError:
            refused += 1
        else:
            for id_, result in zip(source.ids, results, strict=True):
                if isinstance(result, Reject):
                    rejected += 1
                elif archive.kind.exact:
                    assert (result == result.flat[0]).all()
                    assert id_ not in names or result.flat[0] == VALUES[names.index(id_)]
        file.write_bytes(whole)
    assert refused + rejected > 5
    assert values(archive.open()) == VALUES


@every_format
def test_labels_file(archive: Archive, tmp_path: Path) -> None:
    ids, file = list(archive.open().ids), tmp_path / "mine.csv"

    def write(labels: dict[str, str]) -> Path:
        file.write_text("filename,label\n" + "".join(f"{id_},{label}\n" for id_, label in labels.items()))
        return file

    person = {ids[1]: "anomaly", ids[0]: "normal", ids[3]: "unsure"}
    source = archive.open(labels_file=write(person))
    assert (source.labels, source.truth) == (person, None)
    classes = {id_: f"k{i % 2}" for i, id_ in enumerate(ids)}
    source = archive.open(labels_file=str(write(classes)))
    assert (source.labels, source.truth) == ({}, classes)
    with pytest.raises(LabelError, match=f"4 of 5 are missing, the first is {ids[1]}"):
        archive.open(labels_file=write({ids[0]: "k0"}))
    with pytest.raises(LabelError, match=r"mine\.csv: .* line 2 'none,anomaly'"):
        archive.open(labels_file=write({"none": "anomaly"}))
    with pytest.raises(LabelError, match=r"gone\.csv"):
        archive.open(labels_file=tmp_path / "gone.csv")


@every_local_format
def test_labels_csv_beside_the_images_is_used_or_told_why_not(
    archive: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    id_ = archive.open().ids[2]
    of_images = archive.kind.dataset in ("folder", "fits")
    file = (archive.root if of_images else archive.root.parent) / "labels.csv"
    file.write_text(f"filename,label\n{id_},Anomaly\n")
    assert archive.open().labels == {id_: "anomaly"}
    for text in ("filename,label\nnone,anomaly\n", "name,class\nnone,anomaly\n"):
        file.write_text(text)
        if of_images:
            with pytest.raises(LabelError, match=r"labels\.csv"):
                archive.open()
        else:
            caplog.clear()
            assert archive.open().labels == {}
            assert "labels.csv is not used: " in caplog.text
    file.write_text(f"filename,label\n{id_},anomaly\nnone,anomaly\n")
    with pytest.raises(LabelError, match=r"labels\.csv: .* line 3 'none,anomaly'"):
        archive.open()


@pytest.mark.parametrize(
    "archive", ["zip", "parquet", "hdf5", "hdf5 of files", "zarr", "zarr.zip", "npy", "npz"], indirect=True
)
def test_archives_of_a_folder_in_the_order_of_their_paths(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for place, colours in (("b", [1, 2]), ("a", [3, 4, 5]), ("sub/b", [6]), (".hidden/c", [7])):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        written = archive.kind.write(folder / place, colours)
    assert isinstance(written, Path)
    (folder / "notes.txt").write_text("no archive")
    options = {} if archive.kind.dataset == "zip" else {"holdout_files": ["a.*"]}
    source = archive.kind.open(folder, **options)
    assert values(source, range(6)) == [3, 4, 5, 1, 2, 6]
    assert [id_.rpartition("/")[0] for id_ in source.ids] == ["a"] * 3 + ["b"] * 2 + ["sub/b"]
    assert source.holdout == set(source.ids[:3] if options else ())
    if options:
        with pytest.raises(DataError, match=r"no file matches x\*, correct dataset\.source\.holdout_files"):
            archive.kind.open(folder, holdout_files=["a*", "x*"])


@pytest.mark.parametrize(
    "archive", [name for name in LOCAL if name not in ("folder", "fits", "catalogue")], indirect=True
)
def test_links_out_of_the_folder_need_trust(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / archive.root.name).symlink_to(archive.root)
    with pytest.raises(DataError, match=r"it is a link out of the folder.*trust=true"):
        archive.kind.open(tmp_path / "in")
    with trusting(True):
        source = archive.kind.open(tmp_path / "in")
    assert values(source) == VALUES


@every_local_format
def test_messages_name_the_path_and_the_key(archive: Archive, tmp_path: Path) -> None:
    dataset = archive.kind.dataset
    with pytest.raises(DataError, match=rf"dataset={dataset} needs data\.root=PATH"):
        archive.kind.open(None)
    gone = tmp_path / "none"
    with pytest.raises(DataError, match=f"{gone}.*nothing"):
        archive.kind.open(gone)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=str(empty)):
        archive.kind.open(empty)
    if archive.root.is_file():
        other = tmp_path / f"other{archive.root.suffix}"
        other.write_bytes(b"no archive" * 300)
        with pytest.raises(DataError, match=rf"{other.name}.* cannot be read|{other.name}: no column"):
            archive.kind.open(other)


@pytest.mark.parametrize("dataset", KINDS)
def test_the_configuration_names_every_option(dataset: str) -> None:
    node = compose(f"dataset={dataset}").dataset.source
    assert set(node) == _options(KINDS[dataset].opener()) - {"scanned"} | {"_target_", "root"}
    assert f"{KINDS[dataset].opener().__module__}.{KINDS[dataset].opener().__name__}" == node._target_
    with pytest.raises(Exception, match=rf"dataset={dataset} needs data\.root=PATH"):
        instantiate(node)


@pytest.mark.parametrize("archive", LOCAL, indirect=True)
def test_the_configuration_opens_the_archive(archive: Archive, tmp_path: Path) -> None:
    words = [f"dataset.source.{key}={value}" for key, value in archive.kind.options.items()]
    config = compose(
        f"dataset={archive.kind.dataset}", f"data.root={archive.root}", f"data.cache_dir={tmp_path / 'cache'}", *words
    )
    source = instantiate(config.dataset.source)
    assert source.ids == archive.open().ids or list(source.ids) == list(archive.open().ids)
    assert source.fingerprint == archive.open().fingerprint
    assert values(source) == VALUES


@every_local_format
def test_the_format_is_recognised(archive: Archive, tmp_path: Path) -> None:
    cache = tmp_path / ".cache"  # hidden, as it lies in the folder that is opened
    for root in (archive.root, archive.root.parent):
        if archive.kind.dataset != "catalogue" or root == archive.root:  # the tiles of a catalogue are archives, too
            source = open_path(str(root), cache_dir=cache, **archive.kind.options)
            assert type(source) is KINDS[archive.kind.dataset].opener()
            assert values(source) == VALUES
    assert archive.kind.dataset != "webdataset" or list((cache / "tar").iterdir())


class Mine(ImageSource):
    """Smallest source: it implements `load` alone."""

    def __init__(self) -> None:
        super().__init__(name="mine", ids=[f"m{i}" for i in range(len(VALUES))], fingerprint="mine-1")

    def load(self, position: int) -> np.ndarray:
        if position == 3:
            raise UnreadableImageError("broken")
        return image(VALUES[position])


def test_own_source_implements_load() -> None:
    source = pickle.loads(pickle.dumps(Mine()))
    assert source.read(["m2", "m3"])[1] == Reject("m3", "broken")
    assert source.read(["m2"])[0].tolist() == image(33).tolist()
    assert (source.bands, source.channels, source.encoded) == (("red", "green", "blue"), 3, False)
    assert not any((source.file("m0"), source.coordinates("m0"), source.metadata(), source.header("m0")))
    with pytest.raises(DataError, match="m0"):
        source.raw_bytes("m0")


def test_no_message_lists_a_thousand_names(tmp_path: Path) -> None:
    many = {f"column{i}": ["x"] for i in range(1000)}
    pq.write_table(pa.table(many), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(",".join(many) + "\n")
    np.savez(tmp_path / "a.npz", **many)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in many:
            file[name] = 1
    files = {"parquet": "a.parquet", "catalogue": "a.csv", "numpy": "a.npz", "hdf5": "a.h5"}
    for dataset, name in files.items():
        with pytest.raises(DataError, match=r"column0, .*1,000 in all") as caught:
            KINDS[dataset].opener()(tmp_path / name)
        assert len(str(caught.value)) < 500
