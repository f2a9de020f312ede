"""HTTP routes of the page: pictures, uploads and downloads."""

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlencode

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anomalymatch.active.run_folder import RunReader
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import AnomalyMatchError, DataError, UnreadableImageError
from anomalymatch.text import safe_name
from anomalymatch.ui.labels import MAX_NAME, clean_annotator
from anomalymatch.ui.pictures import AS_TRAINED, FULL_TYPE, STRETCHES, THUMBNAIL_TYPE
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.veil import Veil
from anomalymatch.ui.web.security import REPORT_PATH, refusal, without_folders

logger = logging.getLogger(__name__)

MAX_EXAMPLE = 20 << 20  # bytes of one image
MAX_EXAMPLES = 20  # images of one upload
MAX_LABELS = 100 << 20  # bytes of a CSV: a million labels with long ids
LIMITS = {"/examples": 100 << 20, "/import": MAX_LABELS + MAX_EXAMPLE}
SIDES = (64, 512)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def version(source: ImageSource) -> str:
    """Return the version `v` in the addresses of pictures, with which the browser may cache them permanently."""
    return hashlib.sha256(source.fingerprint.encode()).hexdigest()[:16]


def thumbnail_address(id_: str, side: int, version: str, **light: str) -> str:
    """Return the address of a thumbnail, relative to that of the page."""
    return "thumb?" + urlencode({"id": id_, "side": side, "v": version, **light})


def routes(service: LabelService, *, workers: int | None = None) -> list[Route]:
    """Create all routes of a service; `workers` threads draw pictures, by default two more than there are cores."""
    handlers = _Handlers(service, workers or (os.cpu_count() or 1) + 2)
    get = {"/thumb": handlers.thumb, "/full": handlers.full, "/heat": handlers.heat, "/example": handlers.example}
    get |= {"/pixel": handlers.pixel, "/original": handlers.original, REPORT_PATH: handlers.report}
    get |= {"/map": handlers.map_places, "/map/marks": handlers.map_marks, "/map/tile": handlers.map_tile}
    post = {"/examples": handlers.add_examples, "/import": handlers.import_labels}
    return [
        *(Route(path, _with_plain_errors(handler), methods=["GET"]) for path, handler in get.items()),
        *(Route(path, _with_plain_errors(handler), methods=["POST"]) for path, handler in post.items()),
        Route("/export/{kind}", _with_plain_errors(handlers.export), methods=["GET"]),
    ]


