"""Decoding on the GPU, tested on the CPU: torchvision decodes on both."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.stream import stream_batches
from anomalymatch.errors import ConfigError
from anomalymatch.scoring.gpu_decode import check_gpu_decode, stream_on_device

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Smooth JPEGs of two sizes, a grey one, one with an orientation tag, a PNG, and three damaged files."""
    rng = np.random.default_rng(0)
    for i in range(8):
        small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 48) if i % 2 else (32, 32), Image.Resampling.BICUBIC).save(
            tmp_path / f"{i}.jpg", quality=95
        )
    with Image.open(tmp_path / "1.jpg") as photo:
        photo.convert("L").save(tmp_path / "grey.jpg", quality=95)
        photo.save(tmp_path / "png.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.save(tmp_path / "sideways.jpg", exif=exif, quality=95)
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG")
    data = buffer.getvalue()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "noise.jpg").write_bytes(data[:30] + bytes(range(256)) + b"\xff\xd9")
    return tmp_path


def both(source, chunks):
    usual = list(stream_batches(source, chunks, size=32))
    device = list(stream_on_device(source, chunks, size=32, workers=2, device=CPU))
    return usual, device


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_batches_are_those_of_the_cpu(folder, fit):
    source = FolderSource(folder, rendering=Rendering(fit=fit))
    chunks = [source.ids[start : start + 5] for start in range(0, len(source.ids), 5)]
    for one, other in zip(*both(source, chunks), strict=True):
        assert one.ids == other.ids
        assert {reject.id for reject in one.rejects} == {reject.id for reject in other.rejects}
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        for id_, a, b in zip(one.ids, one.images.int(), other.images.int(), strict=True):
            assert (a - b).abs().float().mean() < (1.5 if "1" not in id_ else 8.0), id_


def test_batch_without_a_readable_image_is_empty(folder):
    source = FolderSource(folder)
    (batch,) = stream_on_device(source, [["cut.jpg", "empty.jpg"]], size=32, workers=1, device=CPU)
    assert (batch.ids, batch.images.shape, len(batch.rejects)) == ([], (0, 3, 32, 32), 2)


def test_unsuitable_archives_are_errors(folder, make_source):
    with pytest.raises(ConfigError, match=r"scoring.decode=gpu.*cpu"):
        check_gpu_decode(FolderSource(folder), CPU)
    cuda = torch.device("cuda")
    check_gpu_decode(FolderSource(folder), cuda)
    for source in (make_source(), FolderSource(folder, channels=1)):
        with pytest.raises(ConfigError, match=r"scoring.decode=gpu"):
            check_gpu_decode(source, cuda)
    with pytest.raises(ConfigError, match=r"scoring.decode=gpu"):
        check_gpu_decode(FolderSource(folder, rendering=Rendering(curve="log")), cuda)
