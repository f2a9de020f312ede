"""Restore a lost or damaged label log: `python -m anomalymatch.data.restore RUN`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalymatch.data.label_log import FILE, FROM_FILE, LabelLog, import_csv, labels_files
from anomalymatch.errors import AnomalyMatchError, StorageError
from anomalymatch.text import printable


def restore_log(run: Path) -> int:
    """Write a new label log from the labels files of a run; return the number of labels in it.

    A log that is there is kept under the name `labels.sqlite.old`. Annotators, times and labels that no cycle has used
    are not in the files, and are lost.

    Raises:
        StorageError: if there is no labels file with labels.
        LabelError: if one of them is damaged.
    """
    files = labels_files(run)
    if not files:
        raise StorageError(f"{run} has neither labels.csv nor cycles/*/labels.csv with labels: nothing can be restored")
    copies = [(path, import_csv(path, _AnyId())) for path in files]
    for end in ("", "-wal", "-shm"):
        old = run / f"{FILE}{end}"
        if old.exists():
            old.replace(run / f"{FILE}.old{end}")
    log = LabelLog(run / FILE)
    cycle = 0
    for path, labels in copies:
        cycle = int(path.parent.name) - 1 if path.parent.name.isdecimal() else cycle + 1
        before = log.current()
        changed = dict.fromkeys(before.keys() - labels.keys()) | {
            id_: label for id_, label in labels.items() if before.get(id_) != label
        }
        log.append(changed, annotator=FROM_FILE, cycle=cycle)
    count = len(log.current())
    log.close()
    return count


class _AnyId:
    """Container of all ids."""

    def __contains__(self, id_: object) -> bool:
        return True


def main(words: Sequence[str] | None = None) -> None:
    """Restore the label log of a run, as `restore_log` does; a user's error is one line with exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalymatch.data.restore", description="Restore the label log of a run from its labels.csv."
    )
    parser.add_argument("run", help="the run folder", type=Path)
    run = parser.parse_args(words).run.expanduser()
    try:
        print(f"{run / FILE}: {restore_log(run):,} labels restored")
    except AnomalyMatchError as error:
        sys.exit(f"error: {printable(str(error), ' ')}")


if __name__ == "__main__":
    main()
