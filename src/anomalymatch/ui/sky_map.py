"""Map of the sky: the places of what was found, over a sample of the archive, in the Hammer-Aitoff projection."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from anomalymatch.types import Label
from anomalymatch.ui.sky import Coordinates

SAMPLE, TRIED, LEAST = 1000, 20, 3
"""Images whose positions show the archive, those tried first, and the fewest positions of a map."""
PATIENCE_S = 10.0
"""Longest time for the sample: each position may need the header of a file."""
MOST_FOUND = 2000
RIM = (2 * math.sqrt(2), math.sqrt(2))
"""Half axes of the whole sky on the map."""
STEPS = (30.0, 15.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Distances in degrees that the lines of the grid may have."""
_WHOLE = 0.3
"""Share of the width of the sky from which on the whole sky is shown."""

Places = Float64[np.ndarray, "_ 2"]


def hammer(ra: Float64[np.ndarray, " n"], dec: Float64[np.ndarray, " n"], centre: float) -> Float64[np.ndarray, "n 2"]:
    """Project positions in degrees by Hammer and Aitoff: equal areas, the right ascension `centre` in the middle.

    The sky is an ellipse with the half axes `RIM`; north is up and east is left (Calabretta and Greisen 2002,
    section 5.3.3, in radians).
    """
    longitude = np.radians((ra - centre + 180) % 360 - 180)
    latitude = np.radians(dec)
    scale = np.sqrt(2 / (1 + np.cos(latitude) * np.cos(longitude / 2)))
    x = -2 * scale * np.cos(latitude) * np.sin(longitude / 2)
    return np.stack([x, scale * np.sin(latitude)], axis=1)


@dataclass(frozen=True)
class SkyView:
    """Places on the map, with the part of it to show.

    Attributes:
        archive: sample of the images of the archive.
        found: images labelled anomaly.
        ids: their ids.
        lines: lines of the grid.
        names: text and place of each name of a line.
        limits: the least and the largest x, then y.
    """

    archive: Places
    found: Places
    ids: Sequence[str]
    lines: Sequence[Places]
    names: Sequence[tuple[str, float, float]]
    limits: tuple[float, float, float, float]

    def without(self, hidden: Collection[str]) -> "SkyView":
        """Return the view without some of what was found."""
        kept = [k for k, id_ in enumerate(self.ids) if id_ not in hidden]
        return replace(self, found=self.found[kept], ids=[self.ids[k] for k in kept])


class SkyMap:
    """Map of the positions of an archive. The sample is taken once, when it is first asked for.

    Args:
        ids: all images.
        coordinates: returns the position of an image, or None.
        labels: returns the label of each labelled image.

    Attributes:
        turn: lock of the coroutines that call `view`: while the sample is taken, waiting pages hold no thread.
    """

    def __init__(
        self,
        ids: Sequence[str],
        coordinates: Callable[[str], Coordinates | None],
        labels: Callable[[], Mapping[str, Label]],
    ) -> None:
        self._ids, self._coordinates, self._labels = ids, coordinates, labels
        self._lock, self.turn = threading.Lock(), asyncio.Lock()
        self._archive: Places | None = None
        self._known: dict[str, Coordinates | None] = {}

    def view(self) -> SkyView | None:
        """Return the present map; None if most images, of a few that are tried, have no coordinates."""
        with self._lock:  # all open pages share the work
            if self._archive is None:
                self._archive = self._sample()
            if len(self._archive) < LEAST:
                return None
            found = [id_ for id_, label in self._labels().items() if label is Label.ANOMALY][-MOST_FOUND:]
            for id_ in found:
                if id_ not in self._known:
                    self._known[id_] = self._coordinates(id_)
            places = {id_: place for id_ in found if (place := self._known[id_]) is not None}
        return _view(self._archive, places)

    def _sample(self) -> Places:
        rng, end = np.random.default_rng(0), time.monotonic() + PATIENCE_S
        found: list[Coordinates] = []
        for count, i in enumerate(rng.choice(len(self._ids), min(SAMPLE, len(self._ids)), replace=False), 1):
            place = self._coordinates(self._ids[i])
            found += [] if place is None else [place]
            if time.monotonic() > end or (count == TRIED and len(found) < TRIED / 2):
                break
        return np.array(found if 2 * len(found) >= count else [], dtype=np.float64).reshape(-1, 2)


