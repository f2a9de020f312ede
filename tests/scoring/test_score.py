"""Command `python -m anomalymatch.score`."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from anomalymatch import score as module
from anomalymatch.data.rendering import FITS, Rendering
from anomalymatch.data.stream import resize, to_tensor
from anomalymatch.errors import ConfigError


@pytest.fixture
def archive(image_folder):
    return image_folder(20, ["damaged.jpg"])


@pytest.fixture
def call(call_in_folder):
    return call_in_folder(module.main)


def test_folder_is_scored_and_the_top_is_shown(call, save_run, archive, tmp_path):
    run = save_run()
    words = (f"run={run}", f"data={archive}", "scoring.backend=torch", "inference.device=cpu")
    code, out, err = call(*words)
    assert (code, out) == (0, ""), err
    folder = tmp_path / "work" / "scores" / "run-archive"
    top = (folder / "top.csv").read_text().splitlines()
    assert len(top) == 21
    assert all(line.split(",")[1] in err for line in top[1:])
    assert pq.read_table(folder / "rejects.parquet")["id"].to_pylist() == ["damaged.jpg"]
    assert len(pq.read_table(folder / "scores")) == 20
    code, _, again = call(*words)
    assert code == 0
    assert "complete" in again


def test_wrong_key_is_an_error_with_the_right_one():
    with pytest.raises(ConfigError, match=r"there is no key 'scoring.tpo': did you mean scoring.top\?"):
        module.score("run=any", "data=.", "scoring.tpo=3")


def test_archive_gets_the_stretch_of_the_training(save_run, make_source, tmp_path):
    """With the interval of the training, a 16-bit archive that is twice as bright has other scores."""
    limits = {name: [0.0, 60_000.0] for name in ("red", "green", "blue")}
    run = save_run(make_source(rendering=Rendering(limits=limits)))
    logits = {}
    for factor in (1, 2):
        folder = tmp_path / f"deep{factor}"
        folder.mkdir()
        values = np.random.default_rng(0).integers(0, 30_000, (32, 32), dtype=np.uint16) * factor
        Image.fromarray(values.astype(np.uint16)).save(folder / "a.png")
        words = (f"run={run}", "dataset=folder", f"data={folder}", "scoring.backend=torch", "inference.device=cpu")
        output = module.score(*words, f"output={tmp_path / f'out{factor}'}")
        assert output == tmp_path / f"out{factor}"
        logits[factor] = pq.read_table(output / "scores")["logit"][0].as_py()
    assert abs(logits[1] - logits[2]) > 1e-3


@pytest.mark.parametrize("fit", FITS)
def test_checkpoint_keeps_the_fit_of_images_that_are_not_square(save_run, make_source, tiny_network, tmp_path, fit):
    run = save_run(make_source(rendering=Rendering(fit=fit)))
    image = np.random.default_rng(0).integers(0, 256, (24, 60, 3), dtype=np.uint8)
    (tmp_path / "wide").mkdir()
    Image.fromarray(image).save(tmp_path / "wide" / "a.png")
    words = ("scoring.backend=torch", "inference.device=cpu", "inference.precision=fp32", f"output={tmp_path / 'out'}")
    scores = module.score(f"run={run}", "dataset=folder", f"data={tmp_path / 'wide'}", *words) / "scores"
    with torch.inference_mode():
        normal, anomaly = tiny_network.eval()(to_tensor([resize(image, 32, fit)]))[0].tolist()
    assert pq.read_table(scores)["logit"][0].as_py() == pytest.approx(anomaly - normal, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=nowhere"], "run=VALUE"),
        (["run=nowhere", "data=."], "run=nowhere"),
        (["run={run}"], "data.root=PATH"),
        (["run={run}", "data=/nowhere/at/all"], "/nowhere/at/all"),
        (["run={run}", "data={archive}", "cycle=9"], "cycle=9"),
        (["run={run}", "data={archive}", "scoring.shard=9/2"], "scoring.shard is '9/2'"),
        (["run={run}", "data={archive}", "dataset=folder", "dataset.source.channels=1"], "grey"),
        (["run={run}", "data={archive}", "output=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_wrong_options_get_one_line(call, save_run, archive, words, message):
    run = save_run()
    assert message in call(*(word.format(run=run, archive=archive) for word in words)).error_line


def test_novelty_run_has_no_network_that_scores(call, archive, tmp_path):
    folder = tmp_path / "run" / "cycles" / "01"
    folder.mkdir(parents=True)
    (folder / "novelty.safetensors").write_bytes(b"")
    outcome = call(f"run={tmp_path / 'run'}", "dataset=folder", f"data.root={archive}")
    assert "distances to stored images" in outcome.error_line
