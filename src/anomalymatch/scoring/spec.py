"""TODO."""

from dataclasses import dataclass

from anomalymatch.errors import ConfigError
from anomalymatch.scoring.parts import share_of

ENGINES = ("local", "ray")


DECODERS = ("cpu", "gpu")


@dataclass(frozen=True)
class ScoringSpec:
    """How to score; see conf/scoring/default.yaml.

    Attributes:
        engine: `local` or `ray`.
        backend: see `backends.make_scorer`.
        batch_size: images in a batch; None finds it.
        part_images: images that are written at once.
        decode: `cpu`, or `gpu` for JPEGs.
        shard: share `i/n` of a job array.
        top: how many of the most anomalous images are listed and shown.
        features: keep the pooled features.
        actors: of `ray`: scoring processes; None lets it choose.
        ray_address: of `ray`: an existing cluster.
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
        if self.engine not in ENGINES:
            raise ConfigError(f"scoring.engine is {self.engine!r}: choose one of {', '.join(ENGINES)}")
        if self.decode not in DECODERS:
            raise ConfigError(f"scoring.decode is {self.decode!r}: choose one of {', '.join(DECODERS)}")
        if self.decode == "gpu" and self.engine == "ray":
            raise ConfigError("scoring.decode=gpu is for scoring.engine=local: Ray decodes on its processors")
        least = {"batch_size": self.batch_size, "part_images": self.part_images, "actors": self.actors}
        for key, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"scoring.{key} is {value}: it must be at least 1")
        if self.top < 0:
            raise ConfigError(f"scoring.top is {self.top}: it cannot be negative")
        share_of(1, self.shard)
