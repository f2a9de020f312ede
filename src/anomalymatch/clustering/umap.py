"""UMAP: a map of vectors in two dimensions that keeps neighbours together (McInnes et al., arXiv:1802.03426).

The objective is that of the paper. It is minimised by Adam on all edges at once, with the same random points against
which each point repels in one step, instead of one edge after the other: this needs no compiler and gives the same map
for the same seed.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Int64
from scipy import sparse

NEIGHBOURS = 15
STEPS = 300
LANDMARKS = 20_000
"""Vectors that are mapped by UMAP; further ones are placed among their nearest landmarks."""
_A, _B = 1.577, 0.895  # the curve 1 / (1 + a d^2b) for a minimum distance of 0.1, see section 3.2
_NEGATIVES = 10  # random points that a point repels in one step
_NEGATIVE_RATE = 5.0  # repulsions per attraction, see section 3.2
_RATE = 0.3
_PLACED_BY = 5  # landmarks among which a further vector is placed
_BLOCK = 512


def umap(
    rows: Float32[np.ndarray, "n d"], *, seed: int, advance: Callable[[], None] = lambda: None
) -> Float32[np.ndarray, "n 2"]:
    """Map at least two vectors to two dimensions; near vectors, by Euclidean distance, come to lie near each other.

    Args:
        rows: the vectors; a few dozen principal components suffice and are fast.
        seed: seed of the landmarks and of the repulsion.
        advance: called after every fraction of a second of work; what it raises ends the work.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(rows), min(LANDMARKS, len(rows)), replace=False))
    landmarks = rows[chosen]
    near, distances = nearest(landmarks, landmarks, min(NEIGHBOURS, len(chosen) - 1), itself=False, advance=advance)
    placed = minimise(fuzzy_graph(near, distances), _first_places(landmarks), seed=seed, advance=advance)
    places = np.empty((len(rows), 2), dtype=np.float32)
    places[chosen] = placed
    others = np.setdiff1d(np.arange(len(rows)), chosen)
    if len(others):
        near, distances = nearest(rows[others], landmarks, _PLACED_BY, advance=advance)
        closeness = 1 / np.maximum(distances, 1e-6)
        weights = closeness / closeness.sum(axis=1, keepdims=True)
        places[others] = (placed[near] * weights[..., None]).sum(axis=1)
    return places


def nearest(
    rows: Float32[np.ndarray, "n d"],
    of: Float32[np.ndarray, "m d"],
    count: int,
    *,
    itself: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Return for each row the `count` nearest vectors of `of`, nearest first, and their Euclidean distances.

    With `itself=False`, `rows` and `of` are the same vectors, and none is its own neighbour.
    """
    points, squares = torch.from_numpy(of), torch.from_numpy((of**2).sum(axis=1))
    found, distances = [], []
    for start in range(0, len(rows), _BLOCK):
        block = torch.from_numpy(rows[start : start + _BLOCK])
        apart = torch.addmm(squares[None], block, points.T, alpha=-2)
        if not itself:
            apart[torch.arange(len(block)), start + torch.arange(len(block))] = torch.inf
        nearest_of_block = apart.topk(count, largest=False).indices
        found.append(nearest_of_block)
        # Differences are exact where the expanded square loses all digits, between equal vectors.
        distances.append((block[:, None] - points[nearest_of_block]).norm(dim=2))
        advance()
    order = torch.cat(distances).sort(dim=1, stable=True)
    return torch.cat(found).gather(1, order.indices).numpy(), order.values.numpy()


def fuzzy_graph(near: Int64[np.ndarray, "n k"], distances: Float32[np.ndarray, "n k"]) -> sparse.csr_array:
    """Return the symmetric weights of the graph of neighbours (algorithms 2 and 3 of the paper).

    The nearest neighbour of each vector has the weight one, and the weights of all its neighbours sum to `log2(k + 1)`.
    """
    count = len(near)
    beyond = distances.astype(np.float64) - distances[:, :1]
    low, high = np.zeros(count), np.full(count, np.inf)
    scale, total = np.ones(count), np.log2(near.shape[1] + 1)
    for _ in range(64):  # bisection
        too_wide = np.exp(-beyond / scale[:, None]).sum(axis=1) > total
        high, low = np.where(too_wide, scale, high), np.where(too_wide, low, scale)
        scale = np.where(np.isinf(high), 2 * scale, (low + high) / 2)
        scale = np.clip(scale, 1e-9, 1e9)  # neighbours at one distance fit no scale
    weights = np.exp(-beyond / scale[:, None])
    start = np.arange(0, near.size + 1, near.shape[1])
    graph = sparse.csr_array((weights.ravel(), near.ravel(), start), shape=(count, count))
    return (graph + graph.T - graph * graph.T).tocsr()


def minimise(
    graph: sparse.csr_array,
    places: Float32[np.ndarray, "n 2"],
    *,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Float32[np.ndarray, "n 2"]:
    """Move points from their first places until the map fits the graph."""
    edges = sparse.triu(graph, 1).tocoo()
    one, two = (torch.from_numpy(side.astype(np.int64)) for side in edges.coords)
    weights = torch.from_numpy(edges.data.astype(np.float32))[:, None]
    degree = torch.from_numpy(np.asarray(graph.sum(axis=1), dtype=np.float32))[:, None]
    count, generator = len(places), torch.Generator().manual_seed(seed)
    at = torch.from_numpy(places.copy())
    optimizer = torch.optim.Adam([at], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        apart = at[one] - at[two]
        square = (apart**2).sum(dim=1, keepdim=True).clamp_min(1e-6)
        pull = weights * (2 * _A * _B) * square ** (_B - 1) / (1 + _A * square**_B) * apart
        gradient = torch.zeros_like(at).index_add_(0, one, pull).index_add_(0, two, -pull)
        for _ in range(_NEGATIVES):
            apart = at - at[torch.randint(count, (count,), generator=generator)]
            square = (apart**2).sum(dim=1, keepdim=True)
            push = (2 * _B) / ((0.001 + square) * (1 + _A * square**_B)) * apart
            gradient -= degree * (_NEGATIVE_RATE / _NEGATIVES) * push
        at.grad = gradient
        optimizer.step()
        schedule.step()
        advance()
    return at.numpy()


def _first_places(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n 2"]:
    """Return the first two principal components, 10 units in size."""
    centred = rows - rows.mean(axis=0)
    vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, :-3:-1]
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0))
    places = np.zeros((len(rows), 2))
    places[:, : vectors.shape[1]] = centred @ vectors
    return (places * (10 / max(np.abs(places).max(), 1e-12))).astype(np.float32)
