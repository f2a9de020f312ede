"""Ranking by a description of what is wanted, without any label; the run folder keeps description and order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import logit

from anomalymatch.algorithms.base import StepListener, ignore_step
from anomalymatch.backbones.image_text import ImageTextEmbedding
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.evaluation.ranks import midranks
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking
from anomalymatch.text import printable

DESCRIPTION, DESCRIBED = "description.json", "description.parquet"
"""Files of a run folder: the descriptions, and the ranking by them."""
LONGEST, MOST = 500, 20
"""Most characters of a description, and most descriptions at a time."""

DECIMALS = 6
"""Decimals of a similarity that count: the rest is the rounding of single precision, which differs for equal images."""


class TextRanker:
    """Learner that ranks by the similarity of images to descriptions; it learns nothing and needs no label.

    The similarity is the cosine of the embeddings of an image-text model. With several descriptions, that of each is
    standardised over the pool, so that none outweighs the others, and an image counts by the description that fits it
    best.

    Args:
        embedding: model and images.
        descriptions: see `check_descriptions`.

    Raises:
        ConfigError: if a description is empty or too long, or open_clip is not installed.
        DownloadError: if the weights of the model are neither on this machine nor can be fetched.
    """

    needs_labels, is_detector, trains = False, False, False

    def __init__(self, embedding: ImageTextEmbedding, descriptions: str | Sequence[str]) -> None:
        embedding.spec.check_weights()
        self.embedding, self.descriptions = embedding, check_descriptions(descriptions)
        self.on_step: StepListener = ignore_step

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "TextRanker":
        """Do nothing: the order follows from the descriptions."""
        return self

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; the `logits` are log-odds of the rank, from first to last, ties in order of the id."""
        features = self.embedding.features()
        readable, rejects = features.split(self.embedding.pool if ids is None else ids)
        scores = self.similarity()[features.positions(readable)]
        order = np.lexsort((np.asarray(readable, dtype=object), -scores))
        logits = np.empty(len(order))
        logits[order] = -logit(midranks(np.arange(len(order))))
        return Ranking(readable, logits, rejects, self.embedding.source)

    def similarity(self) -> Float64[np.ndarray, " n"]:
        """Return the similarity of each readable image of the source to the descriptions."""
        features = self.embedding.features()
        cosines = np.stack(
            [features.project(self.embedding.model.encode_text(text).astype(np.float64)) for text in self.descriptions]
        )
        if len(cosines) > 1:
            pool = cosines[:, features.positions(features.split(self.embedding.pool)[0])]
            spread = pool.std(axis=1, keepdims=True)
            cosines = (cosines - pool.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
        return cosines.max(axis=0).round(DECIMALS)

    def notes(self) -> list[str]:
        """Return a sentence for each description that is longer than the context of the model."""
        return [
            f"the description {printable(text, limit=40)!r} is longer than text.model={self.embedding.spec.model} "
            f"reads: its end does not count"
            for text in self.descriptions
            if self.embedding.model.is_cut(text)
        ]

    def save(self, folder: Path) -> None:
        """Do nothing: everything follows from the descriptions."""

    def restore(self, folder: Path) -> None:
        """Do nothing: everything follows from the descriptions."""


def check_descriptions(value: object, key: str = "al.describe") -> tuple[str, ...]:
    """Return one or several descriptions without white space around them, each once.

    Raises:
        ConfigError: if one is empty, too long or no text.
    """
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{key}={text!r} is no description: write what to look for, such as 'a ring galaxy'")
        if len(text) > LONGEST:
            raise ConfigError(f"{key} has {len(text):,} characters, more than {LONGEST}: describe it more briefly")
    if not 1 <= len(texts) <= MOST:
        raise ConfigError(f"{key} has {len(texts)} descriptions: give between 1 and {MOST}")
    return tuple(dict.fromkeys(" ".join(printable(str(text), " ").split()) for text in texts))


class SavedDescription(NamedTuple):
    """Descriptions in a run folder, none if they were removed, and the ranking by them, if it is there."""

    descriptions: tuple[str, ...]
    ranking: Ranking | None


def read_description(run: Path) -> SavedDescription | None:
    """Read the descriptions of a run folder; None if it never had any.

    Raises:
        StorageError: if their file is corrupt.
    """
    path = run / DESCRIPTION
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))["descriptions"]
        descriptions = check_descriptions(texts, "descriptions") if texts else ()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise StorageError(f"the description in {path} is corrupt ({error}): delete that file") from error
    try:
        ranking = Ranking.read(run / DESCRIBED) if descriptions else None
    except StorageError:  # not there yet, or damaged: it can be computed again
        ranking = None
    return SavedDescription(descriptions, ranking)


def save_description(run: Path, descriptions: Sequence[str]) -> None:
    """Replace the descriptions of a run folder, and remove the ranking by the old ones."""
    (run / DESCRIBED).unlink(missing_ok=True)  # first: a ranking always belongs to the descriptions beside it
    write_text(run / DESCRIPTION, json.dumps({"descriptions": list(descriptions)}, ensure_ascii=False))


def save_ranking(run: Path, ranking: Ranking) -> None:
    """Write the ranking by the descriptions of a run folder."""
    ranking.write(run / DESCRIBED)
