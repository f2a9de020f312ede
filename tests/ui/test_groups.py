import numpy as np
import pytest

from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label
from anomalymatch.ui.groups import MAX_NAME, Groups

IDS = [f"{kind}{i}" for i in range(6) for kind in "abc"][:16]


def divide(ids, normals, count):
    """Divide by the first letter, or in halves; ignore normals, and z as unreadable."""
    if count == 2:
        return [ids[: len(ids) // 2], ids[len(ids) // 2 :]] if len({id_[1:] for id_ in ids}) > 1 else [ids]
    parts = {kind: [id_ for id_ in ids if id_[0] == kind] for kind in sorted({id_[0] for id_ in ids} - {"z"})}
    return sorted(parts.values(), key=len, reverse=True)


@pytest.fixture
def state():
    return {"labels": dict.fromkeys(IDS, Label.ANOMALY), "ranking": None}


@pytest.fixture
def changes():
    return []


@pytest.fixture
def groups(tmp_path, state, changes):
    return Groups(
        tmp_path / "groups.json", divide, lambda: (state["labels"], state["ranking"]), lambda: changes.append(1)
    )


def names(groups):
    return [group.name for group in groups.all()]


def sizes(groups):
    return [len(group.ids) for group in groups.all()]


def test_anomalies_are_grouped_and_stored(groups, tmp_path, state, changes):
    groups.make("anomalies", None)
    assert names(groups) == ["group 1", "group 2", "group 3"]
    assert sizes(groups) == [6, 5, 5]
    assert changes == [1]
    again = Groups(groups.path, divide, lambda: (state["labels"], None), list)
    assert again.all() == groups.all()
    assert groups.names()["a0"] == "group 1"


def test_top_unlabelled_images_are_grouped(groups, state):
    ids = [f"{kind}{i:03d}" for i in range(150) for kind in "xy"]
    state["ranking"] = Ranking(ids, -np.arange(300.0))
    state["labels"] = dict.fromkeys(ids[:10], Label.NORMAL)
    groups.make("top 200", None)
    assert sizes(groups) == [100, 100]
    assert "x000" not in groups.names()
    assert "y104" in groups.names()
    assert "x105" not in groups.names()


def test_grouping_errors(groups, state):
    with pytest.raises(ConfigError, match="'all'"):
        groups.make("all", None)
    with pytest.raises(DataError, match="ranked"):
        groups.make("top 100", None)
    state["labels"] = {"a0": Label.ANOMALY, "a1": Label.NORMAL}
    with pytest.raises(DataError, match="there are 1"):
        groups.make("anomalies", None)
    assert not groups.all()


def test_named_groups_keep_their_images_when_images_are_grouped_again(groups, state):
    groups.make("anomalies", None)
    groups.rename(1, "  bars\n and\x00 rings ")
    assert names(groups) == ["group 1", "bars and rings", "group 3"]
    bars = groups.get(1)
    state["labels"] = {**state["labels"], "b9": Label.ANOMALY}
    groups.make("anomalies", None)
    assert groups.get(0) == bars  # named ones come first
    assert names(groups) == ["bars and rings", "group 2", "group 3", "group 4"]
    assert groups.get(3).ids == ("b9",)
    assert Groups(groups.path, divide, lambda: ({}, None), list).all() == groups.all()
    groups.rename(0, "x" * 100)
    assert names(groups)[0] == "x" * MAX_NAME
    groups.rename(0, " ")
    assert names(groups)[0] == "group 1"
    groups.make("anomalies", None)
    assert names(groups) == ["group 1", "group 2", "group 3"]
    for number in range(3):
        groups.rename(number, f"kind {number}")
    with pytest.raises(DataError, match="outside the named groups, and there are 0"):
        groups.make("anomalies", None)


def test_a_person_makes_and_fills_groups(groups, changes):
    groups.make("anomalies", None)
    with pytest.raises(DataError, match="needs a name"):
        groups.add(" \n")
    assert groups.add("rings") == 3
    assert groups.add("rings ") == 3
    assert groups.get(3).ids == ()
    assert Groups(groups.path, divide, lambda: ({}, None), list).all() == groups.all()  # also an empty one
    before = len(changes)
    groups.assign(3, ["b1", "new", "b1", "c0"])
    groups.assign(3, ["c0"])  # is there already
    assert len(changes) == before + 1
    assert groups.get(3).ids == ("b1", "new", "c0")
    assert sizes(groups) == [6, 4, 4, 3]
    groups.assign(3, list(groups.get(0).ids))
    assert names(groups) == ["group 2", "group 3", "rings"]
    groups.assign(0, list(groups.get(2).ids))
    assert sizes(groups) == [4 + 9, 4, 0]  # a named group may be empty
    groups.rename(2, "")
    assert names(groups) == ["group 2", "group 3"]


def test_split_and_merge_keep_all_images(groups):
    groups.make("anomalies", None)
    before = sorted(groups.names())
    groups.rename(0, "rings")
    groups.split(0)
    assert names(groups) == ["rings", "rings, other", "group 2", "group 3"]
    assert sizes(groups) == [3, 3, 5, 5]
    groups.merge([3, 1])
    assert names(groups) == ["rings", "rings, other", "group 2"]
    assert sizes(groups) == [3, 8, 5]
    assert sorted(groups.names()) == before
    groups.merge({0, 1, 2})
    assert names(groups) == ["rings"]
    assert sorted(groups.names()) == before


def test_split_and_merge_errors(groups, state):
    state["labels"] = dict.fromkeys(["a0", "b0", "b00"], Label.ANOMALY)
    groups.make("anomalies", None)
    with pytest.raises(DataError, match="group 2 cannot be split"):
        groups.split(1)
    with pytest.raises(DataError, match="two groups"):
        groups.merge([1, 1])
    for act in (groups.get, groups.split, lambda number: groups.rename(number, "x")):
        with pytest.raises(DataError, match="there is no group 3: there are 2"):
            act(2)
    with pytest.raises(DataError, match="there is no group 8"):
        groups.merge([0, 7])
    assert sizes(groups) == [2, 1]


@pytest.mark.parametrize("text", ["", "[]", '{"groups": [{"name": 1}]}', '{"groups": 3}'])
def test_corrupt_file(tmp_path, text):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(StorageError, match=r"groups.json"):
        Groups(path, divide, dict, list)


def contents(groups):
    return {group.name: list(group.ids) for group in groups.all()}


def test_moves_of_undone_labels_are_taken_back_and_redone(groups):
    groups.make("anomalies", None)
    groups.rename(0, "ring")
    before = contents(groups)
    groups.assign(0, ["b1", "c0", "b0", "z9"], action=1)
    moved = contents(groups)
    groups.assign(2, [id_ for id_ in moved["ring"] if id_ != "a0"], action=5)
    emptied = contents(groups)
    for valid, state in (({1}, moved), (set(), before), ({1}, moved), ({1, 5}, emptied), (set(), before)):
        groups.follow(valid)
        assert contents(groups) == state
        groups = Groups(groups.path, divide, groups._state, list)  # also after a restart
        assert contents(groups) == state


def test_a_group_without_a_name_comes_back_with_its_images(groups):
    groups.make("anomalies", None)
    before = groups.all()
    groups.assign(0, before[1].ids, action=1)
    assert names(groups) == ["group 1", "group 3"]
    groups.follow(())
    assert groups.all() == before


def test_an_undo_in_another_order_leaves_later_moves(groups):
    numbers = [groups.add(name) for name in ("ring", "arc")]
    groups.assign(numbers[0], ["a0"], action=1)
    groups.assign(numbers[1], ["a0"], action=2)
    groups.follow({2})  # another person's label is the later one
    assert contents(groups) == {"ring": [], "arc": ["a0"]}
    groups.follow(())
    assert contents(groups) == {"ring": [], "arc": []}


def test_an_undo_knows_groups_that_were_renamed_or_merged(groups):
    for name in ("ring", "arc", "lens"):
        groups.add(name)
    groups.assign(0, ["a0", "a1"], action=1)
    groups.assign(1, ["a0"], action=2)
    groups.rename(0, "halo")
    groups.merge([1, 2])
    groups.follow({1})
    assert contents(groups) == {"halo": ["a0", "a1"], "arc": []}
    groups.rename(0, "")
    groups.follow(())
    assert contents(groups) == {"arc": []}


def test_a_new_clustering_keeps_the_moves_into_named_groups_only(groups):
    groups.make("anomalies", None)
    groups.rename(1, "ring")
    groups.assign(1, ["a0"], action=1)  # from a group without a name
    groups.assign(0, ["b0"], action=2)
    groups.make("anomalies", None)
    before = contents(groups)
    groups.follow(())
    assert contents(groups) == {name: [id_ for id_ in ids if id_ != "a0"] for name, ids in before.items()}
