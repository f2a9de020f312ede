"""From pixels of any depth and any number of bands to the 8-bit channels that everything else sees.

Training, scoring and every picture go through the same `Rendering`; it is stored beside the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Image, Pixels

CURVES = ("linear", "sqrt", "log", "asinh", "midtones")
INTERVALS = ("auto", "minmax", "percentile", "zscale")
DEFAULT_BANDS = {1: ("grey",), 2: ("band0", "band1"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
PARAMETERS = {"log": 1000.0, "asinh": 0.1, "midtones": 0.25}
"""`a` of the logarithm, `a` of the arcsinh (astropy.visualization), and where the median goes for the midtones."""

HUGE = 1e150
"""What is larger counts as infinite: its square overflows, and only fill values are as large."""

Number = int | float
Pair = Sequence[Number]
Matrix = Mapping[str, Mapping[str, Number]]


@dataclass(frozen=True)
class Rendering:
    """How pixels become 8-bit channels: combine bands, clip to an interval, bend by a curve.

    Attributes:
        interval: `auto` (8-bit images as they are, others by their own range), `minmax`, `percentile` or `zscale`.
        curve: `linear`, `sqrt`, `log`, `asinh` or `midtones` (the median goes to `parameter`).
        parameter: of the curve; None takes the usual one. The linear curve and the square root have none.
        percentiles: lower and upper one for `interval=percentile`.
        limits: fixed interval of a channel by its name, in the units of the archive; the others keep `interval`.
        per_channel: an interval for each channel, and a median for midtones; otherwise one for all, which keeps
            colours.
        combine: output channels as weighted sums of bands, by name: {"red": {"i": 1}, "blue": {"g": 0.5, "u": 0.5}};
            None takes every band as a channel.

    Raises:
        ConfigError: if a name is unknown or a number out of range.
    """

    interval: str = "auto"
    curve: str = "linear"
    parameter: Number | None = None
    percentiles: Pair = (0.5, 99.5)
    limits: Mapping[str, Pair] | None = None
    per_channel: bool = True
    combine: Matrix | None = None

    def __post_init__(self) -> None:
        _choice("stretch.interval", self.interval, INTERVALS)
        _choice("stretch.curve", self.curve, CURVES)
        low, high = _pair("stretch.percentiles", self.percentiles)
        if not 0 <= low < high <= 100:
            raise ConfigError(f"stretch.percentiles are {low} and {high}: they must rise and lie between 0 and 100")
        self._check_parameter()
        # Plain values, whatever they came as: renderings that do the same are equal, and so are their fingerprints.
        object.__setattr__(self, "percentiles", (low, high))
        object.__setattr__(self, "limits", _limits(self.limits))
        object.__setattr__(self, "combine", _matrix(self.combine))

    def _check_parameter(self) -> None:
        if self.parameter is None:
            return
        if self.curve not in PARAMETERS:
            raise ConfigError(
                f"stretch.parameter is {self.parameter}: the {self.curve} curve has none, set stretch.curve"
            )
        if not _number("stretch.parameter", self.parameter) > 0:
            raise ConfigError(f"stretch.parameter is {self.parameter}: it must be positive")
        if self.curve == "midtones" and not self.parameter < 1:
            raise ConfigError(f"stretch.parameter is {self.parameter}: for midtones it must lie between 0 and 1")

    @property
    def _parameter(self) -> float:
        return float(PARAMETERS[self.curve] if self.parameter is None else self.parameter)

    @property
    def keeps_eight_bits(self) -> bool:
        """Whether 8-bit images pass as they are."""
        return self.interval == "auto" and self.curve == "linear" and not self.limits and self.combine is None

    def channels(self, bands: Sequence[str]) -> tuple[str, ...]:
        """Names of the output channels for an archive with `bands`.

        Raises:
            DataError: if `combine` or `limits` name something that is not there.
        """
        combined = self.combine or {}
        unknown = {band for row in combined.values() for band in row} - set(bands)
        if unknown:
            raise DataError(
                f"stretch.combine names the bands {', '.join(sorted(unknown))}, but there are {', '.join(bands)}"
            )
        names = tuple(combined) or tuple(bands)
        stray = set(self.limits or {}) - set(names)
        if stray:
            raise DataError(
                f"stretch.limits names the channels {', '.join(sorted(stray))}, but there are {', '.join(names)}"
            )
        return names

    def __call__(self, pixels: Pixels, bands: Sequence[str]) -> Image:
        """Render one image, (h, w, band), to 8 bits, (h, w, channel).

        NaN becomes 0, infinities the darkest and brightest value. A channel of one value becomes 0.

        Raises:
            UnreadableImageError: if no pixel is a finite number, or there is another number of bands.
        """
        if pixels.shape[2] != len(bands):
            raise UnreadableImageError(f"it has {pixels.shape[2]} bands instead of {len(bands)}: {', '.join(bands)}")
        if not pixels.size:
            raise UnreadableImageError("it has no pixels")
        if pixels.dtype == np.uint8 and self.keeps_eight_bits:
            return pixels
        if pixels.dtype.kind not in "biuf":
            raise UnreadableImageError(f"its pixels are {pixels.dtype}, which are no real numbers")
        names = self.channels(bands)
        values = self._combined(pixels, bands)
        finite = np.isfinite(values)
        if not finite.any():
            raise UnreadableImageError("there is no finite pixel value in it")
        fixed = self.limits or {}
        common = None if self.per_channel else self._interval(values[finite], pixels.dtype)
        scaled = []
        for k, name in enumerate(names):
            plane = values[..., k]
            low, high = fixed[name] if name in fixed else common or self._interval(plane[finite[..., k]], pixels.dtype)
            scaled.append(_scaled(plane, float(low), float(high)))
        return np.rint(self._bent(np.stack(scaled, axis=2), finite) * 255.0).astype(np.uint8)

    def _combined(self, pixels: Pixels, bands: Sequence[str]) -> Float64[np.ndarray, "h w c"]:
        with np.errstate(over="ignore", invalid="ignore"):
            values = pixels.astype(np.float64)
            if self.combine is not None:
                matrix = np.array([[row.get(band, 0.0) for band in bands] for row in self.combine.values()])
                # Only what is named is summed: a NaN in another band must not spread.
                values = np.stack([values[..., row != 0] @ row[row != 0] for row in matrix], axis=2)
        if pixels.dtype.kind == "f":
            values = np.where(np.abs(values) > HUGE, np.copysign(np.inf, values), values)
        return values

    def _interval(self, finite: Float64[np.ndarray, " n"], dtype: np.dtype) -> tuple[float, float]:
        if not finite.size:
            return 0.0, 0.0
        if self.interval == "auto" and dtype == np.uint8:
            return 0.0, 255.0
        if self.interval == "percentile":
            low, high = np.percentile(finite, list(self.percentiles))
        elif self.interval == "zscale":
            from astropy.visualization import ZScaleInterval

            low, high = ZScaleInterval().get_limits(finite)
        else:
            low, high = finite.min(), finite.max()
        return float(low), float(high)

    def _bent(
        self, scaled: Float32[np.ndarray, "h w c"], finite: Bool[np.ndarray, "h w c"]
    ) -> Float32[np.ndarray, "h w c"]:
        if self.curve == "sqrt":
            return np.sqrt(scaled)
        if self.curve == "log":
            from astropy.visualization import LogStretch

            return LogStretch(self._parameter)(scaled, clip=False)
        if self.curve == "asinh":
            from astropy.visualization import AsinhStretch

            return AsinhStretch(self._parameter)(scaled, clip=False)
        if self.curve == "midtones" and self.per_channel:
            planes = [self._to_median(scaled[..., k], finite[..., k]) for k in range(scaled.shape[2])]
            return np.stack(planes, axis=2)
        return self._to_median(scaled, finite) if self.curve == "midtones" else scaled

    def _to_median(
        self, scaled: Float32[np.ndarray, "*shape"], finite: Bool[np.ndarray, "*shape"]
    ) -> Float32[np.ndarray, "*shape"]:
        """Bend so that the median comes to the parameter; pixels that are missing have no part in it."""
        median = float(np.median(scaled[finite])) if finite.any() else 0.0
        if not 0 < median < 1:
            return scaled
        return midtones(scaled.astype(np.float64), midtones(median, self._parameter)).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Rendering(**values)` brings it back."""
        values = asdict(self)
        values["percentiles"] = list(self.percentiles)
        values["limits"] = {k: list(v) for k, v in self.limits.items()} if self.limits else None
        values["combine"] = {k: dict(v) for k, v in self.combine.items()} if self.combine else None
        return values


