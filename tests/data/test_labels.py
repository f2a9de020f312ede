import pytest

from anomalymatch.data.labels import training_ids
from anomalymatch.errors import LabelError
from anomalymatch.types import Label


def test_only_anomaly_and_normal_teach():
    labels = {"d": "normal", "a": "anomaly", "c": "unsure", "b": Label.NORMAL, "e": Label.ARTEFACT, "0": Label.ANOMALY}
    assert training_ids(labels) == (["0", "a"], ["b", "d"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "none of the 0 labels is 'anomaly'"),
        ({"a": "normal", "b": "unsure"}, "none of the 2 labels is 'anomaly'"),
        ({"a": "anomaly"}, "none of the 1 labels is 'normal'"),
        ({"a": "anomaly", "b": "normal", "c": "Anomaly"}, "unknown label 'Anomaly': a label is one of anomaly, normal"),
    ],
)
def test_refusals(labels, message):
    with pytest.raises(LabelError, match=message):
        training_ids(labels)
