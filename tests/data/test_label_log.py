import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anomalymatch.data.label_log import FROM_FILE, LabelLog, export_csv, import_csv
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.types import Label

A, N, U, X = Label.ANOMALY, Label.NORMAL, Label.UNSURE, Label.ARTEFACT
IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@pytest.fixture
def log(tmp_path):
    log = LabelLog(tmp_path / "run" / "labels.sqlite")
    yield log
    log.close()


def test_an_event_has_annotator_time_cycle_and_score(log):
    log.append({"ä,\n\"'": A, "b": U}, annotator="Ada", cycle=3, scores={"ä,\n\"'": 0.75})
    first, second = events = log.events()
    assert (first.id, first.label, first.annotator, first.cycle, first.score) == ("ä,\n\"'", A, "Ada", 3, 0.75)
    assert (second.id, second.label, second.score, second.undoes) == ("b", U, None, None)
    assert timedelta(0) <= datetime.now(UTC) - first.at < timedelta(minutes=1)
    assert log.last_cycle() == 3
    assert log.events(after=first.sequence) == [second]
    assert log.events(after=second.sequence) == []
    reopened = LabelLog(log.path)
    assert reopened.events() == events
    reopened.close()


def test_the_last_event_of_an_image_is_its_label(log):
    log.append({"a": A, "b": N}, annotator="Ada", cycle=0)
    log.append({"a": X}, annotator="Bob", cycle=1)
    log.append({"b": None}, annotator="Ada", cycle=2)
    assert log.current() == {"a": X}
    assert log.current(until_cycle=1) == {"b": N, "a": X}
    assert log.current(until_cycle=0) == {"a": A, "b": N}


def test_undo_reverts_a_whole_call(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    log.append({"a": N, "b": N, "c": N}, annotator="Ada", cycle=0)
    log.append({"d": N}, annotator="Bob", cycle=0)
    assert log.undo(annotator="Ada") == ["a", "b", "c"]
    assert log.current() == {"a": A, "d": N}


def test_new_labels_are_those_that_the_file_changed(log):
    log.append({"a": A, "b": N, "c": N}, annotator=FROM_FILE, cycle=0)
    log.append({"a": N}, annotator="Ada", cycle=1)
    assert log.new_labels({"a": A, "b": U, "c": N, "d": A}) == {"b": U, "d": A}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.sampled_from([A, N, None]), st.sampled_from("PQ")),
        st.tuples(st.just("undo"), st.none(), st.sampled_from("PQ")),
    ),
    max_size=25,
)


@given(EVENTS)
@settings(max_examples=60, deadline=None)
def test_undone_events_have_no_effect(events):
    log, twin, before = LabelLog(Path(":memory:")), [], []
    assert (log.current(), log.last_cycle()) == ({}, None)
    for id_, label, who in events:
        if id_ == "undo":
            own = [place for place, event in enumerate(twin) if event[2] == who]
            assert log.undo(annotator=who) == ([twin.pop(own[-1])[0]] if own else [])
        else:
            log.append({id_: label}, annotator=who, cycle=1)
            twin.append((id_, label, who))
        events = log.events()
        assert events[: len(before)] == before, "events are only appended"
        before, expected = events, {}
        for seen, said, _ in twin:
            expected[seen] = said
        assert log.current() == {key: value for key, value in expected.items() if value is not None}
    log.close()


