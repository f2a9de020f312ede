import shutil
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

from anomalymatch.active.run_folder import RunFolder
from anomalymatch.data import label_log, restore
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
    assert log.undo(annotator="Ada") == {"a": N, "b": N, "c": N}
    assert log.current() == {"a": A, "d": N}


def test_redo_reverts_an_undo_until_the_annotator_labels_again(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    log.append({"a": N, "b": N}, annotator="Ada", cycle=0)
    assert log.redo(annotator="Ada") == {}
    log.undo(annotator="Ada")
    log.undo(annotator="Ada")
    log.append({"c": U}, annotator="Bob", cycle=0)
    assert log.redo(annotator="Bob") == {}
    assert log.redo(annotator="Ada") == {"a": A}
    assert log.redo(annotator="Ada") == {"a": N, "b": N}
    assert log.redo(annotator="Ada") == {}
    assert log.current() == {"a": N, "b": N, "c": U}
    assert log.undo(annotator="Ada") == {"a": N, "b": N}
    log.append({"d": X}, annotator="Ada", cycle=0)
    assert log.redo(annotator="Ada") == {}
    assert log.current() == {"a": A, "c": U, "d": X}


def test_a_repeated_key_has_no_effect(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    for _ in range(2):
        log.append({"b": N, "c": N}, annotator="Ada", cycle=0, key="1")
        log.append({"d": N}, annotator="Bob", cycle=0, key="1")
    other = LabelLog(log.path)
    other.append({"b": U}, annotator="Ada", cycle=0, key="1")
    assert (log.undo(annotator="Ada", key="2"), other.undo(annotator="Ada", key="2")) == ({"b": N, "c": N}, {})
    assert (log.redo(annotator="Ada", key="3"), other.redo(annotator="Ada", key="3")) == ({"b": N, "c": N}, {})
    assert log.current() == other.current() == {"a": A, "b": N, "c": N}
    other.close()
    with pytest.raises(StorageError):
        log.append({"e": N, None: A}, annotator="Ada", cycle=0, key="4")
    log.append({"e": A}, annotator="Ada", cycle=0, key="4")  # nothing was stored before
    assert log.current()["e"] == A


def test_new_labels_are_those_that_the_file_changed(log):
    log.append({"a": A, "b": N, "c": N}, annotator=FROM_FILE, cycle=0)
    log.append({"a": N}, annotator="Ada", cycle=1)
    assert log.new_labels({"a": A, "b": U, "c": N, "d": A}) == {"b": U, "d": A}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.sampled_from([A, N, None]), st.sampled_from("PQ")),
        st.tuples(st.sampled_from(["undo", "redo"]), st.none(), st.sampled_from("PQ")),
    ),
    max_size=30,
)


@given(EVENTS)
@settings(max_examples=60, deadline=None)
def test_undone_events_have_no_effect(events):
    log, twin, before = LabelLog(Path(":memory:")), [], []
    valid, redo = [], {"P": [], "Q": []}
    assert (log.current(), log.last_cycle()) == ({}, None)
    for id_, label, who in events:
        if id_ == "undo":
            own = [place for place, event in enumerate(twin) if event[2] == who and valid[place]]
            assert log.undo(annotator=who) == dict(twin[place][:2] for place in own[-1:])
            if own:
                valid[own[-1]] = False
                redo[who].append(own[-1])
        elif id_ == "redo":
            last = [redo[who].pop()] if redo[who] else []
            assert log.redo(annotator=who) == dict(twin[place][:2] for place in last)
            for place in last:
                valid[place] = True
        else:
            log.append({id_: label}, annotator=who, cycle=1)
            twin.append((id_, label, who))
            valid.append(True)
            redo[who].clear()
        events = log.events()
        assert events[: len(before)] == before, "events are only appended"
        before, expected = events, {}
        for (seen, said, _), counts in zip(twin, valid, strict=True):
            if counts:
                expected[seen] = said
        assert log.current() == {key: value for key, value in expected.items() if value is not None}
    log.close()


def test_a_batch_is_all_or_none(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    with pytest.raises(LabelError, match="nonsense"):
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


def test_an_undo_reverts_one_call_if_the_clock_stands_still(log, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(2030, 1, 1, tzinfo=zone)

    monkeypatch.setattr(label_log, "datetime", Clock)
    for labels in ({"a": A}, {"a": N, "b": N}, {"c": A}):
        log.append(labels, annotator="Ada", cycle=0)
    assert [event.action for event in log.events()] == [1, 2, 2, 4]
    assert log.undo(annotator="Ada") == {"c": A}
    assert log.undo(annotator="Ada") == {"a": N, "b": N}
    assert log.current() == {"a": A}


@pytest.mark.parametrize(
    "content", [b"this is no database, it is a text of some length\n" * 40, b"SQLite format 3\0" + b"\xff" * 4000]
)
def test_a_corrupt_log(tmp_path, content):
    path = tmp_path / "labels.sqlite"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"labels\.sqlite.*labels\.csv"):
        LabelLog(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("at", "2030-99-01"), ("at", "today\x1b[2J\n"), ("at", b"\xff"), ("label", "cat"), ("label", "")),
        *(
            ("cycle", "first"),
            ("score", "high"),
            ("undoes", "x"),
            ("annotator", b"\0"),
            ("image", b"\xff"),
            ("action", "y"),
        ),
    ],
)
def test_a_damaged_value_is_one_sentence(log, column, value):
    log.append({"a": A}, annotator="Ada", cycle=0, scores={"a": 0.5})
    log._connection.execute(f"UPDATE events SET {column} = ?", (value,))
    for read in (log.events, log.current, lambda: log.undo(annotator="Ada"), lambda: log.new_labels({})):
        with pytest.raises(
            StorageError, match=r"labels\.sqlite is damaged \(event 1: .*anomalymatch\.data\.restore"
        ) as told:
            read()
        assert str(told.value).isprintable()


