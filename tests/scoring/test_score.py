"""The command, as a user meets it."""

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anomalymatch import score as module
from anomalymatch.errors import ConfigError
from anomalymatch.scoring.finish import read_scores


@pytest.fixture
def archive(make_source, tmp_path):
    """Twenty images in a folder, one of them damaged."""
    source = make_source(20)
    (tmp_path / "archive").mkdir()
    for id_, image in zip(source.ids, source.read(source.ids), strict=True):
        Image.fromarray(image).save(tmp_path / "archive" / f"{id_}.png")
    (tmp_path / "archive" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    return tmp_path / "archive"


@pytest.fixture
def call(call_main, monkeypatch, tmp_path):
    """Call `python -m anomalymatch.score` with these words, in an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return partial(call_main, module.main)


def test_a_folder_is_ranked_and_the_list_is_shown(call, save_run, archive, tmp_path):
    run = save_run()
    words = (f"run={run}", f"data={archive}", "scoring.backend=torch", "inference.device=cpu")
    code, out, err = call(*words)
    assert (code, out) == (0, ""), err
    folder = tmp_path / "work" / "scores" / "run-archive"
    top = (folder / "top.csv").read_text().splitlines()
    assert len(top) == 21
    assert all(line.split(",")[1] in err for line in top[1:])
    assert pq.read_table(folder / "rejects.parquet")["id"].to_pylist() == ["damaged.jpg"]
    assert len(read_scores(folder)) == 20
    code, _, again = call(*words)
    assert code == 0
    assert "is complete already" in again


def test_the_python_form_gives_the_folder(save_run, archive, tmp_path):
    words = [f"run={save_run()}", f"data={archive}", f"output={tmp_path / 'out'}", "inference.device=cpu"]
    folder = module.score(*words, "scoring.backend=torch", "scoring.top=3")
    assert folder == tmp_path / "out"
    assert len((folder / "top.csv").read_text().splitlines()) == 4
    with pytest.raises(ConfigError, match=r"there is no key 'scoring.tpo': did you mean scoring.top\?"):
        module.score(*words, "scoring.tpo=3")


def test_the_stretch_of_the_training_is_used(save_run, make_source, tmp_path):
    """Deep images: with the interval of the training, an archive that is twice as bright has other scores."""
    from anomalymatch.data.rendering import Rendering

    limits = {name: [0.0, 60_000.0] for name in ("red", "green", "blue")}
    run = save_run(make_source(rendering=Rendering(limits=limits)))
    logits = {}
    for factor in (1, 2):
        folder = tmp_path / f"deep{factor}"
        folder.mkdir()
        values = np.random.default_rng(0).integers(0, 30_000, (32, 32), dtype=np.uint16) * factor
        Image.fromarray(values.astype(np.uint16)).save(folder / "a.png")
        words = (f"run={run}", "dataset=folder", f"data={folder}", "scoring.backend=torch", "inference.device=cpu")
        logits[factor] = read_scores(module.score(*words, f"output={tmp_path / f'out{factor}'}"))["logit"][0].as_py()
    assert abs(logits[1] - logits[2]) > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=nowhere"], "run has no default: set run=VALUE"),
        (["run=nowhere", "data=."], "run=nowhere: there is no such run folder or .safetensors file"),
        (["run={run}"], "needs data.root=PATH"),
        (["run={run}", "data=/nowhere/at/all"], "/nowhere/at/all"),
        (["run={run}", "data={archive}", "cycle=9"], "there is no cycle=9 with weights, choose one of 1"),
        (["run={run}", "data={archive}", "scoring.shard=9/2"], "scoring.shard is '9/2'"),
        (["run={run}", "data={archive}", "dataset=folder", "dataset.source.channels=1"], "has the bands grey"),
        (["run={run}", "data={archive}", "output=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_what_is_wrong_gets_one_line(call, save_run, archive, words, message):
    run = save_run()
    code, out, err = call(*(word.format(run=run, archive=archive) for word in words))
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert "Error executing" not in err
    *before, line = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "error" not in "".join(before)


def test_a_run_without_a_network_that_scores_says_so(call, archive, tmp_path):
    folder = tmp_path / "run" / "cycles" / "01"
    folder.mkdir(parents=True)
    (folder / "novelty.safetensors").write_bytes(b"")
    code, _, err = call(f"run={tmp_path / 'run'}", "dataset=folder", f"data.root={archive}")
    assert code == 1
    assert "its algorithm ranks by distances to stored images" in " ".join(err.split())
