"""Draw a contact sheet of the views of an augmentation: `python experiments/augmentations.py dataset=demo`.

Each row is an image: as it is, two weak and four strong views of FixMatch, and four views of contrastive learning. The
words are those of a command line: `dataset=galaxyzoo1 data.root=PATH augment=objects model.image_size=96`.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from anomalymatch import compose
from anomalymatch.algorithms.augmentation import Augmentation
from anomalymatch.build_images import build, build_source
from anomalymatch.data.stream import read_images, resize
from anomalymatch.evaluation.contact_sheet import contact_sheet
from anomalymatch.terminal import console, errors_in_a_line

KINDS = {"weak": 2, "strong": 4, "contrastive": 4}
"""Number of views of each kind in a row."""


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="words of the command line")
    parser.add_argument("--images", type=int, default=6, help="number of images")
    parser.add_argument("--tile", type=int, default=80, help="side of a view in pixels")
    parser.add_argument("--output", type=Path, default=Path("augment.jpg"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with errors_in_a_line(stopped=""):
        sheet = draw(options.overrides, options.images, options.tile, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, quality=88)
    console.print(f"Written: {options.output}")


def draw(overrides: list[str], count: int, tile: int, seed: int) -> PillowImage.Image:
    """Draw the sheet of `count` random images."""
    config = compose(*overrides)
    source, augmentation, size = build_source(config), build(config.augment), config.model.image_size
    rng = np.random.default_rng(seed)
    ids = [source.ids[i] for i in rng.choice(len(source.ids), min(count, len(source.ids)), replace=False)]
    images, captions = [], []
    for image in read_images(source, ids, size).images:
        original = resize(image, size, source.rendering.fit)
        images.append(original)
        captions.append("image")
        for kind, times in KINDS.items():
            view = make_view(augmentation, kind, source.channels, size)
            images += [view(original, int(rng.integers(2**31))) for _ in range(times)]
            captions += [kind] * times
    return contact_sheet(images, captions, columns=1 + sum(KINDS.values()), tile=tile)


def make_view(augmentation: Augmentation, kind: str, channels: int, size: int):
    """Build a view of one kind."""
    return augmentation.contrastive(channels, size) if kind == "contrastive" else getattr(augmentation, kind)(channels)


if __name__ == "__main__":
    main()
