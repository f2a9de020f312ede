"""Measure what scoring by the mean of two networks costs, with and without stages in common (README, 14)."""

import copy

import torch
from bench import Row, interleaved_rates, make_parser, parse_options, table, write_csv

from anomalymatch import compose, open_task
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.build import build_embedding
from anomalymatch.scoring.backends import find_batch_size, make_scorer

FROZEN = 3
"""Stages that FixMatch does not train in an EfficientNet (`trainable_groups` is 4 of 7)."""


def main() -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__, quick="32 px, two batches")
    parser.add_argument("--sizes", type=int, nargs="+", default=[84, 150, 224])
    parser.add_argument("--repeats", type=int, default=7, help="measurements in turns, of which medians are taken")
    options = parse_options(parser)
    if options.quick:
        options.sizes, options.repeats = [32], 1
    rows = [row for size in options.sizes for row in measure(size, options.repeats, quick=options.quick)]
    write_csv(options.results / "mean_scoring.csv", rows)
    print(table(rows, ("px", "backend", "networks"), ("per_second", "times_alone")))


def measure(size: int, repeats: int, *, quick: bool) -> list[Row]:
    """Measure images per second of a network alone and of two, by each backend."""
    words = ["model.weights=bundled", f"model.image_size={size}"]
    embedding = build_embedding(compose("dataset=demo", *words), open_task("demo"))
    alone = embedding.network(normalised=True).eval()
    networks = {"one": alone, "two": paired(alone, FROZEN), "two, nothing in common": paired(alone, None)}
    inference, rows = Inference(), list[Row]()
    batch = find_batch_size(alone, inference)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    for backend in ("torch", "openvino"):
        work = {}
        for name, network in networks.items():
            scorer = make_scorer(network, inference, backend=backend, count=1, batch_size=batch, features=False)[1]
            work[name] = lambda scorer=scorer: sum(len(scorer(images)) for _ in range(2 if quick else 8))
        rates = interleaved_rates(work, repeats)
        rows += [
            {"px": size, "backend": backend, "networks": name, "per_second": rate, "times_alone": rates["one"] / rate}
            for name, rate in rates.items()
        ]
    return rows


def paired(network: Network, equal: int | None) -> Network:
    """Return a network with a second one whose first `equal` stages are the same; None: not even the stem."""
    pair = Network(network.spec, network.backbone, network.head, copy.deepcopy(network))
    same = () if equal is None else ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(equal)))
    assert pair.second is not None
    with torch.no_grad():
        for name, parameter in pair.second.backbone.body.named_parameters():
            if not name.startswith(same):
                parameter.mul_(1.01)
    return pair.eval()


if __name__ == "__main__":
    main()
