"""Compare the ways to make an image square, `dataset.fit`, by the probe with 5 anomalies and 100 normals (README, 1).

The images are magnetic tiles, and photographs of miniImageNet that are cut to 3:2, upright and lying in turn.
"""

import numpy as np
from bench import (
    Row,
    dataset_overrides,
    format_interval,
    group_by,
    make_parser,
    markdown,
    parse_options,
    table,
    write_csv,
)
from probe_miniimagenet import CLASSES, OTHER_CLASSES

from anomalymatch import ImageSource, evaluate, initial_labels, make_learner, make_task, open_task
from anomalymatch.data import Rendering
from anomalymatch.data.rendering import FITS
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.types import Pixels

DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
PHOTOGRAPHS = {**CLASSES, **OTHER_CLASSES}
FURTHER_CLASSES = 20
"""Classes of photographs besides those of the tasks."""


class CutPhotographs(ImageSource):
    """Photographs of some classes, of which the central two thirds are kept in height or width."""

    def __init__(self, photographs: ImageSource, classes: set[str], fit: str) -> None:
        truth = {id_: name for id_, name in (photographs.truth or {}).items() if name in classes}
        ids = [id_ for id_ in photographs.ids if id_ in truth]
        super().__init__(
            name="photographs",
            ids=ids,
            fingerprint=f"cut {len(classes)} {photographs.fingerprint}",
            rendering=Rendering(fit=fit),
            truth=truth,
        )
        self.photographs = photographs

    def load(self, position: int) -> Pixels:
        """Return the pixels of a photograph that is cut."""
        pixels = self.photographs.pixels(self.ids[position])
        third = pixels.shape[0] // 6
        return pixels[third:-third] if position % 2 else pixels[:, third:-third]


def main() -> None:
    """Measure all tasks and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=8, help="number of initial label sets")
    options = parse_options(parser)
    draws = 2 if options.quick else options.draws
    rows: list[Row] = []
    for fit in FITS:
        _, root = dataset_overrides("magnetic_tile")
        tiles = open_task("parquet", root, f"dataset.fit={fit}").source
        defects = {name: name for name in DEFECTS}
        rows += measure("magnetic tiles", tiles, defects, None, 64 if options.quick else 128, draws)
        if not options.quick:
            photographs = open_task("miniimagenet", dataset_overrides("miniimagenet")[1]).source
            others = sorted(set((photographs.truth or {}).values()) - set(PHOTOGRAPHS.values()))[:FURTHER_CLASSES]
            cut = CutPhotographs(photographs, {*PHOTOGRAPHS.values(), *others}, fit)
            rows += measure("photographs", cut, PHOTOGRAPHS, 0.01, 112, draws)
        write_csv(options.results / "fit.csv", rows)
    print(table(rows, ("images", "fit"), ("ap", "auroc")))
    print(gains(rows))


def measure(
    images: str, source: ImageSource, classes: dict[str, str], prevalence: float | None, size: int, draws: int
) -> list[Row]:
    """Return a row for each task and draw."""
    rows: list[Row] = []
    for name, anomaly in classes.items():
        for draw in range(draws):
            task = make_task(source, anomaly=anomaly, holdout=0.0, prevalence=prevalence, seed=draw)
            labels = initial_labels(task, anomalies=5, normals=100, seed=draw)
            rest = [id_ for id_ in task.pool if id_ not in labels]
            learner = make_learner("probe", task, f"model.image_size={size}")
            learner.fit(labels, pool=rest)
            metrics = evaluate(learner.rank(rest), task).as_dict()
            row = {"images": images, "class": name, "fit": source.rendering.fit, "draw": draw, "size": size}
            rows.append({**row, "ap": metrics["ap"], "auroc": metrics["auroc"]})
    return rows


def gains(rows: list[Row]) -> str:
    """Format the gain in average precision over `stretch`: the mean of the tasks, and their interval."""
    mean = {key: float(np.mean([row["ap"] for row in some])) for key, some in group_by(rows, KEYS).items()}
    lines = []
    for images, fit in group_by(rows, ("images", "fit")):
        names = [name for kind, name, other in mean if (kind, other) == (images, fit)]
        own = {name: mean[images, name, fit] - mean[images, name, "stretch"] for name in names}
        if fit != "stretch":
            parts = "; ".join(f"{name} {gain:+.3f}" for name, gain in own.items())
            lines.append(
                [images, fit, str(len(own)), format_interval(mean_interval(list(own.values())), "+.3f"), parts]
            )
    return markdown(["images", "fit", "tasks", "gain over stretch, ± over tasks", "by task"], lines)


KEYS = ("images", "class", "fit")


if __name__ == "__main__":
    main()
