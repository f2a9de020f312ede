"""Scoring jobs: their files, continuation after a kill, and shares of a job array."""

import json
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.special import expit
from scipy.stats import rankdata

from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.scoring import backends, job
from anomalymatch.scoring.job import run_job
from anomalymatch.scoring.model import find_model
from anomalymatch.scoring.parts import Manifest, PartFolder

BAD = ["im000003", "im000016", "im000017", "im000018", "im000019", "im000020", "im000021", "im000022", "im000023"]
"""One image of the first part, and all of the third."""


def direct_logits(network, source, ids):
    """Compute logits image by image, without fusion and batches."""
    import torch

    network.eval()
    logits = []
    for id_ in ids:
        (image,) = source.read([id_])
        with torch.inference_mode():
            normal, anomaly = network(torch.from_numpy(image).permute(2, 0, 1)[None])[0].tolist()
        logits.append(anomaly - normal)
    return np.array(logits)


def tables(folder):
    """Read all files of a finished job but the pictures."""
    return (
        pq.read_table(folder / "scores").to_pylist(),
        pq.read_table(folder / "rejects.parquet").to_pylist(),
        (folder / "top.csv").read_text(),
        json.loads((folder / "summary.json").read_text()),
    )


def test_every_image_is_scored_once_in_the_order_of_the_archive(
    save_run, spec, cpu, make_source, tiny_network, tmp_path
):
    source = make_source(50, unreadable=BAD)
    assert run_job(find_model(save_run()), source, spec, cpu, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "scores")
    readable = [id_ for id_ in source.ids if id_ not in BAD]
    assert table["id"].to_pylist() == readable
    expected = direct_logits(tiny_network, source, readable)
    np.testing.assert_allclose(table["logit"].to_numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(table["score"].to_numpy(), expit(expected), atol=1e-5)
    ranks = rankdata(table["logit"].to_numpy(), method="average")
    np.testing.assert_allclose(table["quantile"].to_numpy(), (ranks - 0.5) / len(readable))
    assert set(table["run"].to_pylist()) == {find_model(tmp_path / "run").run_id}
    assert table["feature_row"].null_count == len(readable)
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert rejects == [{"id": id_, "reason": "the file is truncated"} for id_ in BAD]
    lines = (tmp_path / "out" / "top.csv").read_text().splitlines()
    best = sorted(zip(-table["logit"].to_numpy(), readable, strict=True))[:5]
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(k), id_] for k, (_, id_) in enumerate(best, 1)]
    for name in ("top.png", "histogram.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 300
    assert not (tmp_path / "out" / "parts").exists()


def test_finished_job_reads_no_image_again(save_run, spec, cpu, make_source, tmp_path):
    run = find_model(save_run())
    source = make_source(10)
    run_job(run, source, spec, cpu, tmp_path / "out")
    reads = source.reads
    assert run_job(run, source, spec, cpu, tmp_path / "out")
    assert source.reads == reads


class Killed(BaseException):
    """Error that nothing catches, like a kill."""


def test_job_can_be_killed_at_every_write(save_run, spec, cpu, make_source, tmp_path, monkeypatch):
    run, spec = find_model(save_run()), replace(spec, features=True)
    source = make_source(30, unreadable=BAD)
    run_job(run, source, spec, cpu, tmp_path / "whole")
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

        out = tmp_path / f"killed{kills}"
        source.reads = 0
        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            run_job(run, source, spec, cpu, out)
            break
        except Killed:
            kills += 1
        monkeypatch.setattr(os, "replace", real)
        run_job(run, source, spec, cpu, out)
        assert tables(out) == tables(tmp_path / "whole")
    assert kills >= 10


def test_shares_of_a_job_array_give_the_tables_of_one_job(save_run, spec, cpu, make_source, tmp_path):
    run, source = find_model(save_run()), make_source(45, unreadable=BAD)
    run_job(run, source, spec, cpu, tmp_path / "whole")
    reads = []
    for share in ("2/3", "1/3", "3/3"):
        source.reads = 0
        done = run_job(run, source, replace(spec, shard=share), cpu, tmp_path / "shared")
        reads.append(source.reads)
        assert done == (share == "3/3")
        if not done:
            assert not (tmp_path / "shared" / "scores").exists()
    assert tables(tmp_path / "shared") == tables(tmp_path / "whole")
    assert reads[0] == reads[1] == 16
    assert not list((tmp_path / "shared").glob("top-*.csv"))


def test_features_are_stored_with_the_row_of_each_image(save_run, spec, cpu, make_source, tiny_network, tmp_path):
    import torch

    source = make_source(30, unreadable=BAD)
    run_job(find_model(save_run()), source, replace(spec, features=True), cpu, tmp_path / "out")
    rows = np.concatenate([np.load(file) for file in sorted((tmp_path / "out" / "features").glob("*.npy"))])
    table = pq.read_table(tmp_path / "out" / "scores")
    assert rows.shape == (len(table), 256)
    at = table["id"].to_pylist().index("im000026")
    (image,) = source.read(["im000026"])
    with torch.inference_mode():
        feature = tiny_network.eval().backbone(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
    got = rows[table["feature_row"][at].as_py()].astype(np.float32)
    np.testing.assert_allclose(got, feature / np.linalg.norm(feature), atol=2e-3)


def test_archive_without_a_readable_image_has_only_rejects(save_run, spec, cpu, make_source, tmp_path):
    source = make_source(5, unreadable=[f"im{i:06d}" for i in range(5)])
    assert run_job(find_model(save_run()), source, spec, cpu, tmp_path / "out")
    assert len(pq.read_table(tmp_path / "out" / "scores")) == 0
    assert len(pq.read_table(tmp_path / "out" / "rejects.parquet")) == 5


@pytest.mark.parametrize("bands", [["green", "red", "blue"], ["g", "r", "i"]])
def test_other_bands_are_an_error(save_run, spec, cpu, make_source, tmp_path, bands):
    with pytest.raises(DataError, match=f"{', '.join(bands)}.*red, green, blue"):
        run_job(find_model(save_run()), make_source(bands=bands), spec, cpu, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_units_are_an_error_if_both_are_known(save_run, spec, cpu, make_source, tmp_path):
    run = find_model(save_run(make_source(units="nJy")))
    with pytest.raises(DataError, match=r"mJy.*nJy"):
        run_job(run, make_source(units="mJy"), spec, cpu, tmp_path / "out")
    assert run_job(run, make_source(4), spec, cpu, tmp_path / "out")


def test_model_has_the_rendering_of_the_training(save_run, make_source):
    rendering = Rendering(curve="asinh", limits={"red": [0.0, 9.5]}, combine={"red": {"blue": 0.5}, "x": {"green": 2}})
    run = find_model(save_run(make_source(rendering=rendering)))
    assert run.input.rendering.as_dict() == rendering.as_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part_images": 9}, "part_images=8, not 9"),
        ({"batch_size": 2}, "batch_size=3, not 2"),
        ({"features": True}, "features=False, not True"),
    ],
)
def test_folder_of_another_job_is_an_error(save_run, spec, cpu, make_source, tmp_path, change, message):
    run, source = find_model(save_run()), make_source(20)
    run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run_job(run, source, replace(spec, **change), cpu, tmp_path / "out")
    with pytest.raises(ConfigError, match="fingerprint=array-20-32, not array-21-32"):
        run_job(run, make_source(21), replace(spec, shard="1/2"), cpu, tmp_path / "out")


def test_share_that_another_process_scores_is_an_error(save_run, spec, cpu, make_source, tmp_path):
    from filelock import FileLock

    run, source = find_model(save_run()), make_source(20)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock-1-2"),
        pytest.raises(StorageError, match="another process"),
    ):
        run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")


