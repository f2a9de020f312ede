"""Cascade: what is decided on a sample, and a job that uses it."""

import csv
import json
import logging
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Head, Network, build_backbone
from anomalymatch.data.stream import Collected
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.scoring import cascade as module
from anomalymatch.scoring import finish
from anomalymatch.scoring.cascade import Look, first_sides, judged, measure_looks, merged, whole_image_backbone
from anomalymatch.scoring.first_look import Threshold
from anomalymatch.types import Reject

FP32 = Inference("cpu", "fp32", workers=2)
AUTO = {"cascade": "auto", "sample": 300, "part_images": 250, "batch_size": 50, "top": 40}
BAD = [f"im{i:06d}" for i in range(700, 720)]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Leave out the contact sheets, which take most of the time of a small job."""
    monkeypatch.setattr(finish, "_write_pictures", lambda *args: None)


@pytest.fixture
def cost(monkeypatch):
    """Function that sets the time of a first look, as a share of that of the full look, whatever the clock says."""
    real = measure_looks

    def set_cost(value):
        def measured(*args, **options):
            found = real(*args, **options)
            return found._replace(seconds=[1.0, *[value] * (len(found.seconds) - 1)])

        monkeypatch.setattr(module, "measure_looks", measured)

    return set_cost


@pytest.fixture
def smooth(make_source):
    """Images of one colour with a little noise: what a network sees in them does not depend on their size."""
    source = make_source(1600, unreadable=BAD)
    plain = source.load

    def load(position):
        colour = np.random.default_rng(position).integers(40, 200, 3)
        return (plain(position) // 16 + colour).astype(np.uint8)

    source.load = load
    return source


def scores_of(folder):
    return pq.read_table(folder / "scores")


def test_cascade_that_pays_keeps_the_top_and_marks_the_rest(run_scoring, smooth, cost, tmp_path, caplog):
    cost(0.1)
    source = smooth
    run_scoring(source, "full", **AUTO | {"cascade": "off"})
    before = source.reads
    with caplog.at_level(logging.INFO):
        assert run_scoring(source, **AUTO)
    decision = json.loads((tmp_path / "out" / "summary.json").read_text())["cascade"]
    assert decision == json.loads((tmp_path / "out" / "manifest.json").read_text())["cascade"]
    assert decision["used"]
    assert decision["speed"] == pytest.approx(1 / (0.1 + decision["share"]))
    assert f"images of 18 px first, {100 * decision['share']:.1f} % again at 32 px" in caplog.text.replace("\n", " ")
    full, table = scores_of(tmp_path / "full"), scores_of(tmp_path / "out")
    assert table["id"].to_pylist() == full["id"].to_pylist()
    assert "full_look" not in full.column_names
    seen = table["full_look"].to_numpy()
    np.testing.assert_allclose(table["logit"].to_numpy()[seen], full["logit"].to_numpy()[seen], atol=1e-5)
    assert (table["logit"].to_numpy()[~seen] < decision["threshold"]).all()
    sample = decision["sample"] / len(full)
    assert seen.mean() == pytest.approx(sample + (1 - sample) * decision["share"], abs=0.06)
    top = np.argsort(-full["logit"].to_numpy())[:40]
    assert seen[top].mean() >= 0.95
    reads = source.reads - before
    assert reads == pytest.approx(1600 + 300 + (1580 - 300) * decision["share"], abs=80)
    rejects = [pq.read_table(tmp_path / name / "rejects.parquet").to_pylist() for name in ("out", "full")]
    assert rejects[0] == rejects[1]
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert [row["full_look"] == "true" for row in rows] == seen.tolist()
    best = list(csv.DictReader((tmp_path / "out" / "top.csv").read_text().splitlines()))
    assert {row["full_look"] for row in best} == {"true"}
    assert not list((tmp_path / "out").glob("cascade*"))


def test_cascade_that_does_not_pay_scores_in_full(run_scoring, smooth, cost, tmp_path, caplog):
    cost(0.9)
    source = smooth
    run_scoring(source, "full", **AUTO | {"cascade": "off"})
    with caplog.at_level(logging.INFO):
        assert run_scoring(source, **AUTO)
    assert "not used, which needs 1.5 times" in caplog.text
    assert not json.loads((tmp_path / "out" / "summary.json").read_text())["cascade"]["used"]
    for name in ("scores", "rejects.parquet"):
        found, expected = (pq.read_table(tmp_path / folder / name) for folder in ("out", "full"))
        assert found["id"].equals(expected["id"])
        assert found.column_names == expected.column_names
    logits = [scores_of(tmp_path / folder)["logit"].to_numpy() for folder in ("out", "full")]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert (tmp_path / "out" / "top.csv").read_text().splitlines()[0] == "rank,id,score,logit"


def test_small_archive_is_scored_in_full(run_scoring, make_source, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run_scoring(make_source(100), cascade="auto")
    assert "which needs 5000 images. There are 100" in caplog.text
    assert "cascade" not in json.loads((tmp_path / "out" / "summary.json").read_text())


class Killed(BaseException):
    """Error that nothing catches, like a kill."""


@pytest.mark.parametrize("used", [True, False])
def test_killed_job_and_shares_give_the_numbers_of_one_job(run_scoring, smooth, cost, tmp_path, monkeypatch, used):
    cost(0.1 if used else 0.9)
    source = smooth
    run_scoring(source, "whole", **AUTO)
    whole = scores_of(tmp_path / "whole")
    for kill in (2, 5) if used else (5,):
        real, writes = os.replace, 0

        def replace_or_die(old, new, kill=kill, real=real):
            nonlocal writes
            writes += 1
            if writes == kill:
                raise Killed
            real(old, new)

        monkeypatch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Killed):
            run_scoring(source, f"killed{kill}", **AUTO)
        monkeypatch.setattr(os, "replace", real)
        assert run_scoring(source, f"killed{kill}", **AUTO)
        assert scores_of(tmp_path / f"killed{kill}").equals(whole)
    done = [run_scoring(source, "shared", **AUTO, shard="2/2")]
    cost(0.9 if used else 0.1)  # the first share has decided
    done.append(run_scoring(source, "shared", **AUTO, shard="1/2"))
    assert done == [False, True]
    assert scores_of(tmp_path / "shared").equals(whole)
    assert (tmp_path / "shared" / "top.csv").read_text() == (tmp_path / "whole" / "top.csv").read_text()


def test_folder_of_a_cascade_takes_no_other_job_and_needs_its_file(run_scoring, smooth, cost, tmp_path):
    cost(0.1)
    source = smooth
    run_scoring(source, **AUTO, shard="1/2")
    with pytest.raises(ConfigError, match="cascade"):
        run_scoring(source, **AUTO | {"cascade": "off"}, shard="2/2")
    (tmp_path / "out" / "cascade.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cascade\.safetensors"):
        run_scoring(source, **AUTO, shard="2/2")


def test_sample_and_top_change_what_is_measured(run_scoring, smooth, cost, tmp_path):
    cost(0.1)
    found = {}
    for name, changes in {"usual": {}, "sample": {"sample": 200}, "top": {"top": 800}}.items():
        run_scoring(smooth, name, **AUTO | changes, shard="1/9")
        found[name] = json.loads((tmp_path / name / "manifest.json").read_text())["cascade"]
    assert [found[name]["sample"] for name in found] == [296, 197, 296]
    assert [found[name]["top"] for name in found] == [99, 99, 148]
    assert found["top"]["share"] > found["usual"]["share"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "ray"}, "scoring.cascade=auto needs scoring.engine=local"),
        ({"features": True}, "scoring.cascade=auto needs scoring.features=false"),
        ({"cascade": "on"}, "scoring.cascade is 'on'"),
        ({"sample": 0}, "scoring.sample is 0"),
    ],
)
def test_wrong_values_are_errors(spec, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(spec, **{"cascade": "auto"} | changes)


def test_decision_by_hand():
    decision = judged(Threshold(-1.5, 0.05, 198, 200), 0.2, sample=4000, side=64, size=150)
    assert (decision.used, decision.speed) == (True, pytest.approx(4))
    assert str(decision) == (
        "images of 64 px first, 5.0 % again at 150 px; 198 of 200 of the top kept (0.96 to 1.00); "
        "expected 4.0 times as fast"
    )
    slow = judged(Threshold(-1.5, 0.5, 198, 200), 0.2, sample=4000, side=64, size=150)
    assert not slow.used
    assert "1.4 times" in str(slow)


def network(name="test_efficientnet", size=64, **options):
    spec, backbone = build_backbone(name=name, weights="none", channels=3, image_size=size, **options)
    return Network(spec, backbone, Head(backbone.features, normalised=True, stage_features=backbone.stage_features))


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, [28, 36]),
        ({"crops": 5}, [28, 36, 64]),
        ({"orientations": 2, "stages": True}, [28, 36, 64]),
        ({"tiles": 2, "stages": True}, [28, 36, 64]),
        ({"name": "test_vit", "size": 160}, []),
    ],
)
def test_first_looks_are_smaller_or_see_the_image_once(options, sides):
    net = network(**options)
    assert first_sides(net) == sides
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    if sides:
        plain = network(**{key: value for key, value in options.items() if key == "stages"})
        plain.backbone.body.load_state_dict(net.backbone.body.state_dict())
        with torch.inference_mode():
            expected, found = plain.eval().backbone(images), whole_image_backbone(net.backbone)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_looks_take_turns_and_keep_what_all_could_read(make_source, monkeypatch):
    source = make_source(30, unreadable=["im000003"])
    monkeypatch.setattr(module, "SLICE", 8)
    order, ticks = [], iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))

    def look(name, side):
        def forward(images):
            order.append(name)
            assert images.shape[-1] == side
            return images.float().mean((1, 2, 3))[:, None].numpy()

        return Look(forward, 1, side, 8)

    positions = np.arange(1, 25)
    found = measure_looks(source, positions, [look("full", 16), look("small", 8)], workers=1)
    assert order[2:] == ["full", "small", "small", "full", "full", "small"]
    assert found.seconds == [3.0, 3.0]
    assert found.positions.tolist() == [i for i in range(1, 25) if i != 3]
    means = [image.mean() for image in source.read([source.ids[i] for i in found.positions])]
    for rows in found.rows:
        np.testing.assert_allclose(rows[:, 0], means, atol=0.5)


def test_merged_looks_by_hand():
    first = Collected(["a", "c", "d"], np.float32([[-3], [1], [2]]), [Reject("b", "empty")])
    again = Collected(["d"], np.float32([[5]]), [Reject("c", "truncated")])
    found, full = merged(["a", "b", "c", "d", "e"], first, again, {"e": -1.0})
    assert found.ids == ["a", "d", "e"]
    assert found.rows[:, 0].tolist() == [-3, 5, -1]
    assert full.tolist() == [False, True, True]
    assert found.rejects == [Reject("b", "empty"), Reject("c", "truncated")]