def _view(archive: Places, found: Mapping[str, Coordinates]) -> SkyView:
    sky = np.concatenate([archive, np.array(list(found.values()), dtype=np.float64).reshape(-1, 2)])
    turn = np.exp(1j * np.radians(sky[:, 0])).sum()
    centre = float(np.degrees(np.angle(turn))) % 360
    places = hammer(sky[:, 0], sky[:, 1], centre)
    (left, low), (right, high) = places.min(axis=0).tolist(), places.max(axis=0).tolist()
    if right - left > _WHOLE * 2 * RIM[0]:
        centre = round(centre / 30) * 30.0 % 360
        places = hammer(sky[:, 0], sky[:, 1], centre)
        lines, names = _whole_grid(centre)
        limits = (-1.02 * RIM[0], 1.02 * RIM[0], -1.06 * RIM[1], 1.06 * RIM[1])
    else:
        margin = max(0.1 * (right - left), 0.1 * (high - low), math.radians(STEPS[-1]))
        limits = (left - margin, right + margin, low - margin, high + margin)
        lines, names = _part_grid(sky, centre)
    return SkyView(places[: len(archive)], places[len(archive) :], list(found), lines, names, limits)


def _whole_grid(centre: float) -> tuple[list[Places], list[tuple[str, float, float]]]:
    """Return lines each 30 degrees, with the rim, and the names of some."""
    along, down = np.linspace(-179.99, 179.99, 91), np.linspace(-90, 90, 61)
    lines = [hammer(along + centre, np.full_like(along, dec), centre) for dec in range(-60, 61, 30)]
    offsets = (*range(-150, 151, 30), -179.99, 179.99)
    lines += [hammer(np.full_like(down, centre + offset), down, centre) for offset in offsets]
    names = [_name((centre + offset) % 360, 0.0, centre, "ra") for offset in (-120, -60, 0, 60, 120)]
    names += [_name((centre - 179) % 360, float(dec), centre, "dec") for dec in (-60, -30, 30, 60)]
    return lines, names


def _part_grid(sky: Places, centre: float) -> tuple[list[Places], list[tuple[str, float, float]]]:
    """Return lines around a part of the sky, and their names."""
    offset = (sky[:, 0] - centre + 180) % 360 - 180
    dec = sky[:, 1]
    wide, high = (max(float(np.ptp(values)), 4 * STEPS[-1]) for values in (offset, dec))
    east, west = offset.max() + wide, offset.min() - wide
    south, north = max(-90.0, dec.min() - high), min(90.0, dec.max() + high)
    lines, names = [], []
    step = next((step for step in STEPS if wide / step >= 2), STEPS[-1])
    down = np.linspace(south, north, 41)
    for ra in np.arange(np.ceil((centre + west) / step), (centre + east) / step) * step:
        lines.append(hammer(np.full_like(down, ra), down, centre))
        names.append(_name(float(ra) % 360, float(dec.min()), centre, "ra"))
    step = next((step for step in STEPS if high / step >= 2), STEPS[-1])
    along = np.linspace(west, east, 41)
    for line in np.arange(np.ceil(south / step), north / step) * step:
        lines.append(hammer(along + centre, np.full_like(along, line), centre))
        names.append(_name((centre + float(offset.max())) % 360, float(line), centre, "dec"))
    return lines, names


def _name(ra: float, dec: float, centre: float, of: str) -> tuple[str, float, float]:
    """Return the text and the place of a name of a line."""
    ((x, y),) = hammer(np.array([ra]), np.array([dec]), centre).tolist()
    return (f"{round(ra, 4):g}°" if of == "ra" else f"{round(dec, 4):+g}°"), x, y
