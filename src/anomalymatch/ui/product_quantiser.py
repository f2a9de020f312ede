"""Product quantisation (Jégou, Douze, Schmid 2011): a byte for every two numbers of a vector."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from sklearn.cluster import kmeans_plusplus

from anomalymatch.ui.one_thread import one_thread

SUBSPACE = 2
"""Numbers that share a byte."""
CENTROIDS = 256
_CHUNK = 512
_START_SAMPLE = 4096
ROUNDS = 12
"""Of k-means. The error falls by less than a hundredth after them."""


@dataclass(frozen=True)
class ProductQuantiser:
    """Codebooks of all subspaces.

    Attributes:
        dimensions: length of the vectors.
        groups: which numbers of a vector, filled up with zeros, make each subspace.
        centroids: of every subspace.
    """

    dimensions: int
    groups: Int64[np.ndarray, "s k"]
    centroids: Float32[np.ndarray, "s 256 k"]

    @classmethod
    def fit(cls, sample: Float32[np.ndarray, "n d"], *, seed: int) -> "ProductQuantiser":
        """Learn the codebooks from vectors whose numbers are sorted by falling variance, as those of a PCA are.

        Args:
            sample: at least one vector.
            seed: of the vectors from which k-means starts.
        """
        rng = np.random.default_rng(seed)
        groups = _balanced(sample.shape[1])
        padded = _padded(sample)
        return cls(sample.shape[1], groups, np.stack([_k_means(padded[:, group], rng) for group in groups]))

    def encode(self, rows: Float32[np.ndarray, "n d"]) -> UInt8[np.ndarray, "n s"]:
        """The nearest centroid in every subspace."""
        padded = _padded(rows)
        codes = np.empty((len(rows), len(self.groups)), dtype=np.uint8)
        for j, group in enumerate(self.groups):
            codes[:, j] = _nearest(padded[:, group], self.centroids[j])
        return codes

    def decode(self, codes: UInt8[np.ndarray, "n s"]) -> Float32[np.ndarray, "n d"]:
        """The vectors that `codes` stand for."""
        padded = np.empty((len(codes), self.groups.size), dtype=np.float32)
        padded[:, self.groups.ravel()] = self.centroids[np.arange(len(self.groups)), codes].reshape(padded.shape)
        return padded[:, : self.dimensions]

    def tables(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, "s 256"]:
        """Inner products of every centroid with its part of `direction`."""
        parts = _padded(direction[None])[0][self.groups]
        return np.einsum("sck,sk->sc", self.centroids, parts, dtype=np.float32)


class QuantisedRows:
    """Vectors as codes.

    Args:
        codes: of every vector; they are kept in memory, subspace by subspace.
        quantiser: what they mean.
    """

    def __init__(self, codes: UInt8[np.ndarray, "m s"], quantiser: ProductQuantiser) -> None:
        self.quantiser = quantiser
        self.dimensions = quantiser.dimensions
        self._codes = np.empty((codes.shape[1], codes.shape[0]), dtype=np.uint8)
        for start in range(0, len(codes), _CHUNK):  # the whole at once would miss the processor's cache at every code
            self._codes[:, start : start + _CHUNK] = codes[start : start + _CHUNK].T

    def __len__(self) -> int:
        return int(self._codes.shape[1])

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """The vectors that the codes of these rows stand for."""
        return self.quantiser.decode(np.ascontiguousarray(self._codes[:, index].T))

    def inner(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """Inner products with what the codes stand for: one look-up a byte."""
        products = np.zeros(len(self), dtype=np.float32)
        for table, codes in zip(self.quantiser.tables(direction), self._codes, strict=True):
            products += np.take(table, codes, mode="clip")  # no code is out of range, and to clip is faster than to ask
        return products


def _padded(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n e"]:
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % SUBSPACE)))


def _balanced(dimensions: int) -> Int64[np.ndarray, "s k"]:
    """Large and small variances together, so that every byte has as much to tell as the others (Ge et al. 2013)."""
    rounds = np.arange(dimensions + -dimensions % SUBSPACE).reshape(SUBSPACE, -1)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return np.ascontiguousarray(rounds.T).astype(np.int64)


def _nearest(points: Float32[np.ndarray, "n k"], centroids: Float32[np.ndarray, "c k"]) -> Int64[np.ndarray, " n"]:
    # The nearest centroid is the one with the largest p.c - c.c/2: one product with a column of ones beside the points.
    ones = np.ones((len(points), 1), dtype=np.float32)
    augmented = np.concatenate([points, ones], axis=1)
    weights = np.concatenate([centroids, -np.square(centroids).sum(axis=1, keepdims=True) / 2], axis=1).T
    nearest = np.empty(len(points), dtype=np.int64)
    with one_thread():
        for start in range(0, len(points), _CHUNK):  # so that the products stay in the processor's cache
            nearest[start : start + _CHUNK] = (augmented[start : start + _CHUNK] @ weights).argmax(axis=1)
    return nearest


def _k_means(points: Float32[np.ndarray, "n k"], rng: np.random.Generator) -> Float32[np.ndarray, "256 k"]:
    distinct = np.unique(points, axis=0)
    if len(distinct) <= CENTROIDS:
        return distinct[np.minimum(np.arange(CENTROIDS), len(distinct) - 1)]
    few = distinct[rng.choice(len(distinct), min(_START_SAMPLE, len(distinct)), replace=False)]
    centroids = kmeans_plusplus(few, CENTROIDS, random_state=int(rng.integers(2**31)))[0]
    for _ in range(ROUNDS):
        nearest = _nearest(points, centroids)
        counts = np.bincount(nearest, minlength=CENTROIDS)
        sums = np.stack([np.bincount(nearest, weights=c, minlength=CENTROIDS) for c in points.T], axis=1)
        used = counts > 0  # the others stay where they are
        centroids[used] = (sums[used] / counts[used, None]).astype(np.float32)
    return centroids
