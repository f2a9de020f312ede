"""Groups of images, the kinds of anomaly: proposed by clustering, or made, named and filled by a person."""

import json
import threading
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from anomalymatch.checks import check_choice
from anomalymatch.errors import DataError, StorageError
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking
from anomalymatch.text import printable
from anomalymatch.types import Label

MAX_NAME = 60
ANOMALIES = "anomalies"
TOPS = {"top 100": 100, "top 200": 200, "top 500": 500}
SELECTIONS = (ANOMALIES, *TOPS)
"""Images that can be grouped: those labelled anomaly, or the highest scores among the unlabelled."""
Divide = Callable[[Sequence[str], Collection[str], int | None], Sequence[Sequence[str]]]
"""Divides images into a number of groups (None chooses it), given some normal images: largest group first, and in each
the most typical image first. Unreadable images are in no group."""
State = Callable[[], tuple[Mapping[str, Label], Ranking | None]]


@dataclass(frozen=True)
class Group:
    """Group of images, most typical first.

    Attributes:
        name: "group 3" or so until a person names it.
        named: True if a person named it: it stays when images are grouped again, and may be empty.
    """

    name: str
    ids: Sequence[str]
    named: bool = False


class Place(NamedTuple):
    """Place of an image: its group with name, number and whether a person named it, and its place among the images."""

    name: str
    named: bool
    number: int
    place: int


@dataclass(frozen=True)
class Move:
    """Images that a label has put into a group, so that an undo of the label takes them back.

    Attributes:
        action: number of the label in the log, see `LabelEvent.action`.
        name: name of the group.
        before: the earlier place of each image; None where it was in no group.
        is_undone: True if the images are back at their earlier places.
    """

    action: int
    name: str
    before: Mapping[str, Place | None]
    is_undone: bool = False


