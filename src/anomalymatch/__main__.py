"""Overview of the commands, and dispatch to them: `anomalymatch run dataset=demo`."""

import os
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
    "export": ("anomalymatch.export", "write a trained network for other programs: ONNX, OpenVINO, TorchScript"),
    "convert": ("anomalymatch.data.convert", "pack images of any kind into Parquet shards, which are read faster"),
    "crossmatch": ("anomalymatch.scoring.crossmatch", "find known objects at the positions of the top-ranked images"),
}
"""Module and description of each command."""

OTHERS = ("convert", "crossmatch")
"""Commands with options, such as --size, instead of configuration keys."""

COMPLETION = ("-sc", "--shell-completion")
"""Options by which a shell asks for completion, with `install=bash` or `query=bash`, as of each command."""


def main() -> None:
    """Run the command that the first word names, or print the overview."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMPLETION and len(sys.argv) > 2:
        _complete(sys.argv[2])
        return
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


def _complete(request: str) -> None:
    """Answer a shell: the names of the commands, and behind a name what that command answers."""
    words = os.environ.get("COMP_LINE", "").split(maxsplit=2)
    if request.startswith("query=") and (len(words) < 2 or words[1] not in COMMANDS):
        typed = words[1] if len(words) == 2 else ""
        print("\n".join(name for name in COMMANDS if len(words) < 3 and name.startswith(typed)))
        return
    command = words[1] if request.startswith("query=") else "run"  # installing is the same for all
    if command in OTHERS:
        return
    os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]]) if words else ""
    import_module(COMMANDS[command][0]).main()


def overview() -> str:
    """Describe the commands, a line each."""
    rows = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join([
        "Find rare objects in very large sets of images, starting from about five examples.",
        "",
        "Usage: anomalymatch COMMAND [KEY=VALUE]...",
        "",
        *rows,
        "",
        "Begin with: anomalymatch run dataset=demo algorithm=probe",
        "Details:    anomalymatch COMMAND --help",
        'Completion: eval "$(anomalymatch --shell-completion install=bash)"',
        "Without the script on the path: python -m anomalymatch COMMAND",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
