"""Model card of an exported network: what it was trained on, how well it ranked, and what it is for."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomalymatch.backbones.network import Network
from anomalymatch.scoring.model import TrainedModel
from anomalymatch.text import printable

HEADER = """---
library_name: anomalymatch
pipeline_tag: image-classification
tags:
- anomaly-detection
- active-learning
---
"""


def model_card(model: TrainedModel, network: Network, file: str, settings: Mapping[str, object]) -> str:
    """Write the card as Markdown, for the hub and for people; it has no paths and no names of images.

    Args:
        model: the trained model; metrics and labels beside its weights are used, if there are any.
        network: its network.
        file: name of the exported file.
        settings: what the run was configured with, such as its data set, by name.
    """
    spec = network.spec
    numbers = _metrics(model.weights.with_name("metrics.json"))
    labels = _labels(model.weights.with_name("labels.csv"))
    channels = ", ".join(model.input.rendering.channels(model.input.bands))
    rows = {
        "Network": f"{spec.name}, starting from {spec.weights}",
        **({"Score": "mean of the trained network's and of a probe's log-odds"} if network.second is not None else {}),
        "Images": f"{spec.channels} channels ({channels}), {spec.input_size} x {spec.input_size} pixels",
        "Bands": ", ".join(model.input.bands),
        "Labels": ", ".join(f"{count:,} {label}" for label, count in labels.items()) or "unknown",
    } | {name.capitalize(): value for name, value in settings.items() if value is not None}
    measured = [
        "Measured on unlabelled images of the same archive (`heldout_`: on a split that is never labelled; `probe_`: "
        "a logistic regression on frozen features, for comparison):",
        "",
        *_table("Metric", numbers),
    ]
    unknown = ["Unknown: the true classes of the images are not known. The estimate of a random audit is in the run."]
    return "\n".join([
        f"{HEADER}# {_plain(model.run_id)}",
        "",
        "This network gives each image the log-odds of being one of the rare objects that a person was looking for. It "
        f"was trained and exported by anomalymatch {version('anomalymatch')}.",
        "",
        "## Training",
        "",
        *_table("", rows),
        "",
        "## Metrics",
        "",
        *(measured if numbers else unknown),
        "",
        "## Intended use",
        "",
        "To put images of the same kind in an order, so that a person looks at the most promising ones first: from the "
        "same instrument, with the same bands, units and stretch. The score is no probability for another archive, "
        "whose anomalies are more or less frequent, and no decision: what it ranks low may still be an anomaly. Other "
        "instruments, other kinds of anomaly and other image sizes need labels and a training of their own.",
        "",
        "## Use",
        "",
        f"`{file}` takes 8-bit images and normalises them itself; `model.json` describes shape, channels and stretch.",
        "",
    ])  # fmt: skip


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items())]


def _plain(value: object) -> str:
    """Return a value as text that is no Markdown: names come from files that may be a stranger's."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value), limit=200)
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|#!" else letter for letter in text)


def _metrics(path: Path) -> dict[str, Any]:
    """Return the numbers of the cycle that measure its ranking; none if the truth is unknown."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        found = {key: value for key, value in row.items() if isinstance(value, int | float) and value == value}
    except (OSError, ValueError, AttributeError):
        return {}
    wanted = ("ap", "auroc", "recall_at_1pct", "precision_at_1pct", "anomalies", "images")
    prefixes = ("", "probe_", "heldout_", "probe_heldout_")
    return {key: found[key] for prefix in prefixes for name in wanted if (key := f"{prefix}{name}") in found}


def _labels(path: Path) -> Counter[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return Counter(str(row.get("label")) for row in csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return Counter()