class Groups:
    """Groups of a search, stored in one file; an image is in at most one group.

    Methods raise a `DataError` for the number of a group that does not exist.

    Attributes:
        keys: the key on the page of each group that has one of its own, by its name.

    Args:
        path: the file.
        divide: see `Divide`.
        state: returns the current labels and ranking.
        on_change: called after each change.
        known: images of the archive; others leave their groups. None keeps all.

    Raises:
        StorageError: if the file is corrupt.
    """

    def __init__(
        self,
        path: Path,
        divide: Divide,
        state: State,
        on_change: Callable[[], None],
        known: Container[str] | None = None,
    ) -> None:
        self.path, self._divide, self._state, self._on_change = path, divide, state, on_change
        self._lock = threading.RLock()
        self._groups, self._moves = _read(path, known)
        self.keys: dict[str, str] = {}

    def all(self) -> Sequence[Group]:
        """Return all groups."""
        return tuple(self._groups)

    def get(self, number: int) -> Group:
        """Return a group."""
        groups = self._groups
        if not 0 <= number < len(groups):
            raise DataError(f"there is no group {number + 1}: there are {len(groups)}")
        return groups[number]

    def make(self, selection: str, count: int | None) -> None:
        """Group images and replace all groups without a name; the named ones come first and keep their images.

        Args:
            selection: one of `SELECTIONS`, without the images of named groups. Images labelled normal show the
                clustering what is usual.
            count: number of groups; None chooses it.

        Raises:
            DataError: if there are too few images.
            ConfigError: if there are fewer distinct images than `count`, or `selection` is unknown.
        """
        labels, ranking = self._state()
        kept = {id_ for group in self._groups if group.named for id_ in group.ids}
        found = self._divide(_select(selection, labels, ranking, kept), _normals(labels), count)
        with self._lock:
            named = [group for group in self._groups if group.named]
            taken = {id_ for group in named for id_ in group.ids}  # a person may have filled them in the meantime
            free = [tuple(id_ for id_ in ids if id_ not in taken) for ids in found]
            new = [Group(_default_name(i), ids) for i, ids in enumerate(filter(None, free), len(named))]
            self._save([*named, *new], _without_unnamed(self._moves, {group.name for group in named}))

    def rename(self, number: int, name: str) -> None:
        """Name a group; an empty name restores the default, and removes an empty group."""
        clean = clean_name(name)
        with self._lock:
            group = self.get(number)
            new = Group(clean or _default_name(number), group.ids, named=bool(clean))
            groups = _replace(self._groups, number, [new] if clean or group.ids else [])
            self.keys = {new.name if name == group.name else name: key for name, key in self.keys.items()}
            self._save(groups, _renamed(self._moves, {group.name: new}))

    def add(self, name: str) -> int:
        """Add an empty group and return its number; if there is a group of that name, return its number.

        Raises:
            DataError: if the name is empty.
        """
        clean = clean_name(name)
        if not clean:
            raise DataError("a new group needs a name")
        with self._lock:
            names = [group.name for group in self._groups]
            if clean not in names:
                self._save([*self._groups, Group(clean, (), named=True)])
                return len(names)
            return names.index(clean)

    def bind(self, keys: Mapping[str, str]) -> None:
        """Assign keys of the page to groups by name; add the groups that do not exist."""
        for name in keys:
            self.add(name)
        self.keys = dict(keys)

    def assign(self, number: int, ids: Sequence[str], action: int | None = None) -> None:
        """Move images into a group, to its end; groups without a name that lose all their images vanish.

        With the `action` of a label, `follow` moves them back when that label was undone.
        """
        with self._lock:
            target = self.get(number)
            groups = _assign(self._groups, target, ids)
            if groups != self._groups:
                before = _places(self._groups, [id_ for id_ in ids if id_ not in set(target.ids)])
                move = [] if action is None else [Move(action, target.name, before)]
                self._save(groups, [*self._moves, *move])

    def follow(self, valid: Container[int]) -> None:
        """Make group membership follow the label log after an undo or a redo.

        If the label that moved images into a group was undone, they go back to their earlier places, in groups that are
        restored if needed. If it was redone, they move again. Images that have left the group otherwise stay.

        Args:
            valid: actions of the labels that are not undone.
        """
        with self._lock:
            groups, moves = self._groups, list(self._moves)
            for i in reversed(range(len(moves))):
                if not moves[i].is_undone and moves[i].action not in valid:
                    groups, moves[i] = _take_back(groups, moves, i), replace(moves[i], is_undone=True)
            for i, move in enumerate(moves):
                target = next((group for group in groups if group.name == move.name), None)
                if move.is_undone and move.action in valid and target is not None:
                    moves[i] = replace(move, before=_places(groups, list(move.before)), is_undone=False)
                    groups = _assign(groups, target, list(move.before))
            if moves != self._moves:
                self._save(groups, moves)

    def split(self, number: int) -> None:
        """Split a group in two, of which the first keeps the name.

        Raises:
            DataError: if it has fewer than two distinct images.
        """
        group = self.get(number)
        halves = self._divide(group.ids, _normals(self._state()[0]), 2) if len(group.ids) > 1 else []
        if len(halves) < 2:
            raise DataError(f"{group.name} cannot be split: it has too few images, or they are all alike")
        with self._lock:
            if self.get(number) != group:
                raise DataError(f"{group.name} has changed in the meantime: look at it again")
            names = (group.name, f"{group.name}, other"[:MAX_NAME])
            parts = [Group(name, tuple(half), group.named) for name, half in zip(names, halves, strict=True)]
            self._save(_replace(self._groups, number, parts))

    def merge(self, numbers: Collection[int]) -> None:
        """Merge groups into the first of them, which keeps its place and name; its images come first.

        Raises:
            DataError: if there are fewer than two.
        """
        with self._lock:
            chosen = [self.get(number) for number in sorted(set(numbers))]
            if len(chosen) < 2:
                raise DataError("choose at least two groups to merge")
            merged = replace(chosen[0], ids=tuple(id_ for group in chosen for id_ in group.ids))
            groups = _replace(self._groups, min(numbers), [merged])
            moves = _renamed(self._moves, {group.name: merged for group in chosen})
            self._save([g for i, g in enumerate(groups) if i == min(numbers) or i not in numbers], moves)

    def names(self) -> dict[str, str]:
        """Return the group name of each image that is in a group."""
        return {id_: group.name for group in self._groups for id_ in group.ids}

    def numbers(self) -> dict[str, int]:
        """Return the number of the group of each image that is in one."""
        return {id_: number for number, group in enumerate(self._groups) for id_ in group.ids}

    def _save(self, groups: list[Group], moves: list[Move] | None = None) -> None:
        moves = self._moves if moves is None else moves
        plain = {"groups": [vars(group) for group in groups], "moves": [vars(move) for move in moves]}
        write_text(self.path, json.dumps(plain, indent=1, ensure_ascii=False))
        self._groups, self._moves = groups, moves
        self._on_change()


def _assign(groups: Sequence[Group], target: Group, ids: Sequence[str]) -> list[Group]:
    """Move images to the end of one of the groups; groups without a name that lose all their images vanish."""
    moved, held = set(ids), set(target.ids)
    changed = [
        replace(group, ids=(*group.ids, *dict.fromkeys(id_ for id_ in ids if id_ not in held)))
        if group is target
        else replace(group, ids=tuple(id_ for id_ in group.ids if id_ not in moved))
        for group in groups
    ]
    return [group for group in changed if group.ids or group.named]