def test_corrupt_part_is_an_error_until_it_is_deleted(save_run, spec, cpu, make_source, tmp_path):
    run, source = find_model(save_run()), make_source(20)
    run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")
    part = tmp_path / "out" / "parts" / "000000.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(StorageError, match=r"000000\.parquet is corrupt"):
        run_job(run, source, replace(spec, shard="2/2"), cpu, tmp_path / "out")
    part.unlink()
    assert run_job(run, source, spec, cpu, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine", "spark"),
        ("backend", "tpu"),
        ("decode", "tpu"),
        ("batch_size", 0),
        ("part_images", 0),
        ("actors", 0),
        ("top", -1),
        ("shard", "0/2"),
        ("shard", "3/2"),
        ("shard", "one"),
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
    with pytest.raises(StorageError, match=r"cycle=7.* 1, 2"):
        find_model(run, 7)
    with pytest.raises(StorageError, match="nowhere"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="no finished cycle"):
        find_model(tmp_path / "empty")


def test_parts_cover_the_archive_once():
    for images, size in ((1, 8), (8, 8), (9, 8), (100, 7)):
        manifest = Manifest("r", "a", "f", images, size, 3, "torch", "fp32", "cpu", False)
        rows = [manifest.rows(part) for part in range(manifest.parts)]
        assert [i for start, stop in rows for i in range(start, stop)] == list(range(images))


def test_full_disk_leaves_the_finished_parts(save_run, spec, cpu, make_source, tmp_path, monkeypatch):
    import errno

    run, source = find_model(save_run()), make_source(30)
    real, writes = PartFolder.write, []

    def write(self, part, found):
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        writes.append(part)
        real(self, part, found)

    monkeypatch.setattr(PartFolder, "write", write)
    with pytest.raises(StorageError, match="the disk is full"):
        run_job(run, source, spec, cpu, tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 2
    monkeypatch.setattr(PartFolder, "write", real)
    assert run_job(run, source, spec, cpu, tmp_path / "out")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_scorer_is_built_once_and_the_choice_is_kept(save_run, spec, cpu, make_source, tmp_path, monkeypatch, backend):
    built, real = [], job.make_scorer

    def make_scorer(*args, **options):
        built.append(options["backend"])
        return real(*args, **options)

    monkeypatch.setattr(job, "make_scorer", make_scorer)
    model, source, spec = find_model(save_run()), make_source(20), replace(spec, backend=backend)
    run_job(model, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")
    assert built == [backend]
    assert run_job(model, source, replace(spec, shard="2/2"), cpu, tmp_path / "out")
    assert built == [backend, "torch"]


def test_backend_that_does_not_work_leaves_no_manifest(save_run, spec, cpu, make_source, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_has_compiler", lambda: False)
    model, source = find_model(save_run()), make_source(4)
    with pytest.raises(ConfigError, match=r"scoring\.backend=compile"):
        run_job(model, source, replace(spec, backend="compile"), cpu, tmp_path / "out")
    assert run_job(model, source, spec, cpu, tmp_path / "out")
