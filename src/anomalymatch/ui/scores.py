"""The scores on the page: those of the live probe, of the last training, or of both together."""

import numpy as np
from jaxtyping import Float32

from anomalymatch.errors import ConfigError

MODES = ("live", "trained", "both")
Logits = Float32[np.ndarray, " n"]


class Scores:
    """Logits of every image by what ranks; NaN for images that cannot be read.

    Attributes:
        live: of the probe on the labels of this moment; None before it can be fitted.
        trained: of the last training; None before the first.
    """

    def __init__(self) -> None:
        self.live: Logits | None = None
        self.trained: Logits | None = None
        self._chosen = "both"

    @property
    def modes(self) -> tuple[str, ...]:
        """What can rank now."""
        if self.trained is None:
            return MODES[:1]
        return MODES if self.live is not None else MODES[1:2]

    @property
    def mode(self) -> str:
        """What ranks: what was chosen, as far as it is there."""
        return self._chosen if self._chosen in self.modes else self.modes[-1]

    def choose(self, mode: str) -> None:
        """Rank by `mode`.

        Raises:
            ConfigError: if there is no such mode, or not yet.
        """
        if mode not in self.modes:
            raise ConfigError(f"cannot rank by {mode!r} now: choose one of {', '.join(self.modes)}")
        self._chosen = mode

    def logits(self) -> Logits | None:
        """What ranks; None before anything can."""
        if self.mode == "both" and self.live is not None and self.trained is not None:
            return mean_logits(self.live, self.trained)
        return self.trained if self.mode == "trained" else self.live


def mean_logits(live: Logits, trained: Logits) -> Logits:
    """The mean of both in units of their own spread, on the scale of the first.

    A trained network is far surer of itself than the probe: the mean of the plain logits would be its ranking alone.
    """
    finite = np.isfinite(live) & np.isfinite(trained)
    if not finite.any():
        return live
    (m1, s1), (m2, s2) = (_spread(values[finite]) for values in (live, trained))
    return (live + (trained - m2) * (s1 / s2) + m1) / 2


def _spread(values: Logits) -> tuple[np.float32, np.float32]:
    mean, sd = values.mean(), values.std()
    return mean, sd if sd > 0 else np.float32(1)
