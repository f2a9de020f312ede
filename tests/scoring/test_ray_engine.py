"""Ray engine: the same scores as the local engine, also after a worker is killed."""

import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import ConfigError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture
def archive(image_folder):
    """Folder of images, which Ray's processes can open; two of them are damaged."""
    return FolderSource(image_folder(60, ["im000007.png", "im000041.png"]))


@pytest.fixture(scope="module")
def cluster():
    """Ray cluster of this machine with three cores, shared by all tests here: starting one takes seconds."""
    import ray

    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def score_actors():
    """Return the process ids of the scoring actors; Ray names its processes after their class."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has ended meanwhile
            if path.read_bytes().startswith(b"ray::") and b"_Score" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def assert_same_scores(one, other):
    """The same ids in the same order; the last bit of a logit depends on the number of threads."""
    first, second = pq.read_table(one / "scores"), pq.read_table(other / "scores")
    assert first["id"].to_pylist() == second["id"].to_pylist()
    for column in ("logit", "score"):
        np.testing.assert_allclose(first[column].to_numpy(), second[column].to_numpy(), atol=1e-6)
    tops = [[line.split(",")[1] for line in (folder / "top.csv").read_text().splitlines()] for folder in (one, other)]
    assert tops[0] == tops[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the actors in /proc")
def test_two_actors_give_the_scores_of_the_local_engine_though_one_is_killed(
    cluster, run_scoring, archive, tmp_path, monkeypatch
):
    from anomalymatch.scoring import ray_engine

    changes = {"part_images": 6, "features": True}
    run_scoring(archive, "local", **changes)
    killed = []
    real = ray_engine.PartFolder.read

    def read_and_kill(self, number, *columns):
        """Kill one of the two actors when the driver reads the third finished part."""
        if len(list((tmp_path / "ray" / "parts").glob("*"))) >= 3 and not killed:
            victim = score_actors()[0]
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)
        return real(self, number, *columns)

    monkeypatch.setattr(ray_engine.PartFolder, "read", read_and_kill)
    assert run_scoring(archive, "ray", engine="ray", actors=2, **changes)
    assert killed
    for name in ("rejects.parquet", "summary.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert_same_scores(tmp_path / "ray", tmp_path / "local")
    rows = [
        np.concatenate([np.load(file) for file in sorted((tmp_path / engine / "features").glob("*.npy"))])
        for engine in ("local", "ray")
    ]
    np.testing.assert_allclose(*rows, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_continues_a_job_of_the_local_engine(cluster, run_scoring, archive, tmp_path):
    run_scoring(archive, "whole", part_images=20)
    run_scoring(archive, "mixed", part_images=20, shard="2/3")
    assert run_scoring(archive, "mixed", part_images=20, engine="ray", actors=1)
    assert_same_scores(tmp_path / "mixed", tmp_path / "whole")


def test_missing_ray_is_an_error_with_the_package(run_scoring, make_source, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'scoring.engine=ray needs: pip install "anomalymatch\[ray\]"'):
        run_scoring(make_source(4), engine="ray")
