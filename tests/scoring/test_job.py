"""Scoring jobs: their files, continuation after a kill, and shares of a job array."""

import csv
import errno
import json
import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from scipy.special import expit
from scipy.stats import rankdata, spearmanr

from anomalymatch.backbones import inference as inference_module
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.int8 import Agreement
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.scoring import backends, find_model, job, run_job
from anomalymatch.scoring.backends import make_scorer
from anomalymatch.scoring.parts import PartFolder

BAD = ["im000003", "im000016", "im000017", "im000018", "im000019", "im000020", "im000021", "im000022", "im000023"]
"""One image of the first part, and all of the third."""


def tables(folder):
    """Read all files of a finished job but the pictures."""
    return (
        pq.read_table(folder / "scores").to_pylist(),
        pq.read_table(folder / "rejects.parquet").to_pylist(),
        (folder / "top.csv").read_text(),
        json.loads((folder / "summary.json").read_text()),
    )


def test_every_image_is_scored_once_in_the_order_of_the_archive(run_scoring, make_source, tiny_network, tmp_path):
    source = make_source(50, unreadable=BAD)
    assert run_scoring(source, features=True)
    table = pq.read_table(tmp_path / "out" / "scores")
    readable = [id_ for id_ in source.ids if id_ not in BAD]
    assert table["id"].to_pylist() == readable
    images = torch.from_numpy(np.stack(source.read(readable))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = tiny_network.eval().backbone(images)
        normal, anomaly = tiny_network.head(features).T.numpy()
    np.testing.assert_allclose(table["logit"].to_numpy(), anomaly - normal, atol=1e-5)
    np.testing.assert_allclose(table["score"].to_numpy(), expit(anomaly - normal), atol=1e-5)
    ranks = rankdata(table["logit"].to_numpy(), method="average")
    np.testing.assert_allclose(table["quantile"].to_numpy(), (ranks - 0.5) / len(readable))
    assert set(table["run"].to_pylist()) == {find_model(tmp_path / "run").run_id}
    rows = np.concatenate([np.load(file) for file in sorted((tmp_path / "out" / "features").glob("*.npy"))])
    expected = torch.nn.functional.normalize(features).numpy()
    np.testing.assert_allclose(rows[table["feature_row"].to_numpy()].astype(np.float32), expected, atol=2e-3)
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert rejects == [{"id": id_, "reason": "the file is truncated"} for id_ in BAD]
    lines = (tmp_path / "out" / "top.csv").read_text().splitlines()
    best = sorted(zip(-table["logit"].to_numpy(), readable, strict=True))[:5]
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(k), id_] for k, (_, id_) in enumerate(best, 1)]
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["id"] for row in rows] == readable
    for name in ("score", "quantile", "logit"):
        np.testing.assert_allclose([float(row[name]) for row in rows], table[name].to_numpy(), atol=6e-7)
        assert max(len(row[name]) for row in rows) <= 9
    for name in ("top.png", "top_evidence.png", "histogram.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 300
    assert not (tmp_path / "out" / "parts").exists()
    reads = source.reads
    assert run_scoring(source, features=True)
    assert source.reads == reads


class Killed(BaseException):
    """Error that nothing catches, like a kill."""


def test_job_can_be_killed_at_every_write(run_scoring, make_source, tmp_path, monkeypatch):
    source = make_source(30, unreadable=BAD)
    run_scoring(source, "whole", features=True)
    real = os.replace
    kills = 0
    while True:
        writes = 0

        def replace_or_die(old, new, kill_at=kills + 1):
            nonlocal writes
            writes += 1
            if writes == kill_at:
                raise Killed
            real(old, new)

        out = f"killed{kills}"
        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            run_scoring(source, out, features=True)
            break
        except Killed:
            kills += 1
        monkeypatch.setattr(os, "replace", real)
        run_scoring(source, out, features=True)
        assert tables(tmp_path / out) == tables(tmp_path / "whole")
    assert kills >= 10


def test_shares_of_a_job_array_give_the_tables_of_one_job(run_scoring, make_source, tmp_path):
    source = make_source(45, unreadable=BAD)
    run_scoring(source, "whole", csv=False)
    assert not (tmp_path / "whole" / "scores.csv").exists()
    reads = []
    for share in ("2/3", "1/3", "3/3"):
        source.reads = 0
        done = run_scoring(source, "shared", shard=share)
        reads.append(source.reads)
        assert done == (share == "3/3") == (tmp_path / "shared" / "scores").exists()
    assert tables(tmp_path / "shared") == tables(tmp_path / "whole")
    assert pq.read_table(tmp_path / "shared" / "scores")["feature_row"].null_count == 36
    assert reads[0] == reads[1] == 16
    assert not list((tmp_path / "shared").glob("top-*.csv"))


def test_ids_in_csv_files_are_no_formulas(run_scoring, make_source, tmp_path):
    assert run_scoring(make_source(2, ids=["=1+1", "-b"], truth=None))
    for name in ("scores.csv", "top.csv"):
        rows = csv.DictReader((tmp_path / "out" / name).read_text(encoding="utf-8").splitlines())
        assert {row["id"] for row in rows} == {"'=1+1", "'-b"}


def test_archive_without_a_readable_image_has_only_rejects(run_scoring, make_source, tmp_path):
    assert run_scoring(make_source(5, unreadable=[f"im{i:06d}" for i in range(5)]))
    assert len(pq.read_table(tmp_path / "out" / "scores")) == 0
    assert len(pq.read_table(tmp_path / "out" / "rejects.parquet")) == 5


@pytest.mark.parametrize("bands", [["green", "red", "blue"], ["g", "r", "i"]])
def test_other_bands_are_an_error(run_scoring, make_source, tmp_path, bands):
    with pytest.raises(DataError, match=f"{', '.join(bands)}.*red, green, blue"):
        run_scoring(make_source(bands=bands))
    assert not (tmp_path / "out").exists()


def test_other_units_are_an_error_if_both_are_known(run_scoring, save_run, make_source):
    save_run(make_source(units="nJy"))
    with pytest.raises(DataError, match=r"mJy.*nJy"):
        run_scoring(make_source(units="mJy"))
    assert run_scoring(make_source(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part_images": 9}, "part_images=8, not 9"),
        ({"batch_size": 2}, "batch_size=3, not 2"),
        ({"features": True}, "features=False, not True"),
    ],
)
def test_folder_of_another_job_is_an_error(run_scoring, make_source, change, message):
    source = make_source(20)
    run_scoring(source, shard="1/2")
    with pytest.raises(ConfigError, match=message):
        run_scoring(source, **change)
    with pytest.raises(ConfigError, match="fingerprint=array-20-32, not array-21-32"):
        run_scoring(make_source(21), shard="1/2")


def test_share_that_another_process_scores_is_an_error(run_scoring, make_source, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock-1-2"), pytest.raises(StorageError, match="another process"):
        run_scoring(make_source(20), shard="1/2")


def test_corrupt_part_is_an_error_until_it_is_deleted(run_scoring, make_source, tmp_path):
    source = make_source(20)
    run_scoring(source, shard="1/2")
    part = tmp_path / "out" / "parts" / "000000.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(StorageError, match=r"000000\.parquet is corrupt"):
        run_scoring(source, shard="2/2")
    part.unlink()
    assert run_scoring(source)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("engine", "spark"), ("backend", "tpu"), ("decode", "tpu")],
        *[("batch_size", 0), ("part_images", 0), ("actors", 0), ("top", -1)],
        *[("shard", "0/2"), ("shard", "3/2"), ("shard", "one")],
    ],
)
def test_wrong_values_are_errors(spec, key, value):
    with pytest.raises(ConfigError, match=f"scoring.{key} is {value!r}"):
        replace(spec, **{key: value})


