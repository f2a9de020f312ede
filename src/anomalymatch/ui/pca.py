"""Principal components: the directions on which most of the features' inner products lies."""

import numpy as np
from jaxtyping import Float32

_CHUNK = 2048


def principal_components(sample: Float32[np.ndarray, "n D"], dimensions: int) -> Float32[np.ndarray, "D d"]:
    """Orthonormal columns that keep as much of the sample's inner products as `dimensions` numbers can, most first.

    The mean is not taken away. Similarity of two images is the inner product of their features, and with a mean that
    was subtracted it would be another one: neighbours and probe would change even if every component were kept.

    Args:
        sample: feature vectors.
        dimensions: components that are wanted; all `D` if it is larger.
    """
    moments = np.zeros((sample.shape[1], sample.shape[1]))
    for start in range(0, len(sample), _CHUNK):
        part = sample[start : start + _CHUNK].astype(np.float64)
        moments += part.T @ part
    vectors = np.linalg.eigh(moments)[1][:, ::-1][:, :dimensions]
    # The sign of an eigenvector is a matter of the library; a stored bank must not depend on it.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return np.ascontiguousarray(vectors * np.sign(largest), dtype=np.float32)
