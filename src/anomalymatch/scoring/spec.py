"""Settings of a scoring job."""

from dataclasses import dataclass

from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import ConfigError
from anomalymatch.scoring.backends import BACKENDS
from anomalymatch.scoring.parts import share_of

ENGINES, DECODERS = ("local", "ray"), ("cpu", "gpu")


@dataclass(frozen=True)
class ScoringSpec:
    """Settings of a scoring job; the defaults are in conf/scoring/default.yaml.

    Attributes:
        engine: `local` or `ray`.
        backend: see `backends.make_scorer`.
        batch_size: images in a batch; None finds it.
        part_images: images that are written at once.
        decode: `cpu`, or `gpu` for JPEGs.
        shard: share `i/n` of a job array.
        top: number of most anomalous images that are listed and shown.
        features: keep the pooled features.
        actors: scoring processes of `ray`; None chooses.
        ray_address: existing cluster of `ray`; None starts one.
    """

    engine: str
    backend: str
    batch_size: int | None
    part_images: int
    decode: str
    shard: str
    top: int
    features: bool
    actors: int | None
    ray_address: str | None

    def __post_init__(self) -> None:
        check_choice("scoring.engine", self.engine, ENGINES)
        check_choice("scoring.backend", self.backend, BACKENDS)
        check_choice("scoring.decode", self.decode, DECODERS)
        if self.decode == "gpu" and self.engine == "ray":
            raise ConfigError("scoring.decode=gpu needs scoring.engine=local: Ray decodes on CPUs")
        check_range("scoring.batch_size", self.batch_size, low=1, null=True)
        check_range("scoring.part_images", self.part_images, low=1)
        check_range("scoring.actors", self.actors, low=1, null=True)
        check_range("scoring.top", self.top, low=0)
        share_of(1, self.shard)
