import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from anomalymatch.data import convert as module
from anomalymatch.data.convert import convert, main
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.data.stream import scale
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Reject


def save(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels).save(file)


def noise(seed: int, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """23 images of two classes, and two that cannot be read."""
    for i in range(23):
        save(tmp_path / f"photos/{('cat', 'dog')[i % 2]}/{i:02d}.png", noise(i))
    (tmp_path / "photos/cat/05.png").write_bytes(b"no image")
    (tmp_path / "photos/dog/99.png").write_bytes(b"")
    return tmp_path / "photos"


def same(a: ImageSource, b: ImageSource) -> bool:
    return all(
        isinstance(x, Reject) == isinstance(y, Reject) and (isinstance(x, Reject) or np.array_equal(x, y))
        for x, y in zip(a.read(b.ids), b.read(b.ids), strict=True)
    )


@pytest.mark.parametrize("encoding", ["png", "webp_lossless"])
def test_ids_order_classes_and_pixels_are_kept(photos: Path, tmp_path: Path, encoding: Any) -> None:
    source = FolderSource(photos)
    packed = ParquetSource(convert(source, tmp_path / "out", encoding=encoding, rows_per_file=10))
    bad = {"cat/05.png", "dog/99.png"}
    assert packed.ids == [id_ for id_ in source.ids if id_ not in bad]
    assert packed.truth == {id_: id_[:3] for id_ in packed.ids}
    assert same(source, packed)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["00000.parquet", "00001.parquet", "00002.parquet", "rejects.parquet"]
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [row["id"] for row in rejects] == ["cat/05.png", "dog/99.png"]
    assert rejects[1]["reason"] == "the file is empty (0 bytes)"


def test_labels_by_a_person_are_kept(photos: Path, tmp_path: Path) -> None:
    (photos / "labels.csv").write_text("filename,label\ncat/00.png,Anomaly\ndog/01.png,normal\ncat/05.png,unsure\n")
    packed = ParquetSource(convert(FolderSource(photos), tmp_path / "out"))
    assert packed.labels == {"cat/00.png": "anomaly", "dog/01.png": "normal"}  # cat/05.png cannot be read


def test_encoding_keep_copies_the_bytes(photos: Path, tmp_path: Path) -> None:
    source = FolderSource(photos)
    packed = ParquetSource(convert(source, tmp_path / "out", encoding="keep"))
    assert packed.ids == [id_ for id_ in source.ids if id_ != "dog/99.png"]
    assert all(packed.raw_bytes(id_) == (photos / id_).read_bytes() for id_ in packed.ids)
    assert same(source, packed)
    again = ParquetSource(convert(packed, tmp_path / "again", encoding="keep"))
    assert (again.ids, again.truth) == (packed.ids, packed.truth)


def test_jpeg_size_and_quality(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    save(tmp_path / "in/a.png", ramp)
    source = FolderSource(tmp_path / "in")
    packed = ParquetSource(convert(source, tmp_path / "out", size=32))
    image = packed.read(["a.png"])[0]
    assert packed.raw_bytes("a.png").startswith(b"\xff\xd8")
    assert image.shape == (32, 43, 3)  # the shape is kept: 48 x 64
    assert np.abs(image.astype(int) - scale(source.read(["a.png"])[0], 32, 43)).max() <= 3
    small = ParquetSource(convert(source, tmp_path / "small", size=32, quality=20))
    assert len(small.raw_bytes("a.png")) < len(packed.raw_bytes("a.png"))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("encoding", ["jpeg", "png", "webp_lossless"])
def test_numbers_of_channels(tmp_path: Path, channels: int, encoding: Any) -> None:
    save(tmp_path / "in/a.png", noise(1, channels))
    source = FolderSource(tmp_path / "in", channels=channels)
    if (encoding, channels) == ("jpeg", 4):
        with pytest.raises(ConfigError, match=r"encoding=jpeg.* 1 or 3 .* 4"):
            convert(source, tmp_path / "out", encoding=encoding)
        return
    packed = ParquetSource(convert(source, tmp_path / "out", encoding=encoding), channels=channels)
    assert packed.read(["a.png"])[0].shape == (5, 7, channels)
    assert encoding == "jpeg" or same(source, packed)


def test_the_rendering_is_applied_unless_files_are_copied(tmp_path: Path) -> None:
    deep = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), deep)
    source = FolderSource(tmp_path / "in", channels=1, rendering=Rendering(interval="minmax", curve="asinh"))
    packed = ParquetSource(convert(source, tmp_path / "out", encoding="png"), channels=1)
    assert same(source, packed)
    kept = ParquetSource(convert(source, tmp_path / "kept", encoding="keep"), channels=1, rendering=source.rendering)
    assert same(source, kept)