def test_ray_does_not_decode_on_gpus(spec):
    with pytest.raises(ConfigError, match=r"scoring.decode=gpu.*scoring.engine=local"):
        replace(spec, decode="gpu", engine="ray")


def test_model_is_that_of_the_last_cycle_or_the_given_one(save_run, tmp_path):
    run = save_run()
    save_run(cycle=2)
    assert find_model(run).weights.parent.name == "02"
    assert find_model(run, 1).weights.parent.name == "01"
    assert find_model(run, 1).run_id.startswith("run/01-")
    (tmp_path / "empty").mkdir()
    for path, cycle, message in ((run, 7, r"cycle=7.* 1, 2"), (tmp_path / "empty", None, "no finished cycle")):
        with pytest.raises(StorageError, match=message):
            find_model(path, cycle)


def test_full_disk_leaves_the_finished_parts(run_scoring, make_source, tmp_path, monkeypatch):
    source = make_source(30)
    real, writes = PartFolder.write, []

    def write(self, part, *found):
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        writes.append(part)
        real(self, part, *found)

    monkeypatch.setattr(PartFolder, "write", write)
    with pytest.raises(StorageError, match="the disk is full"):
        run_scoring(source)
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 2
    monkeypatch.setattr(PartFolder, "write", real)
    assert run_scoring(source)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_scorer_is_built_once_and_the_choice_is_kept(run_scoring, make_source, monkeypatch, backend):
    built, real = [], job.make_scorer

    def make_scorer(*args, **options):
        built.append(options["backend"])
        return real(*args, **options)

    monkeypatch.setattr(job, "make_scorer", make_scorer)
    run_scoring(make_source(20), shard="1/2", backend=backend)
    assert built == [backend]
    assert run_scoring(make_source(20), shard="2/2", backend=backend)
    assert built == [backend, "torch"]


