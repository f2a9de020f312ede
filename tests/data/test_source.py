import pickle

import numpy as np
import pytest

from anomalymatch.data import source as module
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import IdIndex, ImageSource
from anomalymatch.errors import DataError
from anomalymatch.types import Pixels, Reject


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
    with pytest.raises(DataError, match=r"set: .*no images"):
        IdIndex([], "set")
