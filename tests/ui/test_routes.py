import io
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image as PillowImage
from starlette.applications import Starlette
from starlette.testclient import TestClient

BASE = "http://127.0.0.1:8765"
ORIGIN = {"origin": BASE}
WHO = {"annotator": "ada"}
STRANGE = (
    *("nothing.jpg", "../a.jpg", "../../../../etc/passwd", "/etc/passwd", "sub/../a.jpg", "./a.jpg", "a.jpg/"),
    *("a.jpg\x00", "\x00", "%2e%2e/a.jpg", "..\\a.jpg", "file:///etc/passwd", "sub", ".", "~", "A.JPG", "x" * 9000),
    *("a.jpg\n", "ü & ?#..jpg", "\ud7ff", "<script>alert(1)</script>", "'; DROP TABLE events; --"),
)


def encoded(kind, size=(40, 30), seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(image).save(file, kind)
    return file.getvalue()


def bomb(side=60_000):
    """A PNG of a few kilobytes that claims to be, and unpacks to, side x side pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes(side + 1) * 200, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "very secret place"
    (root / "sub").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "sub/b.jpg", "ü & ?#%2e.jpg")):
        (root / name).write_bytes(encoded("JPEG", seed=k))
    (root / "broken.jpg").write_bytes(encoded("JPEG")[:100])
    (root / "bomb.png").write_bytes(bomb())
    (root / "gone.jpg").write_bytes(encoded("JPEG"))
    return root


@pytest.fixture
def service(folder, tmp_path):
    """The parts of the service that the routes use: real images, labels in a dictionary."""
    from anomalymatch.data.sources.folder import FolderSource
    from anomalymatch.errors import DataError, StorageError
    from anomalymatch.ui.examples import Examples
    from anomalymatch.ui.exports import Export, import_labels
    from anomalymatch.ui.pictures import STRETCHES, Pictures

    class Service:
        def __init__(self):
            self.source = FolderSource(folder)
            self.pictures = Pictures(self.source, tmp_path / "cache", workers=2)
            encode = lambda image: np.full(4, image.mean(), np.float32)  # noqa: E731
            self.examples = Examples(tmp_path / "examples", encode, self.source, dimensions=4)
            self.stretches, self.channels = STRETCHES, ("red", "green", "blue")
            self.added, self.imported, self.exports = [], [], []

        def example_thumbnail(self, id_, side):
            return self.examples.thumbnail(id_, side)

        def add_example(self, name, data, annotator):
            self.added.append((name, len(data), annotator))
            return self.examples.add(name, data).id

        def import_csv(self, text, annotator):
            labels = import_labels(text, set(self.source.ids))
            self.imported.append((labels, annotator))
            return len(labels)

        def export(self, kind):
            if kind == "full":
                raise StorageError(f"cannot write {tmp_path}/x.zip: the disk is full: free some space")
            if kind == "bug":
                raise ValueError(f"nothing at {tmp_path}")
            if kind != "csv":
                raise DataError("there is no such export: choose csv")
            path = tmp_path / f"export-{time.monotonic_ns()}"
            path.write_text("filename,label\na.jpg,anomaly\n" * 20_000)
            self.exports.append(Export("labels.csv", "text/csv", path))
            return self.exports[-1]

    service = Service()
    yield service
    service.pictures.close()


@pytest.fixture
def client(service):
    from anomalymatch.ui.web.routes import LIMITS, routes
    from anomalymatch.ui.web.security import Guard, names_of

    app = Guard(Starlette(routes=routes(service)), names=names_of("127.0.0.1", "127.0.0.1"), token=None, limits=LIMITS)
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        yield client


def opened(answer):
    return PillowImage.open(io.BytesIO(answer.content))


class TestPictures:
    def test_a_thumbnail_has_the_side_that_was_asked_for(self, client):
        for id_ in ("a.jpg", "sub/b.jpg", "ü & ?#%2e.jpg"):
            answer = client.get("/thumb", params={"id": id_, "side": 128})
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "image/jpeg"
            assert opened(answer).format == "JPEG"
        assert max(opened(client.get("/thumb?id=a.jpg&side=512")).size) >= max(
            opened(client.get("/thumb?id=a.jpg&side=64")).size
        )

    def test_the_browser_keeps_what_has_the_right_version(self, client, service):
        from anomalymatch.ui.web.routes import version

        fresh = client.get("/thumb", params={"id": "a.jpg", "v": version(service.source)})
        assert fresh.headers["cache-control"] == "private, max-age=31536000, immutable"
        for old in ("", "old", service.source.fingerprint):
            answer = client.get("/thumb", params={"id": "a.jpg", "v": old})
            assert answer.headers["cache-control"] == "private, no-cache"
        assert len(version(service.source)) == 16

    def test_the_large_view_is_at_full_size_in_every_stretch_and_channel(self, client, service):
        plain = client.get("/full", params={"id": "a.jpg"})
        assert plain.headers["content-type"] == "image/png"
        assert opened(plain).size == (40, 30)
        seen = {plain.content}
        for words in ({"stretch": "asinh"}, {"stretch": "zscale"}, {"channel": "green"}):
            answer = client.get("/full", params={"id": "a.jpg"} | words)
            assert answer.status_code == 200
            seen.add(answer.content)
        assert len(seen) >= 3

    @pytest.mark.parametrize(
        ("query", "said"),
        [
            ("id=a.jpg&side=63", "A side has 64 to 512 pixels."),
            ("id=a.jpg&side=1000000000", "A side has 64 to 512 pixels."),
            ("id=a.jpg&side=-64", "A side has 64 to 512 pixels."),
            ("id=a.jpg&side=٦٤", "A side has 64 to 512 pixels."),
            ("side=64", "One id is needed."),
            ("id=&side=64", "One id is needed."),
            ("id=a.jpg&id=broken.jpg", "One id is needed."),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, client, query, said):
        for path in ("/thumb", "/example"):
            answer = client.get(f"{path}?{query}")
            assert (answer.status_code, answer.text) == (400, said)

    def test_unknown_stretches_and_channels_are_refused(self, client):
        answer = client.get("/full", params={"id": "a.jpg", "stretch": "__class__"})
        assert answer.status_code == 400
        assert answer.text == "A stretch is one of: as trained, linear, sqrt, log, asinh, zscale."
        answer = client.get("/full", params={"id": "a.jpg", "channel": "x-ray"})
        assert (answer.status_code, answer.text) == (400, "A channel is one of: red, green, blue.")

    @pytest.mark.parametrize("path", ["/thumb", "/full", "/example"])
    def test_only_ids_of_the_archive_are_found(self, client, path):
        for id_ in STRANGE:
            answer = client.get(path, params={"id": id_})
            assert (answer.status_code, answer.text) == (404, "There is no such image."), id_
            assert answer.headers["content-type"].startswith("text/plain")

    def test_escaped_ids_are_unescaped_once(self, client):
        for raw in ("%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%ff%fe", "a.jpg%00", "%", "%C0%AE%C0%AE/a.jpg", "sub%252Fb.jpg"):
            assert client.get(f"/thumb?id={raw}").status_code == 404
        assert client.get(f"/thumb?id={quote('sub/b.jpg', safe='')}").status_code == 200

    def test_a_link_that_leaves_the_archive_is_not_followed(self, folder, tmp_path):
        from anomalymatch.data.sources.folder import FolderSource

        (tmp_path / "private.jpg").write_bytes(encoded("JPEG"))
        os.symlink(tmp_path / "private.jpg", folder / "link.jpg")
        assert "link.jpg" not in FolderSource(folder).ids

    def test_an_image_that_cannot_be_read_says_why_and_not_where(self, client, folder):
        (folder / "gone.jpg").unlink()
        for id_, said in (("broken.jpg", "decoded"), ("bomb.png", "pixels"), ("gone.jpg", "No such file")):
            for path in ("/thumb", "/full"):
                answer = client.get(path, params={"id": id_})
                assert answer.status_code == 422
                assert said in answer.text
                assert "secret place" not in answer.text
                assert answer.headers["content-type"].startswith("text/plain")


class TestExamples:
    def post(self, client, *files, **words):
        form = [("files", (name, data, "image/png")) for name, data in files]
        return client.post("/examples", files=form, headers=ORIGIN, params=words or WHO)

    def test_images_are_taken_up(self, client, service):
        answer = self.post(client, ("x.png", encoded("PNG")), ("y.jpg", encoded("JPEG", seed=3)))
        assert answer.status_code == 200
        added = answer.json()["added"]
        assert (len(added), answer.json()["refused"]) == (2, [])
        assert [(name, who) for name, _, who in service.added] == [("x.png", "ada"), ("y.jpg", "ada")]
        picture = client.get("/example", params={"id": added[0], "side": 64})
        assert picture.headers["cache-control"].endswith("immutable")
        assert opened(picture).format == "JPEG"

    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            ("../../../etc/passwd", "passwd"),
            ("/etc/cron.d/x", "x"),
            ("..\\..\\x.png", "x.png"),
            ("x" * 999 + ".png", "x" * 200),
            ("..", ".."),
        ],
    )
    def test_names_are_only_names(self, client, service, tmp_path, given, shown):
        before = {path for path in tmp_path.rglob("*") if "examples" not in path.parts}
        assert self.post(client, (given, encoded("PNG"))).status_code == 200
        assert service.added[0][0] == shown
        assert {path for path in tmp_path.rglob("*") if "examples" not in path.parts} == before

    def test_a_good_one_beside_a_bad_one_is_taken(self, client):
        answer = self.post(client, ("good.png", encoded("PNG")), ("bad.png", b"<svg onload=alert(1)>"))
        assert answer.status_code == 200
        assert len(answer.json()["added"]) == 1
        assert [entry["name"] for entry in answer.json()["refused"]] == ["bad.png"]

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (bomb(9_000), "9000 x 9000 pixels is more than"),
            (bomb(60_000), "cannot serve as an example"),
            (b"", "empty"),
            (b"x" * 1000, "not an image"),
        ],
    )
    def test_hostile_images_are_refused_at_once(self, client, tmp_path, data, said):
        start = time.monotonic()
        answer = self.post(client, ("x.png", data))
        assert answer.status_code == 400
        assert said in answer.json()["refused"][0]["reason"]
        assert time.monotonic() - start < 10
        assert not list((tmp_path / "examples").glob("*.png"))

    def test_a_large_file_is_refused_before_it_is_decoded(self, client, service, monkeypatch):
        monkeypatch.setattr("anomalymatch.ui.web.routes.MAX_EXAMPLE", 1000)
        answer = self.post(client, ("x.png", encoded("PNG")))
        assert answer.json()["refused"] == [{"name": "x.png", "reason": "More than 1,000 bytes are not accepted."}]
        assert service.added == []

    def test_a_large_form_is_refused_while_it_comes_in(self, client, service):
        read = []

        def endless():
            yield b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
            for _ in range(150):
                read.append(1)
                yield bytes(1 << 20)

        headers = ORIGIN | {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/examples", content=endless(), headers=headers, params=WHO)
        assert (answer.status_code, answer.text) == (413, "More than 104,857,600 bytes are not accepted.")
        answer = client.post("/examples", content=b"x", headers=headers | {"content-length": "999999999"}, params=WHO)
        assert answer.status_code == 413
        assert service.added == []

    def test_too_many_files_are_refused(self, client, service):
        answer = self.post(client, *[(f"{k}.png", b"x") for k in range(21)])
        assert (answer.status_code, answer.text) == (400, "Too many files. Maximum number of files is 20.")
        assert service.added == []

    @pytest.mark.parametrize(
        ("kind", "content", "said"),
        [
            (
                "multipart/form-data; boundary=b",
                b"--b\r\nbroken",
                "There is no file|Invalid multipart|Missing|Malformed",
            ),
            ("multipart/form-data", b"--b", "Missing boundary"),
            ("text/plain", b"hello", "There is no file in the form."),
            ("application/x-www-form-urlencoded", b"files=1", "There is no file in the form."),
        ],
    )
    def test_what_is_no_form_is_refused(self, client, kind, content, said):
        for path in ("/examples", "/import"):
            answer = client.post(path, content=content, headers=ORIGIN | {"content-type": kind}, params=WHO)
            assert answer.status_code == 400
            assert any(part in answer.text for part in said.split("|")), answer.text

    @pytest.mark.parametrize("name", ["", "  ", "\x00\n", "x" * 65])
    def test_the_annotator_must_have_a_name(self, client, service, name):
        answer = self.post(client, ("x.png", encoded("PNG")), annotator=name)
        assert "The name of the annotator is needed" in answer.text
        assert answer.status_code == 400
        assert service.added == []

    def test_from_another_page_nothing_is_taken(self, client, service):
        form = {"files": ("x.png", encoded("PNG"), "image/png")}
        assert client.post("/examples", files=form, params=WHO).status_code == 403
        assert client.post("/examples", files=form, params=WHO, headers={"origin": "http://evil"}).status_code == 403
        assert service.added == []


class TestImport:
    def post(self, client, data):
        return client.post("/import", files={"files": ("l.csv", data, "text/csv")}, headers=ORIGIN, params=WHO)

    def test_labels_are_taken_over(self, client, service):
        text = "filename,label\na.jpg,anomaly\nü & ?#%2e.jpg,normal\n"
        for data in (text.encode(), text.encode("utf-8-sig")):
            answer = self.post(client, data)
            assert (answer.status_code, answer.json()) == (200, {"labels": 2})
        assert service.imported[1] == ({"a.jpg": "anomaly", "ü & ?#%2e.jpg": "normal"}, "ada")

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"\xff\xfe\x00", "it is not written in UTF-8"),
            (b"filename,label\n../../x,anomaly\n", "x"),
            (b"nonsense", ""),
            (b"", ""),
        ],
    )
    def test_what_is_wrong_is_said(self, client, service, data, said):
        answer = self.post(client, data)
        assert answer.status_code == 400
        assert said in answer.text
        assert service.imported == []

    def test_a_large_file_is_refused(self, client, service, monkeypatch):
        monkeypatch.setattr("anomalymatch.ui.web.routes.MAX_LABELS", 10)
        assert self.post(client, b"filename,label\n").status_code == 413


class TestExport:
    def test_a_file_is_sent_and_then_deleted(self, client, service):
        answer = client.get("/export/csv")
        assert answer.status_code == 200
        assert answer.text.startswith("filename,label\n")
        assert len(answer.text) == 29 * 20_000
        assert answer.headers["content-disposition"] == 'attachment; filename="labels.csv"'
        assert answer.headers["cache-control"] == "no-store"
        assert not service.exports[0].path.exists()

    def test_it_is_deleted_when_the_browser_goes_away(self, client, service):
        import asyncio

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "GET",
            "path": "/export/csv",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)
            if len(sent) > 2:
                raise OSError("the connection is closed")

        with pytest.raises(Exception):  # noqa: B017, PT011
            asyncio.run(client.app(scope, receive, send))
        assert sent[0]["status"] == 200
        assert not service.exports[0].path.exists()

    @pytest.mark.parametrize("kind", ["xml", "..", "%2e%2e", "csv%00", "csv.", "__class__", "%2Fetc%2Fpasswd"])
    def test_other_kinds_are_refused(self, client, service, kind):
        answer = client.get(f"/export/{kind}")
        assert answer.status_code in (400, 404)
        assert service.exports == []

    def test_errors_are_sentences_without_folders(self, client, tmp_path, caplog):
        answer = client.get("/export/full")
        assert (answer.status_code, answer.text) == (400, "cannot write x.zip: the disk is full: free some space")
        answer = client.get("/export/bug")
        assert (answer.status_code, answer.text) == (500, "Something went wrong; the terminal says what.")
        assert "/export/bug failed" in caplog.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
@pytest.mark.parametrize("path", ["/thumb?id=a.jpg", "/full?id=a.jpg", "/export/csv"])
def test_pictures_and_files_are_only_fetched(client, service, method, path):
    assert client.request(method, path, headers=ORIGIN).status_code == 405
    assert service.exports == []


def test_every_answer_has_the_headers(client):
    for path in (
        "/thumb?id=a.jpg",
        "/thumb?id=b",
        "/thumb",
        "/full?id=broken.jpg",
        "/export/csv",
        "/export/bug",
        "/no",
    ):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_only_so_many_pictures_are_drawn_at_once(service):
    from anomalymatch.ui.web.routes import routes

    busy, most, lock = 0, 0, threading.Lock()

    class Slow:
        def thumbnail(self, id_, side):
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.02)
            with lock:
                busy -= 1
            return b"\xff\xd8"

    real, service.pictures = service.pictures, Slow()
    try:
        with (
            TestClient(Starlette(routes=routes(service, workers=3)), base_url=BASE) as client,
            ThreadPoolExecutor(12) as pool,
        ):
            answers = list(pool.map(lambda k: client.get(f"/thumb?id={k}").status_code, range(40)))
    finally:
        service.pictures = real
    assert set(answers) == {200}
    assert most == 3
