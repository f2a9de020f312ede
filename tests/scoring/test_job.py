"""A whole scoring job: what it writes, what a kill costs, what shares of a job array give together."""

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
from anomalymatch.scoring.finish import read_scores
from anomalymatch.scoring.job import run_job
from anomalymatch.scoring.parts import Manifest, PartFolder
from anomalymatch.scoring.trained import find_trained

BAD = ["im000003", "im000016", "im000017", "im000018", "im000019", "im000020", "im000021", "im000022", "im000023"]
"""One in the first part, and all of the third."""


def direct_logits(network, source, ids):
    """The slow twin: one image after the other, no folding, no batches."""
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
    """All that a finished job says, without pictures and times."""
    return (
        read_scores(folder).to_pylist(),
        pq.read_table(folder / "rejects.parquet").to_pylist(),
        (folder / "top.csv").read_text(),
        json.loads((folder / "summary.json").read_text()),
    )


def test_every_image_is_scored_once_in_the_order_of_the_archive(
    save_run, spec, cpu, make_source, tiny_network, tmp_path
):
    source = make_source(50, unreadable=BAD)
    assert run_job(find_trained(save_run()), source, spec, cpu, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "scores")
    readable = [id_ for id_ in source.ids if id_ not in BAD]
    assert table["id"].to_pylist() == readable
    expected = direct_logits(tiny_network, source, readable)
    np.testing.assert_allclose(table["logit"].to_numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(table["score"].to_numpy(), expit(expected), atol=1e-5)
    ranks = rankdata(table["logit"].to_numpy(), method="average")
    np.testing.assert_allclose(table["quantile"].to_numpy(), (ranks - 0.5) / len(readable))
    assert set(table["run"].to_pylist()) == {find_trained(tmp_path / "run").run_id}
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


def test_what_is_finished_is_not_scored_again(save_run, spec, cpu, make_source, tmp_path):
    run = find_trained(save_run())
    source = make_source(10)
    run_job(run, source, spec, cpu, tmp_path / "out")
    reads = source.reads
    assert run_job(run, source, spec, cpu, tmp_path / "out")
    assert source.reads == reads


class Killed(BaseException):
    """Like a kill, nothing catches it."""


@pytest.mark.parametrize("features", [False, True])
def test_a_job_can_be_killed_at_every_write(save_run, spec, cpu, make_source, tmp_path, monkeypatch, features):
    run, spec = find_trained(save_run()), replace(spec, features=features)
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


def test_shares_of_a_job_array_give_the_same_as_one_job(save_run, spec, cpu, make_source, tmp_path):
    run, source = find_trained(save_run()), make_source(45, unreadable=BAD)
    run_job(run, source, spec, cpu, tmp_path / "whole")
    reads = []
    for share in ("2/3", "1/3", "3/3"):
        source.reads = 0
        done = run_job(run, source, replace(spec, shard=share), cpu, tmp_path / "shared")
        reads.append(source.reads)
        assert done == (share == "3/3")
        if not done:
            with pytest.raises(StorageError, match="holds no finished scores"):
                read_scores(tmp_path / "shared")
    assert tables(tmp_path / "shared") == tables(tmp_path / "whole")
    assert reads[0] == reads[1] == 16
    assert not list((tmp_path / "shared").glob("top-*.csv"))


def test_features_are_kept_with_the_row_of_each_image(save_run, spec, cpu, make_source, tiny_network, tmp_path):
    import torch

    source = make_source(30, unreadable=BAD)
    run_job(find_trained(save_run()), source, replace(spec, features=True), cpu, tmp_path / "out")
    rows = np.concatenate([np.load(file) for file in sorted((tmp_path / "out" / "features").glob("*.npy"))])
    table = pq.read_table(tmp_path / "out" / "scores")
    assert rows.shape == (len(table), 256)
    at = table["id"].to_pylist().index("im000026")
    (image,) = source.read(["im000026"])
    with torch.inference_mode():
        feature = tiny_network.eval().backbone(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
    got = rows[table["feature_row"][at].as_py()].astype(np.float32)
    np.testing.assert_allclose(got, feature / np.linalg.norm(feature), atol=2e-3)


def test_an_archive_without_one_readable_image_is_only_rejects(save_run, spec, cpu, make_source, tmp_path):
    source = make_source(5, unreadable=[f"im{i:06d}" for i in range(5)])
    assert run_job(find_trained(save_run()), source, spec, cpu, tmp_path / "out")
    assert len(read_scores(tmp_path / "out")) == 0
    assert len(pq.read_table(tmp_path / "out" / "rejects.parquet")) == 5


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (["green", "red", "blue"], "the same in another order than those of the training, red, green, blue"),
        (["g", "r", "i"], "has the bands g, r, i, other ones than those of the training, red, green, blue"),
    ],
)
def test_other_bands_are_refused(save_run, spec, cpu, make_source, tmp_path, bands, message):
    with pytest.raises(DataError, match=message):
        run_job(find_trained(save_run()), make_source(bands=bands), spec, cpu, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_units_are_refused_where_both_are_known(save_run, spec, cpu, make_source, tmp_path):
    run = find_trained(save_run(make_source(units="nJy")))
    with pytest.raises(DataError, match="array is in mJy, but the training was in nJy"):
        run_job(run, make_source(units="mJy"), spec, cpu, tmp_path / "out")
    assert run_job(run, make_source(4), spec, cpu, tmp_path / "out")


def test_the_rendering_of_the_training_is_kept(save_run, make_source):
    rendering = Rendering(curve="asinh", limits={"red": [0.0, 9.5]}, combine={"red": {"blue": 0.5}, "x": {"green": 2}})
    run = find_trained(save_run(make_source(rendering=rendering)))
    assert run.input.rendering.as_dict() == rendering.as_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part_images": 9}, "part_images=8, not 9"),
        ({"batch_size": 2}, "batch_size=3, not 2"),
        ({"features": True}, "features=False, not True"),
    ],
)
def test_a_folder_with_another_job_is_refused(save_run, spec, cpu, make_source, tmp_path, change, message):
    run, source = find_trained(save_run()), make_source(20)
    run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run_job(run, source, replace(spec, **change), cpu, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"fingerprint=array-20-32, not array-21-32.*choose another output folder"):
        run_job(run, make_source(21), replace(spec, shard="1/2"), cpu, tmp_path / "out")


