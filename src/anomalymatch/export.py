"""Write the network of a trained run for other programs: `python -m anomalymatch.export run=RUN format=onnx`."""

from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import FILE, compose
from anomalymatch.config_folders import config_folder
from anomalymatch.saved_config import read_config
from anomalymatch.terminal import console

NAME = "export"


def main() -> None:
    """Start the command."""
    launch(_export_and_show, name=NAME, stopped="Nothing is written.")


def export(*overrides: str) -> Path:
    """Write the network of a trained run for other programs.

    `export("run=runs/mine", "format=onnx")` does what `python -m anomalymatch.export` does. The network takes
    8-bit images, which `model.json` beside it describes, and returns the log-odds of an anomaly for each.

    Keys; `python -m anomalymatch.export --cfg job` prints all with their defaults:
        run=FOLDER: run folder, or a .safetensors file in one.
        cycle=3: cycle of the weights; null: the last.
        format=onnx: or openvino, torchscript.
        output=FOLDER: folder of the files.
        push=OWNER/NAME: repository of the Hugging Face hub to which they are uploaded.
        log_level=info: debug, info, warning or error.

    Args:
        overrides: keys with values, as on the command line.

    Returns:
        The folder of the files.

    Raises:
        AnomalyMatchError: with a message of one line.

    Example:
        >>> folder = am.export("run=runs/mine", "format=openvino")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'model.bin', 'model.json', 'model.xml']
    """
    return execute(compose(*overrides, name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, float]:
    """Write the files; return their folder and the largest difference of the log-odds to those of PyTorch."""
    # Imported one by one, so that mistyped words are reported without the wait for PyTorch.
    from anomalymatch.build_images import check_place

    check_place("run", config.run)
    from anomalymatch.backbones.hub import check_repository, push_folder
    from anomalymatch.scoring.export import export_model
    from anomalymatch.scoring.model import find_model

    run = Path(config.run).expanduser()
    name = run.stem if run.suffix else run.resolve().name
    folder = Path(config.output).expanduser() if config.output else Path("exported") / f"{name}-{config.format}"
    if config.push is not None:
        check_repository(config.push)
    model = find_model(run, config.cycle)
    difference = export_model(model, folder, config.format, _settings(model.weights))
    if config.push is not None:
        push_folder(folder, config.push)
    return folder, difference


def _settings(weights: Path) -> dict[str, object]:
    """Return what the configuration of the run says about its training; nothing if there is none."""
    path = next((folder / FILE for folder in weights.parents[:3] if (folder / FILE).is_file()), None)
    if path is None:
        return {}
    saved = read_config(path, config_folder(), trust=False, called=False)
    keys = {"data set": "dataset.name", "anomaly": "dataset.anomaly", "algorithm": "algorithm.name", "seed": "seed"}
    return {name: OmegaConf.select(saved, key) for name, key in keys.items()}


def _export_and_show(config: DictConfig) -> None:
    folder, difference = execute(config)
    console.print(
        f"Written: {folder}   largest difference to PyTorch on random images: {difference:.1e} in the log-odds",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


if __name__ == "__main__":
    # Imported by name, because a launcher cannot send a function of `__main__` to other processes.
    import_module("anomalymatch.export").main()
else:
    make_callable(__name__, export)
