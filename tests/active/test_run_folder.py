import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from anomalymatch.active.run_folder import LOCK, METRICS, SCORES, LiveSteps, RunFolder, RunReader, to_csv, to_json
from anomalymatch.errors import StorageError
from anomalymatch.ranking import Ranking


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


def finish(folder, number, **row):
    with folder.write_cycle(number) as path:
        (path / METRICS).write_text(to_json({"cycle": number, **row}))


def test_cycles_count_up_to_the_first_gap(folder):
    for number in (1, 2, 4, 12):
        finish(folder, number)
    (folder.path / "cycles" / ".03.x.part").mkdir()
    (folder.path / "cycles" / "notes").mkdir()
    assert folder.finished_cycles() == 2
    assert [row["cycle"] for row in folder.rows()] == [1, 2]
    for number in (3, *range(5, 102)):
        folder.cycle(number).mkdir(parents=True, exist_ok=True)
    assert folder.finished_cycles() == 101


def test_a_cycle_appears_complete_or_not_at_all(folder):
    def fail():
        with folder.write_cycle(1) as path:
            (path / METRICS).write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folder.finished_cycles() == 0
    assert list((folder.path / "cycles").iterdir()) == []


def test_undefined_numbers_survive_as_null(folder):
    finish(folder, 1, ap=math.nan, auroc=0.5, labels=7)
    assert json.loads((folder.cycle(1) / METRICS).read_text()) == {"cycle": 1, "ap": None, "auroc": 0.5, "labels": 7}
    row = folder.rows()[0]
    assert math.isnan(row["ap"])
    assert (row["auroc"], row["labels"]) == (0.5, 7)
    folder.write_metrics()
    assert (folder.path / "metrics.csv").read_text() == "cycle,ap,auroc,labels\n1,nan,0.5,7\n"


@pytest.mark.parametrize("content", [None, "", "{", "\x00\x00", "[1, 2]"])
def test_corrupt_metrics_are_reported_in_one_line(folder, content):
    finish(folder, 1)
    path = folder.cycle(1) / METRICS
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StorageError, match=r"cycles/01/metrics\.json is (damaged|missing)") as error:
        folder.rows()
    assert "\n" not in str(error.value)


def test_scores_are_read_back(folder):
    with folder.write_cycle(1) as path:
        Ranking(["a", "b"], np.array([1.5, -2.0])).write(path / SCORES)
    assert folder.ranking(1).top(2) == ["a", "b"]
    assert folder.ranking(1).logits.tolist() == [1.5, -2.0]
    (folder.cycle(1) / SCORES).write_bytes(b"PAR1")
    assert folder.ranking(1).top(2) == ["a", "b"]  # read once
    with pytest.raises(StorageError, match=r"scores\.parquet"):
        RunReader(folder.path).ranking(1)


def test_a_folder_that_another_holds_is_refused_until_it_is_closed(folder, tmp_path):
    with pytest.raises(StorageError, match="another process is working in"):
        RunFolder(folder.path)
    folder.close()
    code = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]):\n    print(flush=True)\n    sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "run" / LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(StorageError, match="another process is working in"):
            RunFolder(tmp_path / "run")
        assert RunReader(tmp_path / "run").busy()
        other.stdin.close()
    assert not RunReader(tmp_path / "run").busy()


def test_csv_has_the_union_of_the_columns():
    assert to_csv([{"a": 1, "b": math.nan}, {"a": 2, "c": "x,y"}]) == 'a,b,c\n1,nan,\n2,,"x,y"\n'
    assert to_csv([]) == "\n"


def test_live_steps_of_this_process_are_written_and_logged_at_once(tmp_path):
    logged = []
    live = LiveSteps(tmp_path / "live.jsonl", 2, logged.append)
    live({"step": 0.0, "loss": 0.5})
    assert logged == [{"step": 0.0, "loss": 0.5}]
    assert RunReader(tmp_path).live_steps() == [{"cycle": 2, "step": 0.0, "loss": 0.5}]
    assert live.finish() == logged
    assert len(logged) == 1


def test_live_steps_of_another_process_are_logged_at_the_end(tmp_path):
    logged = []
    live = LiveSteps(tmp_path / "live.jsonl", 2, logged.append)
    pickle.loads(pickle.dumps(live))({"step": 0.0, "loss": math.nan})
    assert RunReader(tmp_path).live_steps() == [{"cycle": 2, "step": 0.0, "loss": None}]
    assert logged == []
    (row,) = live.finish()
    assert math.isnan(row["loss"])
    assert logged == [row]