def test_a_share_that_is_being_scored_is_refused(save_run, spec, cpu, make_source, tmp_path):
    from filelock import FileLock

    run, source = find_trained(save_run()), make_source(20)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock-1-2"),
        pytest.raises(StorageError, match="another process is scoring this share"),
    ):
        run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")


def test_a_corrupt_part_says_what_to_do(save_run, spec, cpu, make_source, tmp_path):
    run, source = find_trained(save_run()), make_source(20)
    run_job(run, source, replace(spec, shard="1/2"), cpu, tmp_path / "out")
    part = tmp_path / "out" / "parts" / "000000.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(StorageError, match="is corrupt: delete it and start the same command again"):
        run_job(run, source, replace(spec, shard="2/2"), cpu, tmp_path / "out")
    part.unlink()
    assert run_job(run, source, spec, cpu, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "spark"}, "scoring.engine is 'spark': choose one of local, ray"),
        ({"decode": "tpu"}, "scoring.decode is 'tpu': choose one of cpu, gpu"),
        ({"decode": "gpu", "engine": "ray"}, "scoring.decode=gpu is for scoring.engine=local"),
        ({"batch_size": 0}, "scoring.batch_size is 0: it must be at least 1"),
        ({"part_images": 0}, "scoring.part_images is 0"),
        ({"top": -1}, "scoring.top is -1: it cannot be negative"),
        ({"shard": "0/2"}, "scoring.shard is '0/2': it must be i/n with i from 1 to n"),
        ({"shard": "3/2"}, "scoring.shard is '3/2'"),
        ({"shard": "one"}, "scoring.shard is 'one'"),
    ],
)
def test_wrong_values_are_refused(spec, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(spec, **change)


def test_weights_are_those_of_the_last_cycle_or_the_one_asked_for(save_run, tmp_path):
    run = save_run()
    save_run(cycle=2)
    assert find_trained(run).weights.parent.name == "02"
    assert find_trained(run, 1).weights.parent.name == "01"
    assert find_trained(run, 1).run_id.startswith("run/01-")
    with pytest.raises(StorageError, match=r"there is no cycle=7 with weights, choose one of 1, 2"):
        find_trained(run, 7)
    with pytest.raises(StorageError, match="there is no such run folder"):
        find_trained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="no cycle of it is finished"):
        find_trained(tmp_path / "empty")


def test_parts_cover_the_archive_once():
    for images, size in ((1, 8), (8, 8), (9, 8), (100, 7)):
        manifest = Manifest("r", "a", "f", images, size, 3, "torch", "fp32", "cpu", False)
        rows = [manifest.rows(part) for part in range(manifest.parts)]
        assert [i for start, stop in rows for i in range(start, stop)] == list(range(images))


def test_a_full_disk_leaves_the_finished_parts(save_run, spec, cpu, make_source, tmp_path, monkeypatch):
    import errno

    run, source = find_trained(save_run()), make_source(30)
    real, writes = PartFolder.write, []

    def write(self, number, part):
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        writes.append(number)
        real(self, number, part)

    monkeypatch.setattr(PartFolder, "write", write)
    with pytest.raises(StorageError, match="the disk is full: free some space"):
        run_job(run, source, spec, cpu, tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 2
    monkeypatch.setattr(PartFolder, "write", real)
    assert run_job(run, source, spec, cpu, tmp_path / "out")
