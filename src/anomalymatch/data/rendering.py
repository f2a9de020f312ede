"""Conversion of pixels of any depth and number of bands to 8-bit channels.

Training, scoring and the labelling page use the same `Rendering`; it is stored beside the weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from anomalymatch.checks import Number, check_choice, check_range
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.text import listed
from anomalymatch.types import Image, Pixels

CURVES = ("linear", "sqrt", "log", "asinh", "midtones")
FITS = ("stretch", "pad", "crop")
INTERVALS = ("auto", "minmax", "percentile", "zscale")
DEFAULT_BANDS = {1: ("grey",), 2: ("band0", "band1"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
PARAMETERS = {"log": 1000.0, "asinh": 0.1, "midtones": 0.25}
"""Default parameters: `a` of the logarithm and the arcsinh (astropy.visualization), target median of the midtones."""

HOLE = 1e30
"""Larger values are holes like NaN, since only fill values are as large (±3.4e38 or 1e30); infinity is none."""

Pair = Sequence[Number]
Matrix = Mapping[str, Mapping[str, Number]]


@dataclass(frozen=True)
class Rendering:
    """Stretch of pixels to 8-bit channels: combine bands, clip to an interval, apply a curve.

    Attributes:
        interval: `auto` (0 to 255 for 8-bit images, else the image's own range), `minmax`, `percentile` or `zscale`.
        curve: `linear`, `sqrt`, `log`, `asinh` or `midtones` (moves the median to `parameter`).
        parameter: parameter of `log`, `asinh` or `midtones`; None takes the default.
        percentiles: lower and upper percentile for `interval=percentile`.
        limits: fixed interval by channel name, in the units of the archive; other channels use `interval`.
        per_channel: use a separate interval, and median for midtones, for each channel; otherwise a common one, which
            keeps colours.
        combine: output channels as weighted sums of bands, by name: {"red": {"i": 1}, "blue": {"g": 0.5, "u": 0.5}};
            None takes every band as a channel.
        fit: how an image that is not square becomes one for the network (see `stream.resize`): `stretch`, `pad` or
            `crop`. It leaves the rendered image itself as it is.

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
    fit: str = "stretch"

    def __post_init__(self) -> None:
        check_choice("stretch.interval", self.interval, INTERVALS)
        check_choice("stretch.curve", self.curve, CURVES)
        check_choice("dataset.fit", self.fit, FITS)
        low, high = _pair("stretch.percentiles", self.percentiles)
        if not 0 <= low < high <= 100:
            raise ConfigError(f"stretch.percentiles are {low} and {high}: they must rise and lie between 0 and 100")
        if self.parameter is not None:
            if self.curve not in PARAMETERS:
                raise ConfigError(
                    f"stretch.parameter is {self.parameter}: the {self.curve} curve has none, set stretch.curve"
                )
            check_range("stretch.parameter", self.parameter, above=0, below=1 if self.curve == "midtones" else math.inf)
        # Plain values, whatever their types were: equal renderings must have equal fingerprints.
        object.__setattr__(self, "percentiles", (low, high))
        object.__setattr__(self, "limits", _limits(self.limits))
        object.__setattr__(self, "combine", _matrix(self.combine))

    @property
    def _parameter(self) -> float:
        return float(PARAMETERS[self.curve] if self.parameter is None else self.parameter)

    @property
    def keeps_eight_bits(self) -> bool:
        """True if 8-bit images stay unchanged."""
        return self.interval == "auto" and self.curve == "linear" and not self.limits and self.combine is None

    def channels(self, bands: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the output channels for an archive with `bands`.

        Raises:
            DataError: if `combine` names a missing band, or `limits` a missing channel.
        """
        combined = self.combine or {}
        unknown = {band for row in combined.values() for band in row} - set(bands)
        if unknown:
            raise DataError(f"stretch.combine names the bands {listed(sorted(unknown))}, but there are {listed(bands)}")
        names = tuple(combined) or tuple(bands)
        unknown = set(self.limits or {}) - set(names)
        if unknown:
            raise DataError(
                f"stretch.limits names the channels {listed(sorted(unknown))}, but there are {listed(names)}"
            )
        return names

    def __call__(self, pixels: Pixels, bands: Sequence[str]) -> Image:
        """Render one image, (h, w, band), to 8 bits, (h, w, channel).

        NaN, fill values (`HOLE`) and constant channels become 0, minus and plus infinity the darkest and brightest
        value.

        Raises:
            UnreadableImageError: if no pixel is a finite number, or the number of bands is wrong.
        """
        if pixels.shape[2] != len(bands):
            raise UnreadableImageError(f"it has {pixels.shape[2]} bands instead of {len(bands)}: {listed(bands)}")
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
        return np.rint(self._curved(np.stack(scaled, axis=2), finite) * 255.0).astype(np.uint8)

    def _combined(self, pixels: Pixels, bands: Sequence[str]) -> Float64[np.ndarray, "h w c"]:
        with np.errstate(over="ignore", invalid="ignore"):
            values = pixels.astype(np.float64)
            if pixels.dtype.kind == "f":
                values[np.isfinite(values) & (np.abs(values) >= HOLE)] = np.nan
            if self.combine is not None:
                matrix = np.array([[row.get(band, 0.0) for band in bands] for row in self.combine.values()])
                # Sum only bands with a weight: a NaN in another band must not spread.
                values = np.stack([values[..., row != 0] @ row[row != 0] for row in matrix], axis=2)
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

    def _curved(
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
        """Move the median of the finite pixels to the parameter."""
        median = float(np.median(scaled[finite])) if finite.any() else 0.0
        if not 0 < median < 1:
            return scaled
        return midtones(scaled.astype(np.float64), midtones(median, self._parameter)).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which `Rendering(**values)` takes."""
        return json.loads(json.dumps(asdict(self)))


def midtones(x: Any, balance: float) -> Any:
    """Apply the midtones transfer function of astronomical image editors: 0 and 1 stay, `balance` becomes 0.5.

    Since midtones(m, midtones(m, t)) = t, the balance midtones(m, t) moves a median m to t.
    """
    return (balance - 1) * x / ((2 * balance - 1) * x - balance)


def band_names(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return the names of `count` bands: `given`, or defaults.

    Raises:
        ConfigError: if the number of names is wrong, or two are equal.
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


def _pair(key: str, values: Any) -> tuple[float, float]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 2:
        raise ConfigError(f"{key} is {values}: it must be a list of two numbers")
    for value in values:
        check_range(key, value, below=math.inf)
    return float(values[0]), float(values[1])


def _limits(given: Any) -> dict[str, tuple[float, float]] | None:
    limits = {}
    for channel, pair in _items("stretch.limits", given, "{CHANNEL: [LOW, HIGH]}"):
        low, high = _pair(f"stretch.limits.{channel}", pair)
        if not low < high:
            raise ConfigError(f"stretch.limits.{channel} are {low} and {high}: the first must be the smaller one")
        limits[channel] = (low, high)
    return limits or None


def _matrix(given: Any) -> dict[str, dict[str, float]] | None:
    matrix: dict[str, dict[str, float]] = {}
    for channel, row in _items("stretch.combine", given, "{CHANNEL: {BAND: WEIGHT}}"):
        key = f"stretch.combine.{channel}"
        matrix[channel] = {}
        for band, weight in _items(key, row, "{BAND: WEIGHT}"):
            check_range(f"{key}.{band}", weight, below=math.inf)
            matrix[channel][band] = float(weight)
        if not any(matrix[channel].values()):
            raise ConfigError(f"{key} has no band: give it at least one with a weight other than 0")
    return matrix or None


def _items(key: str, given: Any, form: str) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} is {given}: it must have the form {form}")
    return [(str(name), value) for name, value in given.items()]