def test_a_full_disk_is_no_damage(log):
    log.append({"a": A}, annotator="Ada", cycle=0)
    pages = log._connection.execute("PRAGMA page_count").fetchone()[0]
    log._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="the disk is full") as told:
        log.append({f"{i}" * 50: N for i in range(1000)}, annotator="Ada", cycle=0)
    assert "restore" not in str(told.value)
    assert log.current() == {"a": A}
    log._connection.execute("PRAGMA max_page_count=1000000")
    log.append({"b": N}, annotator="Ada", cycle=0)
    assert log.current() == {"a": A, "b": N}


def test_a_log_that_may_not_be_written_is_no_damage(log):
    log._connection.execute("PRAGMA query_only=1")
    with pytest.raises(StorageError, match="permissions") as told:
        log.append({"a": A}, annotator="Ada", cycle=0)
    assert "restore" not in str(told.value)


def test_a_closed_log_is_one_file(tmp_path):
    log, other = (LabelLog(tmp_path / "labels.sqlite") for _ in range(2))  # such as a page and its training
    log.append({"a": A}, annotator="Ada", cycle=0)
    log.close()
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "labels.sqlite", tmp_path / "copy")
    other.close()
    copy = LabelLog(tmp_path / "copy" / "labels.sqlite")
    assert copy.current() == {"a": A}
    copy.close()
    copy.close()  # no effect


@pytest.fixture
def run(tmp_path):
    """Run folder with the labels of two cycles, as the loop writes them; one label was removed, one changed."""
    run = tmp_path / "run"
    log = LabelLog.of_run(run)
    for cycle, labels in enumerate(({"b": A, "a": N, "c": N}, {"a": A, "c": None, "d": N}, {"e": X})):
        log.append(labels, annotator="oracle", cycle=cycle)
        export_csv(log.current(until_cycle=cycle), run / "labels.csv")
        if cycle < 2:
            export_csv(log.current(until_cycle=cycle), run / "cycles" / f"{cycle + 1:02d}" / "labels.csv")
    log.close()
    return run


@pytest.mark.parametrize("fault", ["deleted", "truncated", "emptied", "damaged"])
def test_a_lost_log_stops_the_run_and_is_restored(run, fault, capsys):
    path = run / "labels.sqlite"
    log = LabelLog(path)
    expected = [list(log.current(until_cycle=cycle).items()) for cycle in range(3)]
    log.close()
    path.unlink()
    if fault == "truncated":
        path.touch()
    elif fault == "emptied":
        LabelLog(path).close()
    elif fault == "damaged":
        path.write_bytes(b"x" * 5000)
    for _ in range(2):  # it stays so until it is restored
        with pytest.raises(StorageError, match=r"labels\.sqlite .*labels\.csv.*anomalymatch\.data\.restore "):
            RunFolder(run)
    restore.main([str(run)])
    assert "4 labels restored" in capsys.readouterr().out
    folder = RunFolder(run)
    assert [list(folder.labels.current(until_cycle=cycle).items()) for cycle in range(3)] == expected
    assert folder.labels.last_cycle() == 2
    folder.close()
    assert (run / "labels.sqlite.old").exists() == (fault != "deleted")


def test_a_new_run_starts_a_log(tmp_path, capsys):
    (tmp_path / "cycles" / "01").mkdir(parents=True)
    (tmp_path / "cycles" / "01" / "labels.csv").write_text("filename,label\n")  # it began without labels
    LabelLog.of_run(tmp_path).close()
    LabelLog.of_run(tmp_path).close()
    with pytest.raises(SystemExit, match="nothing can be restored"):
        restore.main([str(tmp_path)])


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
@example(dict.fromkeys(("=1", "'=1", "''=1", "-1", "-1x", "'-1", "@a", "+b", "\t=x", "\n=", "'", "'x"), A))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_round_trip(tmp_path, labels):
    export_csv(labels, tmp_path / "labels.csv")
    assert import_csv(tmp_path / "labels.csv", labels.keys()) == labels


def test_csv_format_of_anomalymatch(tmp_path):
    export_csv({"a.png": A, "dir/b, c.png": X}, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == b'filename,label\na.png,anomaly\n"dir/b, c.png",artefact\n'


def test_ids_that_look_like_formulas(tmp_path):
    path = tmp_path / "labels.csv"
    export_csv({"=1+1": A, "'=1+1": N}, path)
    assert path.read_text() == "filename,label\n'=1+1,anomaly\n''=1+1,normal\n"
    path.write_text("filename,label\n=1+1,anomaly\n'@x,normal\n")  # by another program
    assert import_csv(path, {"=1+1", "'@x"}) == {"=1+1": A, "'@x": N}


def test_csv_with_other_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("filename,label\na,anomaly\nb,cat\nc,Odd\nd,Normal\n")
    with pytest.raises(LabelError, match=r"b has the unknown label 'cat' \(2 images .* anomaly, normal"):
        import_csv(path, {"a", "b", "c", "d"})
    with pytest.raises(LabelError, match="d,Normal"):
        import_csv(path, {"a", "b", "c"})
    path.write_text("filename,label\na,Anomaly\nd, NORMAL\n")
    assert import_csv(path, {"a", "d"}) == {"a": A, "d": N}