def test_a_batch_is_all_or_none(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    with pytest.raises(ValueError, match="nonsense"):
        log.append({"b": N, "c": "nonsense"}, annotator="Ada", cycle=0)
    with pytest.raises(StorageError):
        log.append({"b": N, None: A}, annotator="Ada", cycle=0)
    assert log.current() == {"a": A}
    log.append({"d": N}, annotator="Ada", cycle=0)  # and the log still works
    assert log.current() == {"a": A, "d": N}


KILLED = """
import sys
import threading
from pathlib import Path
from anomalymatch.data.label_log import LabelLog
from anomalymatch.types import Label
log = LabelLog(Path(sys.argv[1]))
for batch in range(100_000):
    log.append({f"{batch}/{i}": Label.NORMAL for i in range(7)}, annotator="Ada", cycle=batch)
    print(batch, flush=True)
"""


def test_a_kill_during_appends_loses_no_finished_call(tmp_path):
    path = tmp_path / "labels.sqlite"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 20:
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().splitlines() if line]
    log = LabelLog(path)
    labels = log.current()
    batches = {int(id_.split("/")[0]) for id_ in labels}
    assert batches == set(range(len(batches)))
    assert len(labels) == 7 * len(batches)  # no half batch
    assert len(batches) >= max(told, default=20) + 1
    log.append({"new": A}, annotator="Ada", cycle=0)
    assert log.current()["new"] == A
    log.close()


def test_two_processes_write_to_one_log(tmp_path):
    path = tmp_path / "labels.sqlite"
    code = KILLED.replace("100_000", "30").replace('f"{batch}/{i}"', 'f"{sys.argv[2]}/{batch}/{i}"')
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], stdout=subprocess.DEVNULL) for name in "xy"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    log = LabelLog(path)
    assert len(log.current()) == 2 * 30 * 7
    log.close()


def test_it_waits_for_another_process_that_creates_the_log(tmp_path):
    """The other one writes before the file is write-ahead; for the switch SQLite itself does not wait."""
    path = tmp_path / "labels.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    done.start()
    log = LabelLog(path)  # raises if it does not wait
    done.join()
    assert log._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    log.close()
    other.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, it is a text of some length\n" * 40, b"SQLite format 3\0" + b"\xff" * 4000]
)
def test_a_corrupt_log(tmp_path, content):
    path = tmp_path / "labels.sqlite"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"labels\.sqlite.*labels\.csv"):
        LabelLog(path)
    assert path.read_bytes() == content


def test_a_log_that_becomes_corrupt(log):
    log.append({f"{i}": A for i in range(500)}, annotator="Ada", cycle=0)
    log._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(log.path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    log.path.write_bytes(bytes(data))
    again = sqlite3.connect(log.path)
    again.close()
    fresh = LabelLog(log.path)
    with pytest.raises(StorageError, match=r"labels\.sqlite"):
        fresh.current()
    fresh.close()


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        LabelLog(tmp_path / "file" / "labels.sqlite")
    (tmp_path / "labels.sqlite").mkdir()
    with pytest.raises(StorageError, match=r"labels\.sqlite"):
        LabelLog(tmp_path / "labels.sqlite")


@given(st.dictionaries(IDS, st.sampled_from(list(Label)), min_size=1))
@example(dict.fromkeys(("a\rb", "\rx", "a\r\nb", "a,b", 'a"b', '"', " a ", "a\nb", "\ufeffa", "a\x00b", "银河"), A))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_round_trip(tmp_path, labels):
    export_csv(labels, tmp_path / "labels.csv")
    assert import_csv(tmp_path / "labels.csv", labels.keys()) == labels


def test_csv_format_of_anomalymatch(tmp_path):
    export_csv({"a.png": A, "dir/b, c.png": X}, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == b'filename,label\na.png,anomaly\n"dir/b, c.png",artefact\n'


def test_csv_with_other_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("filename,label\na,anomaly\nb,cat\nc,Odd\nd,Normal\n")
    with pytest.raises(LabelError, match=r"2 labels.* anomaly, normal, unsure, artefact.* b,cat; c,Odd"):
        import_csv(path, {"a", "b", "c", "d"})
    with pytest.raises(LabelError, match="d,Normal"):
        import_csv(path, {"a", "b", "c"})
    path.write_text("filename,label\na,Anomaly\nd, NORMAL\n")
    assert import_csv(path, {"a", "d"}) == {"a": A, "d": N}
