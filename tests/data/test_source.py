import pickle

import numpy as np
import pytest

from anomalymatch.data import source as module
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import IdIndex, ImageSource
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Pixels, Reject


class _Source(ImageSource):
    def load(self, position: int) -> Image:
        if position == 1:
            raise UnreadableImageError("broken")
        return np.full((2, 2, 1), position, dtype=np.uint8)


def test_base_source_keeps_the_order_and_rejects_what_is_unreadable() -> None:
    source = _Source(name="set", ids=["a", "b", "c"], bands=["grey"], fingerprint="x")
    assert isinstance(source, ImageSource)
    assert len(source) == 3
    first, second, third = source.read(["c", "b", "c"])
    assert first[0, 0, 0] == third[0, 0, 0] == 2
    assert second == Reject("b", "broken")


def test_base_source_refuses_unknown_and_repeated_ids_and_no_ids() -> None:
    with pytest.raises(DataError, match="set has no image 'z'"):
        _Source(name="set", ids=["a"], bands=["grey"], fingerprint="x").read(["z"])
    with pytest.raises(DataError, match="ids must be unique, but 'a' occurs more than once"):
        _Source(name="set", ids=["a", "a"], bands=["grey"], fingerprint="x")
    with pytest.raises(DataError, match="no images"):
        _Source(name="set", ids=[], bands=["grey"], fingerprint="x")


def test_base_source_renders_and_its_fingerprint_says_so() -> None:
    class Deep(ImageSource):
        def load(self, position: int) -> Pixels:
            if position == 2:
                return np.full((2, 2, 2), np.nan)
            return np.array([[[0.0, 5.0], [position, 7.0]]])

    def make(rendering: Rendering) -> Deep:
        return Deep(name="s", ids=["a", "b", "c"], bands=["g", "r"], units="nJy", fingerprint="x", rendering=rendering)

    plain, swapped = make(Rendering()), make(Rendering(combine={"red": {"r": 1.0}, "blue": {"g": 1.0}}))
    assert (plain.channels, plain.bands, plain.units) == (2, ("g", "r"), "nJy")
    assert plain.read(["b"])[0].tolist() == [[[0, 0], [255, 255]]]
    assert plain.read(["c"]) == [Reject("c", "there is no finite pixel value in it")]
    assert swapped.read(["a"])[0].tolist() == [[[0, 0], [255, 0]]]
    assert plain.fingerprint == "x" != swapped.fingerprint


def test_positions_survive_pickling_and_chance_collisions(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"id-{i}" for i in range(500)]
    index = pickle.loads(pickle.dumps(IdIndex(ids, "set")))
    assert [index[id_] for id_ in ids] == list(range(500))
    assert "id-500" not in index
    assert 7 not in index
    monkeypatch.setattr(module, "hash", lambda id_: len(id_), raising=False)  # almost all collide
    index = IdIndex(ids, "set")
    assert [index[id_] for id_ in ids] == list(range(500))
    with pytest.raises(DataError, match="ids must be unique, but 'id-3' occurs more than once"):
        IdIndex(["id-1", "id-3", "id-2", "id-3"], "set")