def _places(groups: Sequence[Group], ids: Sequence[str]) -> dict[str, Place | None]:
    wanted, found = set(ids), {}
    for number, group in enumerate(groups):
        for place, id_ in enumerate(group.ids):
            if id_ in wanted:
                found[id_] = Place(group.name, group.named, number, place)
    return {id_: found.get(id_) for id_ in ids}


def _take_back(groups: Sequence[Group], moves: Sequence[Move], which: int) -> list[Group]:
    """Move the images that are still in the group of one of the moves back to their earlier places."""
    move = moves[which]
    target = next((group for group in groups if group.name == move.name), None)
    if target is None:
        return list(groups)
    mine = set(target.ids) & move.before.keys()
    kept = [replace(g, ids=tuple(i for i in g.ids if i not in mine)) if g is target else g for g in groups]
    # In the order of their places, so that each is at its place when the next is put in.
    places = {id_: _before(moves[:which], id_, at) for id_, at in move.before.items() if id_ in mine}
    for id_, at in sorted(((id_, at) for id_, at in places.items() if at), key=lambda one: one[1][2:]):
        known = next((i for i, group in enumerate(kept) if group.name == at.name), None)
        if known is None:
            kept.insert(at.number, Group(at.name, (id_,), at.named))
        else:
            ids = kept[known].ids
            kept[known] = replace(kept[known], ids=(*ids[: at.place], id_, *ids[at.place :]))
    return [group for group in kept if group.ids or group.named]


def _before(moves: Sequence[Move], id_: str, at: Place | None) -> Place | None:
    """Return the place of an image before the moves that led to `at` and were undone since."""
    for move in reversed(moves):
        if at is not None and move.is_undone and move.name == at.name and id_ in move.before:
            at = move.before[id_]
    return at


def _renamed(moves: Sequence[Move], names: Mapping[str, Group]) -> list[Move]:
    """Return moves that know groups by new names."""

    def place(at: Place | None) -> Place | None:
        return at and (at._replace(name=names[at.name].name, named=names[at.name].named) if at.name in names else at)

    return [
        replace(
            move,
            name=names[move.name].name if move.name in names else move.name,
            before={id_: place(at) for id_, at in move.before.items()},
        )
        for move in moves
    ]


def _without_unnamed(moves: Sequence[Move], named: Container[str]) -> list[Move]:
    """Return moves without groups that nobody has named, which a new clustering replaces."""
    return [
        replace(move, before={id_: at if at is not None and at.named else None for id_, at in move.before.items()})
        for move in moves
        if move.name in named
    ]


def _select(selection: str, labels: Mapping[str, Label], ranking: Ranking | None, kept: Collection[str]) -> list[str]:
    check_choice("selection to group", selection, SELECTIONS)
    if selection == ANOMALIES:
        found = [id_ for id_, label in labels.items() if label == Label.ANOMALY and id_ not in kept]
        if len(found) < 2:
            outside = " outside the named groups" if kept else ""
            raise DataError(f"grouping needs at least two images labelled anomaly{outside}, and there are {len(found)}")
        return found
    if ranking is None:
        raise DataError("nothing is ranked yet: label some images first")
    return ranking.restrict(id_ for id_ in ranking.ids if id_ not in labels and id_ not in kept).top(TOPS[selection])


def _normals(labels: Mapping[str, Label]) -> list[str]:
    return [id_ for id_, label in labels.items() if label == Label.NORMAL]


def clean_name(name: str) -> str:
    """Return a name without control characters and superfluous spaces, of at most `MAX_NAME` characters."""
    return " ".join(printable(name, " ").split())[:MAX_NAME]


def _default_name(number: int) -> str:
    return f"group {number + 1}"


def _replace(groups: Sequence[Group], number: int, instead: Sequence[Group]) -> list[Group]:
    return [*groups[:number], *instead, *groups[number + 1 :]]


def _read(path: Path, known: Container[str] | None) -> tuple[list[Group], list[Move]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        groups = [Group(str(g["name"]), tuple(map(str, g["ids"])), bool(g.get("named"))) for g in found["groups"]]
        kept = [replace(g, ids=tuple(id_ for id_ in g.ids if known is None or id_ in known)) for g in groups]
        return [group for group in kept if group.ids or group.named], list(map(_move, found.get("moves", [])))
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the groups in {path} are corrupt ({error}): delete that file to start over") from error


def _move(plain: Mapping[str, Any]) -> Move:
    before = {str(id_): None if at is None else _place(*at) for id_, at in plain["before"].items()}
    return Move(int(plain["action"]), str(plain["name"]), before, bool(plain["is_undone"]))


def _place(name: object, named: object, number: int, place: int) -> Place:
    return Place(str(name), bool(named), int(number), int(place))