def midtones(x: Any, balance: float) -> Any:
    """The midtones transfer function of astronomical image editors: 0 and 1 stay, `balance` goes to 0.5.

    It is its own inverse in the sense that midtones(m, midtones(m, t)) = t, so that the balance which moves a median m
    to t is midtones(m, t).
    """
    return (balance - 1) * x / ((2 * balance - 1) * x - balance)


def band_names(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names of `count` bands: those `given`, or the usual ones.

    Raises:
        ConfigError: if there are not `count` of them, or two are the same.
    """
    if given is None:
        return DEFAULT_BANDS.get(count) or tuple(f"band{i}" for i in range(count))
    names = tuple(str(name) for name in given)
    if len(names) != count or len(set(names)) < count:
        raise ConfigError(f"dataset.source.bands={list(names)}: expected {count} different names, one for each band")
    return names


def _scaled(plane: Float64[np.ndarray, "h w"], low: float, high: float) -> Float32[np.ndarray, "h w"]:
    if not high > low:
        return np.zeros(plane.shape, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        unit = (plane.clip(low, high) - low) / (high - low)
    return np.nan_to_num(unit, nan=0.0).astype(np.float32)


def _choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} is {value!r}: choose one of {', '.join(choices)}")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{key} is {value}: it must be a number")
    return float(value)


def _pair(key: str, values: Any) -> tuple[float, float]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 2:
        raise ConfigError(f"{key} is {values}: it must be a list of two numbers")
    low, high = (_number(key, value) for value in values)
    return low, high


def _limits(given: Any) -> dict[str, tuple[float, float]] | None:
    limits = {}
    for channel, pair in _items("stretch.limits", given, "{CHANNEL: [LOW, HIGH]}"):
        low, high = _pair(f"stretch.limits.{channel}", pair)
        if not low < high:
            raise ConfigError(f"stretch.limits.{channel} are {low} and {high}: the first must be the smaller one")
        limits[channel] = (low, high)
    return limits or None


def _matrix(given: Any) -> dict[str, dict[str, float]] | None:
    matrix = {}
    for channel, row in _items("stretch.combine", given, "{CHANNEL: {BAND: WEIGHT}}"):
        key = f"stretch.combine.{channel}"
        matrix[channel] = {band: _number(f"{key}.{band}", w) for band, w in _items(key, row, "{BAND: WEIGHT}")}
        if not any(matrix[channel].values()):
            raise ConfigError(f"{key} has no band: give it at least one with a weight other than 0")
    return matrix or None


def _items(key: str, given: Any, form: str) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} is {given}: it must have the form {form}")
    return [(str(name), value) for name, value in given.items()]
