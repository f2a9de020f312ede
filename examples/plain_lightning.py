"""Train FixMatch with plain Lightning, on your own images and your own network.

The LightningModule and the LightningDataModule need nothing else of the package: no run folder, no labelling loop.

    python examples/plain_lightning.py
"""

import numpy as np
import torch
from hydra.utils import instantiate
from pytorch_lightning import Trainer
from torch import Tensor, nn

from anomalymatch import ImageSource, compose
from anomalymatch.algorithms.fixmatch import FixMatch, MixedBatches


class ArraySource(ImageSource):
    """Images in a NumPy array of shape (count, height, width, 3) and type uint8."""

    def __init__(self, images: np.ndarray) -> None:
        ids = [f"image-{number}" for number in range(len(images))]
        super().__init__(name="array", ids=ids, fingerprint="array")
        self.images = images

    def load(self, position: int) -> np.ndarray:
        """Return one image."""
        return self.images[position]


class SmallNetwork(nn.Module):
    """Network that maps 8-bit images to logits of (normal, anomaly)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        return self.layers(images.float() / 255.0)


def main(steps: int = 100) -> float:
    """Train on ten labels and return the mean rank of the unlabelled anomalies: 0 is the first, 0.5 is random."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (200, 32, 32, 3), dtype=np.uint8)
    images[::10, 8:16, 8:16] = 250  # every tenth image has a bright square
    source = ArraySource(images)
    labels = dict.fromkeys(source.ids[:50:10], "anomaly") | dict.fromkeys(source.ids[1:6], "normal")
    pool = [id_ for id_ in source.ids if id_ not in labels]

    # The hyper-parameters of `algorithm=fixmatch_reference`; change any of them as on the command line.
    words = f"trainer.iterations={steps}", "algorithm.learner.batch.labelled=8", "algorithm.learner.optimizer.lr=0.05"
    recipe = compose("algorithm=fixmatch_reference", *words).algorithm.learner
    data = MixedBatches(
        source,
        labels,
        pool,
        augmentation=instantiate(recipe.augmentation),
        spec=instantiate(recipe.batch),
        image_size=32,
        seed=0,
    )
    torch.manual_seed(0)
    optimizer = instantiate(recipe.optimizer)
    model = FixMatch(SmallNetwork(), instantiate(recipe.loss), optimizer=optimizer, iterations=steps)
    Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, data)

    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model.ema.network(batch)
    scores = dict(zip(source.ids, (logits[:, 1] - logits[:, 0]).tolist(), strict=True))
    ranked = sorted(pool, key=lambda id_: -scores[id_])
    anomalies = {id_ for id_ in source.ids[::10] if id_ in pool}
    return float(np.mean([place for place, id_ in enumerate(ranked) if id_ in anomalies])) / len(ranked)


if __name__ == "__main__":
    print(f"mean rank of the anomalies: {main():.3f}")
