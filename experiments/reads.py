"""Count the requests and the bytes that each format asks of an object store for each image (docs/scale.md).

A server of static files in this process stands for the store. Opening lists or copies what a source needs for its ids;
reading decodes every image once.
"""

import http.server
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench import DATA, Row, make_parser, markdown, parse_options, write_csv
from throughput import write_formats

from anomalymatch.data.open import open_path
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.benchmarks import galaxyzoo1

IMAGES, SIZE = 256, 84
PATHS = {
    "JPEG folder": "folder",
    "FITS folder": "fits",
    "zip": "images.zip",
    "WebDataset": "images.tar",
    "Parquet": "parquet",
    "HDF5": "array.h5",
    "npy": "array.npy",
}


class Counts:
    """Requests to the server, and bytes that it sent."""

    requests, sent = 0, 0


def main() -> None:
    """Write the same images in each format, read them through the server, and print the counts."""
    options = parse_options(make_parser(__doc__, quick="16 images"))
    count, rows = 16 if options.quick else IMAGES, list[Row]()
    with tempfile.TemporaryDirectory() as name, serve(Path(name)) as (url, counts):
        original: ImageSource = galaxyzoo1(DATA / "galaxyzoo1", "unused")
        write_formats(Path(name), original, original.ids[:count], SIZE)
        for what, path in PATHS.items():
            counts.requests = counts.sent = 0
            source = open_path(f"{url}/{path}", cache_dir=Path(name) / "cache" / path)
            opening = counts.requests, counts.sent
            readable = sum(isinstance(image, np.ndarray) for image in source.read(source.ids))
            assert readable == count, what
            reading = counts.requests - opening[0], counts.sent - opening[1]
            counted = _columns("opening", opening) | _columns("reading", reading)
            rows.append({"format": what, "images": count, **counted})
    write_csv(options.results / "reads.csv", rows)
    keys = ("opening_requests", "opening_bytes", "reading_requests", "reading_bytes")
    lines = [[str(row["format"]), *(f"{float(row[key]) / count:,.2f}" for key in keys)] for row in rows]
    print(markdown(["each image", *(key.replace("_", ": ") for key in keys)], lines))


def _columns(step: str, counted: tuple[int, int]) -> Row:
    return {f"{step}_requests": counted[0], f"{step}_bytes": counted[1]}


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Counts]]:
    """Serve a folder, and count requests and bytes."""
    counts, lock = Counts(), threading.Lock()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def send_response(self, *arguments: Any) -> None:
            with lock:
                counts.requests += 1
            super().send_response(*arguments)

        def copyfile(self, source: Any, outputfile: Any) -> None:
            while block := source.read(2**16):
                with lock:
                    counts.sent += len(block)
                outputfile.write(block)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", counts
        server.shutdown()


if __name__ == "__main__":
    main()
