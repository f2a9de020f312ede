import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.scoring.finish import TopK

LOGITS = st.lists(st.floats(-5, 5, width=32).map(lambda x: round(x, 1)), max_size=60)


@given(logits=LOGITS, k=st.integers(0, 12), cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 9))
def test_top_is_the_beginning_of_a_full_sort_whatever_the_pieces(logits, k, cuts, seed):
    ids = [f"id{i:02d}" for i in range(len(logits))]
    order = np.random.default_rng(seed).permutation(len(logits))
    top = TopK(k)
    for piece in np.split(order, sorted(cut for cut in cuts if cut < len(order))):
        top.add([ids[i] for i in piece], np.array([logits[i] for i in piece], dtype=np.float32))
    pairs = zip(np.float32(logits).tolist(), ids, strict=True)
    expected = sorted((-logit, id_) for logit, id_ in pairs)[:k]
    assert top.best() == [(id_, -negative) for negative, id_ in expected]


def test_csv(tmp_path):
    top = TopK(2)
    top.add(["a", 'comma, "quoted"', "c"], np.array([0.0, 2.0, -1.0], dtype=np.float32))
    top.write(tmp_path / "top.csv")
    assert (tmp_path / "top.csv").read_text().splitlines() == [
        "rank,id,score,logit",
        '1,"comma, ""quoted""",0.880797,2',
        "2,a,0.5,0",
    ]


def test_csv_is_written_during_the_scoring(tmp_path, monkeypatch):
    from anomalymatch.scoring import finish as module

    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    running = TopK(3, tmp_path / "top.csv")
    running.add(["a"], np.array([1.0], dtype=np.float32))
    assert not (tmp_path / "top.csv").exists()
    running.add(["b"], np.array([2.0], dtype=np.float32))
    assert len((tmp_path / "top.csv").read_text().splitlines()) == 3
    running.add(["c"], np.array([3.0], dtype=np.float32))
    assert len((tmp_path / "top.csv").read_text().splitlines()) == 3