def test_backend_that_does_not_work_leaves_no_manifest(run_scoring, make_source, monkeypatch):
    monkeypatch.setattr(backends, "_has_compiler", lambda: False)
    with pytest.raises(ConfigError, match=r"scoring\.backend=compile"):
        run_scoring(make_source(4), backend="compile")
    assert run_scoring(make_source(4))


@pytest.fixture
def small(make_source):
    """A hundred images, too few for `auto` to try int8."""
    return make_source(100)


@pytest.mark.skipif(find_spec("nncf") is None, reason="nncf is not installed")
def test_int8_is_quantised_once_for_all_shares_and_never_mixed(save_run, spec, small, tmp_path):
    model, spec = find_model(save_run()), replace(spec, backend="auto", batch_size=16, part_images=32, features=True)
    folder = tmp_path / "out"

    def run(precision, shard, **changes):
        return run_job(model, small, replace(spec, shard=shard, **changes), Inference("cpu", precision), folder)

    with pytest.raises(ConfigError, match=r"precision=int8 needs scoring.backend=openvino, not torch"):
        run("int8", "1/2", backend="torch")
    assert not run("int8", "1/2")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["precision"], manifest["backend"]) == ("int8", "openvino")
    assert manifest["agreement"].keys() == {"spearman", "overlap", "speedup", "images"}
    assert manifest["agreement"]["images"] == 50
    with pytest.raises(ConfigError, match="precision=int8, not fp32"):
        run("fp32", "2/2")
    assert run("auto", "2/2")  # the choice of the first share is kept
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert not (folder / "int8").exists()
    logits = pq.read_table(folder / "scores")["logit"].to_numpy()
    whole = tmp_path / "whole"
    assert run_job(model, small, spec, Inference("cpu", "int8"), whole)
    np.testing.assert_array_equal(pq.read_table(whole / "scores")["logit"].to_numpy(), logits)
    exact = tmp_path / "exact"
    assert run_job(model, small, spec, Inference("cpu", "fp32"), exact)
    assert json.loads((exact / "manifest.json").read_text())["agreement"] is None
    expected = pq.read_table(exact / "scores")["logit"].to_numpy()
    assert 0.7 < spearmanr(expected, logits).statistic < 1


@pytest.mark.parametrize("spearman", [1.0, 0.9])
def test_manifest_tells_what_auto_took(run_scoring, spec, save_run, small, tmp_path, monkeypatch, spearman):
    model, found = find_model(save_run()), Agreement(spearman, 1.0, 1.5, 50)
    plain = make_scorer(
        model.network(), Inference("cpu", "fp32"), backend="torch", count=1, batch_size=3, features=False
    )[1]
    monkeypatch.setattr(backends, "openvino_forward", lambda *args, **options: plain)
    monkeypatch.setattr(backends, "int8_forward", lambda cache: lambda images: 2 * plain(images))
    monkeypatch.setattr(backends, "fastest_backend", lambda *args, **options: "openvino")
    monkeypatch.setattr(inference_module, "quantise", lambda *args, **options: found)
    for name in ("has_openvino", "has_nncf"):
        monkeypatch.setattr(inference_module, name, lambda: True)
    monkeypatch.setattr(backends, "require_openvino", lambda *args: None)
    monkeypatch.setattr(inference_module, "INT8_PIXELS", 100 * 32**2)
    monkeypatch.setattr(Inference, "computes_bf16", False)
    auto = replace(spec, backend="auto")
    assert run_job(model, small, auto, Inference("cpu"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["precision"] == ("int8" if spearman == 1.0 else "fp32")
    assert manifest["agreement"] == (found._asdict() if spearman == 1.0 else None)
    logits = pq.read_table(tmp_path / "out" / "scores")["logit"].to_numpy()
    run_scoring(small, "plain")
    exact = pq.read_table(tmp_path / "plain" / "scores")["logit"].to_numpy()
    np.testing.assert_allclose(logits, exact * (2 if spearman == 1.0 else 1), atol=1e-5)
