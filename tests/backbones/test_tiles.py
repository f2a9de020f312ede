"""Tiles of large images: places, features by a slow twin, the choice of their number, cache, checkpoint and scores."""

import json

import numpy as np
import pytest
import torch
from networks import built, network_of, some_images

from anomalymatch import make_learner, make_task
from anomalymatch.algorithms.augmentation.loading import whole_or_tile
from anomalymatch.algorithms.fixmatch.batches import MixedBatches
from anomalymatch.backbones.checkpoint import load_network, save_network
from anomalymatch.backbones.embedding import fitting_tiles
from anomalymatch.backbones.features import FeatureCache
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.tta import MAX_TILES, Tiling, cut_tiles
from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import ConfigError

SIDE = Tiling(3, 32).side


def test_places_by_hand():
    assert (Tiling(3, 4).starts, Tiling(3, 4).side) == ((0, 3, 6), 10)
    assert Tiling(2, 4).boxes == ((0, 0), (0, 3), (3, 0), (3, 3))
    assert (Tiling(6, 224).starts[-1], Tiling(6, 224).side) == (840, 1064)
    assert (Tiling(1, 84).side, Tiling(1, 84).boxes) == (84, ())


@pytest.mark.parametrize(("count", "size"), [(2, 42), (3, 17), (5, 32), (MAX_TILES, 8)])
def test_tiles_cover_every_pixel_and_overlap_by_a_quarter(count, size):
    tiling = Tiling(count, size)
    place = torch.arange(tiling.side**2).view(1, 1, tiling.side, tiling.side)
    tiles = cut_tiles(place, tiling)
    assert tiles.shape == (count**2, 1, size, size)
    assert set(tiles.flatten().tolist()) == set(place.flatten().tolist())
    shared = set(tiles[0].flatten().tolist()) & set(tiles[1].flatten().tolist())
    assert len(shared) / size**2 == pytest.approx(0.25, abs=0.51 / size)


