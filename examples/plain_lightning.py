"""Train FixMatch with plain Lightning, on your own images and your own network.

The LightningModule and the LightningDataModule need nothing else of the package: no run folder, no labelling loop.

    python examples/plain_lightning.py
"""

from functools import partial

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import anomalymatch as am


class ArraySource(am.ImageSource):
    """Images in a NumPy array of shape (count, height, width, 3) and type uint8."""

    def __init__(self, images: np.ndarray) -> None:
        ids = [f"image-{number}" for number in range(len(images))]
        super().__init__(name="array", ids=ids, fingerprint="array")
        self.images = images

    def load(self, position: int) -> np.ndarray:
        """Return one image."""
        return self.images[position]


class SmallNetwork(nn.Module):
    """Network that maps images with pixels from 0 to 255 to logits of (normal, anomaly).

    A classifier of timm does as well: `timm.create_model("resnet18", num_classes=2)`, or the name of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        return self.layers(images / 255.0)


def main(epochs: int = 3, steps: int = 40) -> float:
    """Train on ten labels and return the mean rank of the unlabelled anomalies: 0 is the first, 0.5 is random."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (200, 32, 32, 3), dtype=np.uint8)
    images[::10, 8:16, 8:16] = 250  # every tenth image has a bright square
    source = ArraySource(images)
    labels = dict.fromkeys(source.ids[:50:10], "anomaly") | dict.fromkeys(source.ids[1:6], "normal")
    pool = [id_ for id_ in source.ids if id_ not in labels]

    # All other settings are those of the paper (`algorithm=fixmatch_reference`).
    spec = am.BatchSpec(labelled=8, iterations=steps)
    data = am.MixedBatches(source, labels, pool, image_size=32, spec=spec)
    torch.manual_seed(0)
    model = am.FixMatch(SmallNetwork(), optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True))
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)

    batches = DataLoader(torch.from_numpy(images).permute(0, 3, 1, 2), batch_size=50)
    logits = torch.cat(trainer.predict(model, batches) or [])
    scores = dict(zip(source.ids, logits.tolist(), strict=True))
    ranked = sorted(pool, key=lambda id_: -scores[id_])
    anomalies = {id_ for id_ in source.ids[::10] if id_ in pool}
    return float(np.mean([place for place, id_ in enumerate(ranked) if id_ in anomalies])) / len(ranked)


if __name__ == "__main__":
    print(f"mean rank of the anomalies: {main():.3f}")
