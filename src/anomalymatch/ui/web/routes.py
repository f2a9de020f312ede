"""Pictures, uploads and downloads: what the browser fetches by address instead of through the page."""

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anomalymatch.data.source import ImageSource
from anomalymatch.errors import AnomalyMatchError, DataError, UnreadableImageError
from anomalymatch.ui.exports import Export
from anomalymatch.ui.pictures import Pictures
from anomalymatch.ui.web.security import refusal, without_folders

logger = logging.getLogger(__name__)

MAX_EXAMPLE = 20 << 20  # bytes of one image
MAX_EXAMPLES = 20  # images of one upload
MAX_LABELS = 100 << 20  # bytes of a CSV: a million labels with long ids
LIMITS = {"/examples": 100 << 20, "/import": MAX_LABELS + MAX_EXAMPLE}
SIDES = (64, 512)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@runtime_checkable
class Served(Protocol):
    """The part of `LabelService` that is needed here."""

    source: ImageSource
    pictures: Pictures
    stretches: Sequence[str]
    channels: Sequence[str]

    def example_thumbnail(self, id_: str, side: int) -> bytes: ...  # noqa: D102
    def add_example(self, name: str, data: bytes, annotator: str) -> str: ...  # noqa: D102
    def import_csv(self, text: str, annotator: str) -> int: ...  # noqa: D102
    def export(self, kind: str) -> Export: ...  # noqa: D102


def version(source: ImageSource) -> str:
    """What `v` is in the address of a picture, so that the browser may keep it for good."""
    return hashlib.sha256(source.fingerprint.encode()).hexdigest()[:16]


def routes(service: Served, *, workers: int | None = None) -> list[Route]:
    """All routes below the page.

    Args:
        service: what the routes are about.
        workers: threads that draw pictures at once; None for two more than there are cores.
    """
    handlers = _Handlers(service, workers or (os.cpu_count() or 1) + 2)
    get = {"/thumb": handlers.thumb, "/full": handlers.full, "/example": handlers.example}
    post = {"/examples": handlers.add_examples, "/import": handlers.import_labels}
    return [
        *(Route(path, _in_words(handler), methods=["GET"]) for path, handler in get.items()),
        *(Route(path, _in_words(handler), methods=["POST"]) for path, handler in post.items()),
        Route("/export/{kind}", _in_words(handlers.export), methods=["GET"]),
    ]


class _Handlers:
    def __init__(self, service: Served, workers: int) -> None:
        self.service, self.version = service, version(service.source)
        # Drawing must not wait for a long export, nor may a hundred requests start a hundred threads.
        self._drawing, self._slow = CapacityLimiter(workers), CapacityLimiter(2)

    async def thumb(self, request: Request) -> Response:
        id_, side = _id(request), _side(request)
        return await self._picture(request, partial(self.service.pictures.thumbnail, id_, side))

    async def full(self, request: Request) -> Response:
        id_, stretches = _id(request), self.service.stretches
        stretch = _one_of(request, "stretch", stretches) or stretches[0]
        channel = _one_of(request, "channel", self.service.channels)
        draw = partial(self.service.pictures.full, id_, stretch=stretch, channel=channel)
        return await self._picture(request, draw)

    async def example(self, request: Request) -> Response:
        id_, side = _id(request), _side(request)
        return await self._picture(request, partial(self.service.example_thumbnail, id_, side))

    async def _picture(self, request: Request, draw: Callable[[], bytes]) -> Response:
        try:
            data = await to_thread.run_sync(draw, limiter=self._drawing)
        except UnreadableImageError:
            raise
        except DataError:
            raise HTTPException(404, "There is no such image.") from None
        known = request.query_params.get("v") == self.version or request.url.path == "/example"
        keep = "private, max-age=31536000, immutable" if known else "private, no-cache"
        return Response(data, media_type=_media_type(data), headers={"cache-control": keep})

    async def export(self, request: Request) -> Response:
        made = await self._slowly(partial(self.service.export, request.path_params["kind"]))
        headers = {"cache-control": "no-store"}
        return _Passing(made.path, media_type=made.media_type, filename=made.filename, headers=headers)

    async def add_examples(self, request: Request) -> Response:
        """Take up every image of the form; the answer lists the ids, and why others were refused."""
        added, refused = [], []
        async with request.form(max_files=MAX_EXAMPLES, max_fields=10) as form:
            files = _files(form.multi_items())
            for file in files:
                name = Path((file.filename or "").replace("\\", "/")).name[:200] or "image"
                try:
                    data = await _content(file, MAX_EXAMPLE)
                    added.append(await self._slowly(partial(self.service.add_example, name, data, _who(request))))
                except (AnomalyMatchError, HTTPException) as error:
                    reason = error.detail if isinstance(error, HTTPException) else without_folders(str(error))
                    refused.append({"name": name, "reason": reason})
        return JSONResponse({"added": added, "refused": refused}, 200 if added else 400)

    async def import_labels(self, request: Request) -> Response:
        """Take over the labels of a CSV file; the answer says how many."""
        async with request.form(max_files=1, max_fields=10) as form:
            data = await _content(_files(form.multi_items())[0], MAX_LABELS)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise HTTPException(400, "The file is no CSV: it is not written in UTF-8.") from None
        return JSONResponse({"labels": await self._slowly(partial(self.service.import_csv, text, _who(request)))})

    async def _slowly(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=self._slow)


class _Passing(FileResponse):
    """A file that is deleted once it is sent, or the browser has gone away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


def _in_words(handler: Handler) -> Handler:
    """Every error as one plain sentence, without a folder of this machine in it."""

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
            return refusal(500, "Something went wrong; the terminal says what.")

    return answer


def _id(request: Request) -> str:
    ids = request.query_params.getlist("id")
    if len(ids) != 1 or not ids[0]:
        raise HTTPException(400, "One id is needed.")
    return ids[0]


def _side(request: Request) -> int:
    given = request.query_params.get("side", "128")
    low, high = SIDES
    if not (given.isascii() and given.isdigit() and len(given) < 5 and low <= int(given) <= high):
        raise HTTPException(400, f"A side has {low} to {high} pixels.")
    return int(given)


def _one_of(request: Request, name: str, values: Sequence[str]) -> str | None:
    given = request.query_params.get(name) or None
    if given is not None and given not in values:
        raise HTTPException(400, f"A {name} is one of: {', '.join(values)}.")
    return given


def _who(request: Request) -> str:
    name = "".join(letter for letter in request.query_params.get("annotator", "") if letter.isprintable()).strip()
    if not 0 < len(name) <= 64:
        raise HTTPException(400, "The name of the annotator is needed, of at most 64 characters.")
    return name


def _files(items: Sequence[tuple[str, UploadFile | str]]) -> list[UploadFile]:
    files = [value for _, value in items if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(400, "There is no file in the form.")
    return files


async def _content(file: UploadFile, limit: int) -> bytes:
    if file.size is None or file.size > limit:
        raise HTTPException(413, f"More than {limit:,} bytes are not accepted.")
    return await file.read()


def _media_type(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"