@pytest.mark.parametrize(("name", "options"), [("test_efficientnet", {"stages": True}), ("test_vit", {})])
def test_features_are_those_of_the_whole_and_the_largest_and_the_mean_over_tiles(name, options):
    one = built(name, **options)[1].eval()
    spec, several = built(name, **options, orientations=2, crops=1, tiles=3)
    several.eval()
    plain = built(name, **options, orientations=2)[1].eval()
    cropped = built(name, **options, orientations=2, crops=1)[1].eval()
    images = some_images(2, size=spec.input_size)
    assert spec.input_size == SIDE
    step = Tiling(3, 32).starts[1]
    with torch.inference_mode():
        tiles = torch.stack(
            [plain(images[..., i * step : i * step + 32, j * step : j * step + 32]) for i in range(3) for j in range(3)]
        )
        whole = cropped(torch.nn.functional.adaptive_avg_pool2d(images.float(), 32))
        parts = [whole, tiles.max(dim=0).values, tiles.mean(dim=0)]
        last, stages = ([part[:, own] for part in parts] for own in (slice(one.features), slice(one.features, None)))
        found = several(images)
        torch.testing.assert_close(found, torch.cat(last + stages, dim=1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(several.fused()(images), found, atol=1e-4, rtol=1e-4)
    assert (several.features, several.stage_features) == (3 * one.features, 3 * one.stage_features)
    assert several.width == found.shape[1]


def test_one_tile_changes_nothing():
    spec, backbone = built(stages=True, tiles=1)
    assert (spec, spec.input_size, backbone.tiling) == (built(stages=True)[0], 32, None)
    with torch.inference_mode():
        assert torch.equal(backbone.eval()(some_images()), built(stages=True)[1].eval()(some_images()))


def test_training_sees_tiles_as_they_are_and_equal_parts():
    one, several = built(stages=True)[1].train(), built(stages=True, tiles=3)[1].train()
    rows, images = one(some_images()), some_images()
    torch.testing.assert_close(several(images), several.join_parts([rows] * 3))
    several.eval().averages = False
    torch.testing.assert_close(several(images), several.join_parts([one.eval()(images)] * 3))


def test_uniform_images_have_equal_parts():
    backbone = built(stages=True, tiles=2)[1].eval()
    grey = torch.full((1, 3, Tiling(2, 32).side, Tiling(2, 32).side), 77, dtype=torch.uint8)
    with torch.inference_mode():
        whole, largest, mean = backbone(grey)[0, : backbone.features].view(3, -1)
    torch.testing.assert_close(largest, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiles", [0, MAX_TILES + 1])
def test_other_numbers_are_errors(tiles):
    with pytest.raises(ConfigError, match=rf"model\.tiles is {tiles}"):
        built(tiles=tiles)


@pytest.mark.parametrize(
    ("size", "fit", "tiles"),
    [
        (32, "stretch", 1),
        (64, "stretch", 1),
        (65, "pad", 2),
        (112, "stretch", 2),
        (113, "stretch", 3),
        (9999, "crop", 16),
    ],
)
def test_auto_leaves_half_of_the_resolution(make_source, size, fit, tiles):
    source = make_source(40, rendering=Rendering(fit=fit))
    source.load = lambda position: np.zeros((size, size if fit == "crop" else 8, 3), np.uint8)
    assert fitting_tiles(source, 32) == tiles


def test_auto_is_the_number_that_it_finds(make_source, tmp_path):
    task = make_task(make_source(12, size=100), anomaly="rare", holdout=0.0)
    words = ["model.name=test_efficientnet", "model.weights=none", "model.image_size=32", f"data.cache_dir={tmp_path}"]
    learners = {each: make_learner("probe", task, *words, f"model.tiles={each}") for each in ("auto", "2", "1")}
    folders = {each: learner.embedding.features_folder for each, learner in learners.items()}
    assert learners["auto"].embedding.spec.tiles == 2
    assert folders["auto"] == folders["2"] != folders["1"]
    with pytest.raises(ConfigError, match=r"model\.tiles is 'all'"):
        _ = make_learner("probe", task, *words, "model.tiles=all").embedding.spec


def test_a_trained_network_scores_with_its_tiles(make_source, tmp_path):
    """Ranking, cached features, checkpoint and new archive agree; the images are larger than the tiles cover."""
    task = make_task(make_source(24, size=80), anomaly="rare", holdout=0.0)
    words = ["model.name=test_efficientnet", "model.weights=none", "model.image_size=32", "model.tiles=3"]
    learner = make_learner("probe", task, *words, f"data.cache_dir={tmp_path}", "inference.precision=fp32")
    learner.fit({id_: "anomaly" if task.source.truth[id_] == "rare" else "normal" for id_ in task.pool[:12]})
    ranking = learner.rank()
    (tmp_path / "run").mkdir()
    learner.save(tmp_path / "run")
    network = load_network(tmp_path / "run" / "weights.safetensors")
    assert (network.spec.tiles, network.spec.input_size) == (3, SIDE)
    forward = Inference("cpu", "fp32").prepare(network, size=SIDE, count=24)
    (batch,) = Inference("cpu", "fp32").run(forward, task.source, ranking.ids, size=SIDE)
    np.testing.assert_allclose(batch.outputs[:, 1] - batch.outputs[:, 0], ranking.logits, atol=0.05)


def test_checkpoints_from_before_tiles_have_none(tmp_path):
    network = network_of()
    save_network(network, tmp_path / "w.safetensors")
    description = json.loads((tmp_path / "w.json").read_text())
    assert description["network"].pop("tiles") == 1
    (tmp_path / "w.json").write_text(json.dumps(description))
    assert load_network(tmp_path / "w.safetensors").spec == network.spec


def test_cached_features_depend_on_the_tiles(make_source, tmp_path):
    cache, source = FeatureCache(tmp_path, Inference("cpu", "fp32")), make_source(3)
    keys = {cache.key(source, *built(tiles=tiles)) for tiles in (1, 2, 3)}
    assert len(keys) == 3
    with torch.inference_mode():
        features = cache.features(source, *built(tiles=2))
    assert (features.parts, features.take(source.ids).shape) == (3, (3, 3 * 256))


def test_views_are_wholes_and_tiles():
    tiling = Tiling(3, 8)
    image = np.arange(tiling.side**2, dtype=np.int32).reshape(tiling.side, tiling.side, 1).astype(np.uint8)
    found = [whole_or_tile(image, tiling, seed) for seed in range(200)]
    places = {tuple(map(int, box)): 0 for box in tiling.boxes}
    wholes = 0
    for view in found:
        assert view.shape == (8, 8, 1)
        own = [(t, s) for t, s in tiling.boxes if np.array_equal(image[t : t + 8, s : s + 8], view)]
        wholes += not own
        for box in own:
            places[box] += 1
    assert 75 <= wholes <= 125
    assert min(places.values()) > 0
    np.testing.assert_array_equal(whole_or_tile(image, tiling, 5), whole_or_tile(image, tiling, 5))


def test_batches_of_tiles_have_the_size_of_tiles(make_source):
    source = make_source(20, size=60)
    labels = {"im000000": "anomaly", "im000001": "normal"}
    for tiles in (1, 3):
        data = MixedBatches(source, labels, source.ids[2:], image_size=24, tiles=tiles, seed=1)
        labelled, unlabelled = data.views()
        assert labelled[0][0].shape == unlabelled[0][0].shape == unlabelled[0][1].shape == (3, 24, 24)
