import errno
import logging

import numpy as np
import pytest
import torch

from anomalymatch.backbones import features as module
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import FeatureCache, Features, Shard
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import build_backbone
from anomalymatch.cache import Cache
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Reject

FP32 = Inference(device="cpu", precision="fp32", batch_pixels=32 * 32 * 8, workers=1)
BAD = {"im000004", "im000017"}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_IMAGES", 10)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache", FP32)


@pytest.fixture
def computed(cache, make_source, tiny_backbone):
    """Cache, source (25 images in three shards, two unreadable) and its features."""
    source = make_source(25, unreadable=BAD)
    return cache, source, cache.features(source, *tiny_backbone)


@pytest.fixture
def rows():
    """Features of 23 images in shards of 10, 10, 0 and 3."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(23, 6)).astype(np.float16)
    parts = [(0, 10), (10, 20), (20, 20), (20, 23)]
    shards = [Shard([f"i{k}" for k in range(a, b)], values[a:b], []) for a, b in parts]
    return values, Features(shards)


def entry(cache):
    (folder,) = cache.folder.iterdir()
    return folder


def same(first, second):
    assert first.ids == second.ids
    assert first.rejects == second.rejects
    for a, b in zip(first.shards, second.shards, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)


def test_features_are_the_normalised_outputs(computed, tiny_backbone):
    _, source, features = computed
    readable = [id_ for id_ in source.ids if id_ not in BAD]
    assert features.ids == readable
    assert features.rejects == [Reject(id_, "the file is truncated") for id_ in sorted(BAD)]
    images = torch.from_numpy(np.stack(source.read(readable))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(tiny_backbone[1].eval()(images)).numpy()
    np.testing.assert_allclose(features.take(readable), expected, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(features.take(readable), axis=1), 1.0, atol=2e-3)
    assert [len(shard.ids) for shard in features.shards] == [9, 9, 5]


def test_features_are_read_from_disk_the_second_time(computed, tiny_backbone):
    cache, source, features = computed
    source.reads = 0
    same(cache.features(source, *tiny_backbone), features)
    assert source.reads == 0


def test_key_changes_with_everything_that_the_features_depend_on(cache, make_source, tiny_backbone, tmp_path):
    spec, backbone = tiny_backbone
    source = make_source(25)
    key = cache.key(source, spec, backbone)
    assert key == FeatureCache(tmp_path / "elsewhere", FP32).key(make_source(25), spec, backbone)
    larger, larger_backbone = build_backbone(name="test_efficientnet", weights="none", channels=3, image_size=64)
    others = [
        cache.key(make_source(26), spec, backbone),
        cache.key(make_source(25, fingerprint="pixels have changed"), spec, backbone),
        cache.key(source, larger, larger_backbone),
        FeatureCache(cache.folder, Inference("cpu", "bf16")).key(source, spec, backbone),
    ]
    with torch.no_grad():
        backbone.body.conv_stem.weight[0, 0, 0, 0] += 0.01
    others.append(cache.key(source, spec, backbone))
    assert len({key, *others}) == 6
    assert key == FeatureCache(cache.folder, Inference("cpu", "fp32", 999, 7)).key(
        source, spec, build_backbone(name="test_efficientnet", weights="none", channels=3, image_size=32)[1]
    )


def test_damaged_shard_is_computed_again(computed, tiny_backbone, caplog):
    cache, source, features = computed
    path = entry(cache) / "000000010" / "rows.npy"
    data = path.read_bytes()
    path.unlink()  # the old file is mapped into the memory of this process
    path.write_bytes(data[:-100])
    source.reads = 0
    with caplog.at_level(logging.WARNING, logger="anomalymatch.cache"):
        again = cache.features(source, *tiny_backbone)
    assert "000000010" in caplog.text
    assert source.reads == 10  # that shard alone
    same(again, features)


def test_interrupted_computation_continues_after_the_finished_shards(cache, make_source, tiny_backbone, monkeypatch):
    source = make_source(25)
    write, finished = Cache.write, []

    def killed_at_the_third(self, name, *contents):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(name)
        return write(self, name, *contents)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "write", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            cache.features(source, *tiny_backbone)
    source.reads, counts, prepare = 0, [], Inference.prepare
    monkeypatch.setattr(
        Inference,
        "prepare",
        lambda self, module, *, count, **rest: counts.append(count) or prepare(self, module, count=count, **rest),
    )
    features = cache.features(source, *tiny_backbone)
    assert source.reads == 5
    assert counts == [25]  # so that the backend is that of the whole
    same(features, FeatureCache(cache.folder.with_name("fresh"), FP32).features(source, *tiny_backbone))


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (TimeoutError("too slow"), True),
        (OSError("image file is truncated"), False),  # Pillow's
        (ValueError("damaged"), False),
    ],
)
def test_rejects_of_the_environment_are_tried_again(cache, make_source, tiny_backbone, monkeypatch, error, temporary):
    source, healed = make_source(25), False

    def load(own, position):
        if position == 13 and not healed:
            try:
                raise error
            except Exception as cause:
                raise UnreadableImageError(str(cause)) from None
        return plain(own, position)

    plain = type(source).load
    monkeypatch.setattr(type(source), "load", load)
    for _ in range(2):
        assert [reject.id for reject in cache.features(source, *tiny_backbone).rejects] == ["im000013"]
    healed, source.reads = True, 0
    features = cache.features(source, *tiny_backbone)
    assert source.reads == (11 if temporary else 0)  # tried once, then its shard of ten
    assert features.ids == [id_ for id_ in source.ids if temporary or id_ != "im000013"]


def test_source_without_a_readable_image(cache, make_source, tiny_backbone):
    features = cache.features(make_source(12, unreadable={f"im{i:06d}" for i in range(12)}), *tiny_backbone)
    assert features.ids == []
    assert len(features.rejects) == 12
    assert features.take([]).shape == (0, 256)
    assert features.project(np.ones(256)).shape == (0,)


def test_take_positions_and_project(rows):
    values, features = rows
    assert features.ids == [f"i{k}" for k in range(23)]
    wanted = ["i22", "i0", "i10", "i9", "i0"]
    assert features.positions(wanted).tolist() == [22, 0, 10, 9, 0]
    np.testing.assert_array_equal(features.take(wanted), values[[22, 0, 10, 9, 0]].astype(np.float32))
    assert features.take(iter(wanted)).dtype == np.float32
    direction = np.random.default_rng(1).normal(size=6)
    slow = [sum(float(v) * d for v, d in zip(row, direction, strict=True)) for row in values]
    np.testing.assert_allclose(features.project(direction), slow, rtol=1e-4, atol=1e-5)
    for wanted_rows in ([22, 0], [22, 0, 10, 9, 0], []):  # few are multiplied one by one
        some = features.project(direction, np.array(wanted_rows, np.int64))
        np.testing.assert_allclose(some, np.array(slow)[wanted_rows], rtol=1e-4, atol=1e-5)
    assert "i3" in features
    assert "x" not in features
    assert 3 not in features


def test_rows_of_the_last_ids_are_kept_and_no_others(computed):
    _, source, features = computed
    for wanted in (list(source.ids), source.ids[3:9], source.ids[3:8], source.ids[8:2:-1], [], source.ids[3:9]):
        for _ in range(2):
            readable, rejects, rows = features.rows(iter(wanted))
            assert (readable, rejects) == features.split(wanted)
            assert rows.tolist() == features.positions(readable).tolist()
    assert features.rows(source.ids)[2] is features.rows(list(source.ids))[2]


def test_image_without_features_is_an_error_with_the_reason(computed):
    _, _, features = computed
    with pytest.raises(DataError, match="no features of image 'im000004': the file is truncated"):
        features.take(["im000001", "im000004"])
    with pytest.raises(DataError, match="no features of image 'x': it is not in the source"):
        features.positions(["x"])


def test_embedding_builds_once_and_returns_copies(make_source, tmp_path):
    source = make_source(12)
    embedding = Embedding("test_efficientnet", "none", 32, 0.02, source, tmp_path, FP32)
    assert embedding.spec.image_size == 32
    assert embedding.spec.bn_momentum == 0.02
    assert embedding.features.ids == list(source.ids)
    assert embedding.features is embedding.features
    first, second = (
        embedding.network(normalised=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    assert not torch.equal(first.head.linear.weight, second.head.linear.weight)
    with torch.no_grad():
        next(first.backbone.parameters()).add_(1.0)
    untouched = embedding.network(normalised=False).backbone
    assert torch.equal(next(second.backbone.parameters()), next(untouched.parameters()))
    assert embedding.network(normalised=False).head.normalised is False
    other = Embedding("test_efficientnet", "none", 32, 0.02, make_source(12, channels=5), tmp_path, FP32)
    assert other.spec.channels == 5
    assert other.network(normalised=True)(torch.zeros(2, 5, 32, 32, dtype=torch.uint8)).shape == (2, 2)


def normal_rows(count):
    return np.random.default_rng(0).normal(size=(count, 10)).astype(np.float32)


def features_of(rows, *, stage_width=0):
    halves = np.array_split(np.arange(len(rows)), 2)
    shards = [Shard([f"i{k}" for k in half], rows[half].astype(np.float16), []) for half in halves]
    return Features(shards, stage_width=stage_width)


def test_columns_of_the_last_layer_and_of_the_stages():
    rows = normal_rows(400)
    features = features_of(rows, stage_width=4)
    assert (features.last_width, features.stage_width) == (6, 4)
    np.testing.assert_array_equal(features.last.take(["i3", "i399"]), rows[[3, 399], :6].astype(np.float16))
    np.testing.assert_array_equal(features.stages.take(["i3", "i399"]), rows[[3, 399], 6:].astype(np.float16))
    assert features.scaling.blocks == (slice(0, 6), slice(6, 10))


def test_parts_with_tiles_are_blocks_of_their_own():
    values = np.random.default_rng(0).normal(size=(20, 15)).astype(np.float16)
    shard = Shard([f"i{k}" for k in range(20)], values, [])
    together, apart = (Features([shard], stage_width=9, parts=parts).scaling for parts in (1, 3))
    np.testing.assert_array_equal(apart.scale, together.scale)
    assert [(part.start, part.stop) for part in together.blocks] == [(0, 6), (6, 15)]
    edges = [(0, 2), (2, 4), (4, 6), (6, 9), (9, 12), (12, 15)]
    assert [(part.start, part.stop) for part in apart.blocks] == edges
    last = Features([shard], parts=3).scaling
    assert [(part.start, part.stop) for part in last.blocks] == [(0, 5), (5, 10), (10, 15)]
    assert set(last.scale) == {1.0}


def test_features_without_stages_are_not_scaled():
    rows = normal_rows(400)
    features = features_of(rows)
    assert features.last is features
    assert features.scaling.blocks == (slice(0, 10),)
    np.testing.assert_array_equal(features.scaling.scale, 1.0)


def test_stages_are_scaled_half_way_to_equal_spreads():
    rows = normal_rows(3000)
    rows[:, 6:] *= [0.01, 0.04, 0.09, 0.0]
    rows[:, 9] = 0.3  # constant
    scale = features_of(rows, stage_width=4).scaling.scale
    np.testing.assert_array_equal(scale[:6], 1.0)
    spread = rows[:, 6:].astype(np.float16).astype(np.float64).std(axis=0)
    np.testing.assert_allclose(scale[6:9], 1 / np.sqrt(spread[:3] * spread[:3].sum()), rtol=1e-3)
    assert scale[9] == 0
    scaled = rows[:, 6:] * scale[6:]
    assert ((scaled - scaled.mean(axis=0)) ** 2).sum(axis=1).mean() == pytest.approx(1.0, rel=0.01)


def test_archive_without_readable_images_has_no_spread():
    features = Features([Shard([], np.zeros((0, 10), np.float16), [])], stage_width=4)
    np.testing.assert_array_equal(features.scaling.scale, [1] * 6 + [0] * 4)