class _Handlers:
    def __init__(self, service: LabelService, workers: int) -> None:
        self.service, self.version = service, version(service.source)
        # Pictures must not wait for a long export, and a hundred requests must not start a hundred threads.
        self._drawing, self._slow = CapacityLimiter(workers), CapacityLimiter(2)

    async def thumb(self, request: Request) -> Response:
        id_, side, look = _id(request), _side(request), self._look(request)
        return await self._picture(request, partial(self.service.pictures.thumbnail, id_, side, **look), THUMBNAIL_TYPE)

    async def full(self, request: Request) -> Response:
        return await self._large(request, self.service.pictures.full)

    async def heat(self, request: Request) -> Response:
        return await self._large(request, self.service.heat_map)

    async def _large(self, request: Request, make: Callable[..., bytes]) -> Response:
        return await self._picture(request, partial(make, _id(request), **self._look(request)), FULL_TYPE)

    def _look(self, request: Request) -> dict[str, Any]:
        stretch = _one_of(request, "stretch", STRETCHES) or AS_TRAINED
        return {"stretch": stretch, "channel": _one_of(request, "channel", self.service.channels)}

    async def example(self, request: Request) -> Response:
        id_, side = _id(request), _side(request)
        return await self._picture(request, partial(self.service.examples.thumbnail, id_, side), THUMBNAIL_TYPE)

    async def pixel(self, request: Request) -> Response:
        """Return a pixel of an image, at shares `x` and `y` of its width and height, with its values as text."""
        shares = [_share(request, name) for name in ("x", "y")]
        work = partial(self.service.pictures.values, _id(request), *shares)
        (x, y), values = await to_thread.run_sync(work, limiter=self._drawing)
        plain = {band: f"{value:.6g}" for band, value in values.items()}
        units = self.service.source.units or ""
        return JSONResponse({"x": x, "y": y, "values": plain, "units": units}, headers={"cache-control": "no-store"})

    async def original(self, request: Request) -> Response:
        """Return the original file of an image, or a PNG where the archive has none."""
        id_ = _id(request)
        data, suffix = await self._slowly(partial(self.service.pictures.original, id_))
        name = safe_name(PurePosixPath(id_).name.rsplit(".", 1)[0]) + suffix
        headers = {"cache-control": "no-store", "content-disposition": f'attachment; filename="{name}"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def report(self, request: Request) -> Response:
        """Return the report of the run, which has its pictures in it; the security headers let it run no code."""
        path = RunReader(self.service.run).report()
        if path is None:
            raise HTTPException(404, "There is no report yet: a training writes it.")
        data = await to_thread.run_sync(path.read_bytes, limiter=self._slow)
        return Response(data, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"})

    async def map_places(self, request: Request) -> Response:
        """Return x and y of all images on the map, each as float32 in little-endian order."""
        points = self.service.map.points
        if points is None:
            raise HTTPException(404, "There is no map yet.")
        return _binary(points.places.astype("<f4").tobytes())

    async def map_marks(self, request: Request) -> Response:
        """Return scores and labels of the images on the map, see `LabelService.map_marks`."""
        return _binary(await to_thread.run_sync(self.service.map_marks, _veil(request), limiter=self._drawing))

    async def map_tile(self, request: Request) -> Response:
        """Return one image of the map as JSON, see `Tile`."""
        number, version = (request.query_params.get(name, "") for name in ("number", "version"))
        tile = self.service.map_tile(int(number), version) if number.isdecimal() and len(number) < 10 else None
        if tile is None:
            raise HTTPException(404, "There is no such image on the map.")
        return JSONResponse(asdict(_veil(request).tiles([tile])[0]), headers={"cache-control": "no-store"})

    async def _picture(self, request: Request, draw: Callable[[], bytes], media_type: str) -> Response:
        try:
            data = await to_thread.run_sync(draw, limiter=self._drawing)
        except UnreadableImageError:
            raise
        except DataError:
            raise HTTPException(404, "There is no such image.") from None
        is_current = request.query_params.get("v") == self.version or request.url.path == "/example"
        keep = "private, max-age=31536000, immutable" if is_current else "private, no-cache"
        return Response(data, media_type=media_type, headers={"cache-control": keep})

    async def export(self, request: Request) -> Response:
        made = await self._slowly(partial(self.service.export, request.path_params["kind"]))
        headers = {"cache-control": "no-store"}
        return _TemporaryFile(made.path, media_type=made.media_type, filename=made.filename, headers=headers)

    async def add_examples(self, request: Request) -> Response:
        """Add the images of a form as examples; the response lists their ids and the reasons of refusals."""
        added, refused = [], []
        async with request.form(max_files=MAX_EXAMPLES, max_fields=10) as form:
            files = _files(form.multi_items())
            for file in files:
                name = Path((file.filename or "").replace("\\", "/")).name[:200] or "image"
                try:
                    data = await _content(file, MAX_EXAMPLE)
                    added.append(await self._slowly(partial(self.service.add_example, name, data, _annotator(request))))
                except (AnomalyMatchError, HTTPException) as error:
                    reason = error.detail if isinstance(error, HTTPException) else without_folders(str(error))
                    refused.append({"name": name, "reason": reason})
        return JSONResponse({"added": added, "refused": refused}, 200 if added else 400)

    async def import_labels(self, request: Request) -> Response:
        """Import the labels of a CSV file; the response has their number."""
        async with request.form(max_files=1, max_fields=10) as form:
            data = await _content(_files(form.multi_items())[0], MAX_LABELS)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise HTTPException(400, "The file is not a CSV in UTF-8.") from None
        return JSONResponse({"labels": await self._slowly(partial(self.service.import_csv, text, _annotator(request)))})

    async def _slowly(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=self._slow)


def _binary(data: bytes) -> Response:
    return Response(data, media_type="application/octet-stream", headers={"cache-control": "no-store"})


class _TemporaryFile(FileResponse):
    """Response that deletes its file once it is sent or the browser has disconnected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


def _with_plain_errors(handler: Handler) -> Handler:
    """Turn every error into one sentence without the folders of this machine."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException as error:
            return refusal(error.status_code, error.detail)
        except MultiPartException as error:
            return refusal(400, error.message)
        except UnreadableImageError as error:
            return refusal(422, without_folders(str(error)))
        except AnomalyMatchError as error:
            return refusal(400, without_folders(str(error)))
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("%s failed", request.url.path)
            return refusal(500, "An internal error occurred: see the terminal.")

    return answer


def _id(request: Request) -> str:
    ids = request.query_params.getlist("id")
    if len(ids) != 1 or not ids[0]:
        raise HTTPException(400, "The request needs one id.")
    return ids[0]


def _side(request: Request) -> int:
    given = request.query_params.get("side", "128")
    low, high = SIDES
    if not (given.isascii() and given.isdigit() and len(given) < 5 and low <= int(given) <= high):
        raise HTTPException(400, f"The side must be {low} to {high} pixels.")
    return int(given)


def _one_of(request: Request, name: str, values: Sequence[str]) -> str | None:
    given = request.query_params.get(name) or None
    if given is not None and given not in values:
        raise HTTPException(400, f"The {name} must be one of: {', '.join(values)}.")
    return given


def _share(request: Request, name: str) -> float:
    try:
        share = float(request.query_params.get(name, ""))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise HTTPException(400, f"The share {name} must be a number from 0 to 1.")
    return share


def _annotator(request: Request) -> str:
    given = request.query_params.get("annotator", "")
    if len(given) > MAX_NAME:
        raise HTTPException(400, f"The name of the annotator has more than {MAX_NAME} characters.")
    return clean_annotator(given)


def _veil(request: Request) -> Veil:
    words = request.query_params
    return Veil("veiled" in words, words.get("blind", "")[:MAX_NAME])


def _files(items: Sequence[tuple[str, UploadFile | str]]) -> list[UploadFile]:
    files = [value for _, value in items if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(400, "The form has no file.")
    return files


async def _content(file: UploadFile, limit: int) -> bytes:
    if file.size is None or file.size > limit:
        raise HTTPException(413, f"More than {limit:,} bytes are not accepted.")
    return await file.read()
