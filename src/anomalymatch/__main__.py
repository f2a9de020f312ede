"""Overview of the commands, and dispatch to them: `python -m anomalymatch run dataset=demo`."""

import sys
from importlib import import_module
from importlib.metadata import version

from anomalymatch.checks import nearest
from anomalymatch.terminal import errors_in_a_line, fail

COMMANDS = {
    "run": ("anomalymatch.run", "rank images, label the top, train, rank again: the main command"),
    "label": ("anomalymatch.label", "open the labelling page on images of your own"),
    "score": ("anomalymatch.score", "rank an archive of any size with a trained run"),
    "adapt": ("anomalymatch.adapt", "adapt the backbone to an archive, without labels"),
    "cluster": ("anomalymatch.cluster", "group images by the kind of their anomaly"),
    "convert": ("anomalymatch.data.convert", "pack images of any kind into Parquet shards, which are read faster"),
    "crossmatch": ("anomalymatch.scoring.crossmatch", "find known objects at the positions of the top-ranked images"),
}
"""Module and description of each command."""


def main() -> None:
    """Run the command that the first word names, or print the overview."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[1:2] = []
        import_module(COMMANDS[name][0]).main()
        return
    with errors_in_a_line(stopped=""):
        if name in ("--help", "-h", "help"):
            print(overview())
        elif name == "--version":
            print(f"anomalymatch {version('anomalymatch')}")
        else:
            close = nearest(name, COMMANDS)
            meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
            fail(f"there is no command {name!r}: {meant}")


def overview() -> str:
    """Describe the commands, a line each."""
    rows = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join([
        "Find rare objects in very large sets of images, starting from about five examples.",
        "",
        "Usage: python -m anomalymatch COMMAND [KEY=VALUE]...",
        "",
        *rows,
        "",
        "Begin with: python -m anomalymatch run dataset=demo algorithm=probe",
        "Details:    python -m anomalymatch COMMAND --help",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