def test_a_rerun_resumes_after_the_last_shard(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(photos)
    whole = convert(source, tmp_path / "whole", encoding="png", rows_per_file=5)
    unfinished = shutil.ignore_patterns("*[2-9].parquet", "rejects.parquet")
    shutil.copytree(whole, tmp_path / "out", ignore=unfinished)  # as after a kill
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    reads: list[str] = []
    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, ids: (reads.extend(ids), read(self, ids))[1])
    convert(source, tmp_path / "out", encoding="png", rows_per_file=5, workers=1)
    assert reads == source.ids[10:]
    assert len(times) == 2
    assert {file: file.stat().st_mtime_ns for file in times} == times
    for file in whole.iterdir():
        assert pq.read_table(tmp_path / "out" / file.name) == pq.read_table(file)


def test_shards_of_other_options_or_images_and_foreign_files_are_kept(photos: Path, tmp_path: Path) -> None:
    convert(FolderSource(photos), tmp_path / "out")
    for options in ({"size": 4}, {"encoding": "png"}, {"quality": 9}, {"rows_per_file": 7}):
        with pytest.raises(DataError, match=r"00000\.parquet.*out"):
            convert(FolderSource(photos), tmp_path / "out", **options)
    save(photos / "cat/new.png", noise(1))
    with pytest.raises(DataError, match=r"00000\.parquet"):
        convert(FolderSource(photos), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data.parquet").write_text("mine")
    with pytest.raises(DataError, match=r"data\.parquet"):
        convert(FolderSource(photos), tmp_path / "mine")


def test_row_groups_and_layout_of_the_hub(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 500)
    convert(FolderSource(photos), tmp_path / "out", encoding="png", workers=3)
    file = pq.ParquetFile(tmp_path / "out/00000.parquet")
    assert file.num_row_groups > 5
    assert file.schema_arrow.names == ["image", "label"]
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == ["cat", "dog"]
    file.close()
    assert ParquetSource(tmp_path / "out").truth == ParquetSource(convert(FolderSource(photos), tmp_path / "b")).truth
    unlabelled = convert(FolderSource(photos, classes="none"), tmp_path / "c")
    assert pq.read_schema(unlabelled / "00000.parquet").names == ["image"]


def test_a_source_without_readable_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"in: .*not an image"):
        convert(FolderSource(tmp_path / "in"), tmp_path / "out")


def test_wrong_options(photos: Path, make_source: Any, tmp_path: Path) -> None:
    source, out = FolderSource(photos), tmp_path / "out"
    for options in ({"size": 0}, {"quality": 101}, {"rows_per_file": 0}):
        with pytest.raises(ConfigError, match=f"^{next(iter(options))} is "):
            convert(source, out, **options)
    with pytest.raises(ConfigError, match="size"):
        convert(source, out, size=3, encoding="keep")
    with pytest.raises(ConfigError, match="encoding=keep: array"):
        convert(make_source(), out, encoding="keep")
    assert not out.exists()


def test_warning_about_the_lost_test_split(make_source: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(make_source(holdout=frozenset({"im000001"})), tmp_path / "out")
    assert "official test split" in caplog.text


def test_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(photos), str(tmp_path / "a.parquet"), "--cache-dir", str(tmp_path / "cache")]
    main([*words, "--size", "4", "--quality", "80", "--rows-per-file", "20"])
    packed = ParquetSource(tmp_path / "a.parquet")
    assert packed.read(packed.ids[:1])[0].shape == (4, 6, 3)
    assert packed.raw_bytes(packed.ids[0]).startswith(b"\xff\xd8")
    assert (tmp_path / "a.parquet/00001.parquet").exists()
    main([str(photos), str(tmp_path / "b"), "--lossless"])
    assert same(FolderSource(photos), ParquetSource(tmp_path / "b"))
    main([str(photos), str(tmp_path / "c"), "--keep"])
    kept = ParquetSource(tmp_path / "c")
    assert kept.raw_bytes(kept.ids[0]) == (photos / kept.ids[0]).read_bytes()
    with pytest.raises(SystemExit):
        main([str(photos), str(tmp_path / "d"), "--lossless", "--keep"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "resumes"),
        (OSError(28, "No space left on device"), 1, "error: operating system error"),
    ],
)
def test_command_ends_in_one_line(
    call_main: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int, said: str
) -> None:
    assert "none" in call_main(main, tmp_path / "none", tmp_path / "out").error_line
    monkeypatch.setattr(module, "convert", lambda *_, **__: (_ for _ in ()).throw(error))
    save(tmp_path / "in/a.png", noise(0))
    outcome = call_main(main, tmp_path / "in", tmp_path / "out")
    assert outcome.code == code
    assert said in outcome.err.splitlines()[-1]
