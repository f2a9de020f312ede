import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image as PillowImage
from starlette.applications import Starlette
from starlette.testclient import TestClient

from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import StorageError
from anomalymatch.types import Label
from anomalymatch.ui.web.routes import LIMITS, routes, version
from anomalymatch.ui.web.security import Guard, host_names

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


@pytest.fixture
def folder(tmp_path, png_claiming):
    root = tmp_path / "very secret place"
    (root / "sub").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "sub/b.jpg", "ü & ?#%2e.jpg")):
        (root / name).write_bytes(encoded("JPEG", seed=k))
    (root / "broken.jpg").write_bytes(encoded("JPEG")[:100])
    (root / "bomb.png").write_bytes(png_claiming(60_000, 60_000))
    (root / "gone.jpg").write_bytes(encoded("JPEG"))
    return root


@pytest.fixture
def service(folder, make_service):
    return make_service(source=FolderSource(folder))


@pytest.fixture
def exported(service, monkeypatch):
    """Paths of the exports that the service has written."""
    paths, export = [], service.export

    def recorded(kind):
        made = export(kind)
        paths.append(made.path)
        return made

    monkeypatch.setattr(service, "export", recorded)
    return paths


@pytest.fixture
def client(service):
    names = host_names("127.0.0.1", "127.0.0.1")
    app = Guard(Starlette(routes=routes(service)), names=names, token=None, limits=LIMITS)
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        yield client


def opened(answer):
    return PillowImage.open(io.BytesIO(answer.content))


class TestPictures:
    def test_thumbnails(self, client):
        for id_ in ("a.jpg", "sub/b.jpg", "ü & ?#%2e.jpg"):
            answer = client.get("/thumb", params={"id": id_, "side": 128})
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "image/jpeg"
            assert max(opened(answer).size) == 128

    def test_browsers_cache_the_current_version(self, client, service):
        fresh = client.get("/thumb", params={"id": "a.jpg", "v": version(service.source)})
        assert fresh.headers["cache-control"] == "private, max-age=31536000, immutable"
        for old in ("", "old", service.source.fingerprint):
            answer = client.get("/thumb", params={"id": "a.jpg", "v": old})
            assert answer.headers["cache-control"] == "private, no-cache"
        assert len(version(service.source)) == 16

    def test_large_view_in_full_size_stretches_and_channels(self, client):
        plain = client.get("/full", params={"id": "a.jpg"})
        assert plain.headers["content-type"] == "image/png"
        assert opened(plain).size == (40, 30)
        contents = {plain.content}
        small = {client.get("/thumb", params={"id": "a.jpg"}).content}
        for words in ({"stretch": "asinh"}, {"stretch": "zscale"}, {"channel": "green"}):
            for path, found in (("/full", contents), ("/thumb", small)):
                answer = client.get(path, params={"id": "a.jpg"} | words)
                assert answer.status_code == 200
                found.add(answer.content)
        assert len(contents) >= 3
        assert len(small) >= 3

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            *((f"id=a.jpg&side={side}", "64 to 512 pixels") for side in ("63", "1000000000", "-64", "٦٤")),
            *((query, "one id") for query in ("side=64", "id=&side=64", "id=a.jpg&id=broken.jpg")),
        ],
    )
    def test_wrong_parameters(self, client, query, message):
        for path in ("/thumb", "/example"):
            answer = client.get(f"{path}?{query}")
            assert (answer.status_code, message in answer.text) == (400, True)

    def test_heat_maps_follow_the_labels(self, client, service):
        words = {"id": "a.jpg", "v": version(service.source)[:3]}
        answer = client.get("/heat", params=words)
        assert (answer.status_code, "label an anomaly first" in answer.text) == (400, True)
        service.label(["a.jpg"], Label.ANOMALY, "ada")
        service.rerank()
        answer = client.get("/heat", params=words)
        assert answer.status_code == 200
        assert opened(answer).size == (40, 30)
        assert answer.content != client.get("/full", params={"id": "a.jpg"}).content
        assert answer.headers["cache-control"] == "private, no-cache"
        assert client.get("/heat", params=words | {"channel": "green"}).content != answer.content

    @pytest.mark.parametrize(("query", "known"), [("stretch=__class__", "zscale"), ("channel=x-ray", "blue")])
    def test_unknown_stretches_and_channels(self, client, query, known):
        for path in ("/full", "/thumb"):
            answer = client.get(f"{path}?id=a.jpg&{query}")
            assert (answer.status_code, known in answer.text) == (400, True)

    @pytest.mark.parametrize("path", ["/thumb", "/full", "/example"])
    def test_unknown_ids(self, client, path):
        for id_ in STRANGE:
            answer = client.get(path, params={"id": id_})
            assert (answer.status_code, answer.text) == (404, "There is no such image."), id_
            assert answer.headers["content-type"].startswith("text/plain")

    def test_escaped_ids_are_unescaped_once(self, client):
        for raw in ("%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%ff%fe", "a.jpg%00", "%", "%C0%AE%C0%AE/a.jpg", "sub%252Fb.jpg"):
            assert client.get(f"/thumb?id={raw}").status_code == 404
        assert client.get(f"/thumb?id={quote('sub/b.jpg', safe='')}").status_code == 200

    def test_unreadable_images_give_a_reason_without_folders(self, client, folder):
        (folder / "gone.jpg").unlink()
        for id_, reason in (("broken.jpg", "decoded"), ("bomb.png", "pixels"), ("gone.jpg", "No such file")):
            for path in ("/thumb", "/full"):
                answer = client.get(path, params={"id": id_})
                assert answer.status_code == 422
                assert reason in answer.text
                assert "secret place" not in answer.text
                assert answer.headers["content-type"].startswith("text/plain")


class TestExamples:
    def post(self, client, *files, **words):
        form = [("files", (name, data, "image/png")) for name, data in files]
        return client.post("/examples", files=form, headers=ORIGIN, params=words or WHO)

    def test_images_become_examples(self, client, service):
        changes = []
        service.subscribe(changes.append)
        answer = self.post(client, ("x.png", encoded("PNG")), ("y.jpg", encoded("JPEG", seed=3)))
        assert answer.status_code == 200
        added = answer.json()["added"]
        assert (len(added), answer.json()["refused"]) == (2, [])
        assert [example.name for example in service.examples.all()] == ["x.png", "y.jpg"]
        assert {change.annotator for change in changes if change.kind == "examples"} == {"ada"}
        picture = client.get("/example", params={"id": added[0], "side": 64})
        assert picture.headers["cache-control"].endswith("immutable")
        assert opened(picture).format == "JPEG"

    def test_a_valid_file_beside_an_invalid_one(self, client):
        answer = self.post(client, ("good.png", encoded("PNG")), ("bad.png", b"<svg onload=alert(1)>"))
        assert answer.status_code == 200
        assert len(answer.json()["added"]) == 1
        assert [entry["name"] for entry in answer.json()["refused"]] == ["bad.png"]

    def test_large_and_many_files_are_refused(self, client, service, monkeypatch):
        answer = self.post(client, *[(f"{k}.png", b"x") for k in range(21)])
        assert (answer.status_code, "20" in answer.text) == (400, True)
        monkeypatch.setattr("anomalymatch.ui.web.routes.MAX_EXAMPLE", 1000)
        answer = self.post(client, ("x.png", encoded("PNG")))
        assert answer.status_code == 400
        assert answer.json()["refused"] == [{"name": "x.png", "reason": "More than 1,000 bytes are not accepted."}]
        assert not service.examples.all()

    def test_a_large_form_is_refused_during_the_upload(self, client):
        start = b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
        headers = ORIGIN | {"content-type": "multipart/form-data; boundary=b"}
        content = iter([start, *[bytes(1 << 20)] * 101])
        answer = client.post("/examples", content=content, headers=headers, params=WHO)
        assert (answer.status_code, "104,857,600" in answer.text) == (413, True)

    @pytest.mark.parametrize(
        ("kind", "content"),
        [
            ("multipart/form-data; boundary=b", b"--b\r\nbroken"),
            ("multipart/form-data", b"--b"),
            ("text/plain", b"hello"),
            ("application/x-www-form-urlencoded", b"files=1"),
        ],
    )
    def test_bodies_that_are_not_forms(self, client, kind, content):
        for path in ("/examples", "/import"):
            answer = client.post(path, content=content, headers=ORIGIN | {"content-type": kind}, params=WHO)
            assert (answer.status_code, bool(answer.text)) == (400, True)

    @pytest.mark.parametrize("name", ["", "  ", "\x00\n", "x" * 65])
    def test_uploads_need_an_annotator(self, client, service, name):
        answer = self.post(client, ("x.png", encoded("PNG")), annotator=name)
        assert (answer.status_code, "name" in answer.text) == (400, True)
        assert not service.examples.all()


class TestImport:
    def post(self, client, data):
        return client.post("/import", files={"files": ("l.csv", data, "text/csv")}, headers=ORIGIN, params=WHO)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_labels_are_imported(self, client, service, encoding):
        answer = self.post(client, "Filename,Label\na.jpg,Anomaly\nü & ?#%2e.jpg,normal\n".encode(encoding))
        assert (answer.status_code, answer.json()) == (200, {"labels": 2})
        assert service.labels == {"a.jpg": "anomaly", "ü & ?#%2e.jpg": "normal"}
        assert {event.annotator for event in service.events} == {"ada"}

    @pytest.mark.parametrize(
        ("data", "message"),
        [(b"\xff\xfe\x00", "UTF-8"), (b"filename,label\n../../x,anomaly\n", "x"), (b"nonsense", ""), (b"", "")],
    )
    def test_invalid_files(self, client, service, data, message):
        answer = self.post(client, data)
        assert (answer.status_code, message in answer.text) == (400, True)
        assert service.labels == {}

    def test_a_large_file_is_refused(self, client, monkeypatch):
        monkeypatch.setattr("anomalymatch.ui.web.routes.MAX_LABELS", 10)
        assert self.post(client, b"filename,label\n").status_code == 413


class TestExport:
    def test_a_file_is_sent_and_deleted(self, client, service, exported):
        service.label(["a.jpg"], Label.ANOMALY, "ada")
        answer = client.get("/export/csv")
        assert (answer.status_code, answer.text) == (200, "filename,label\na.jpg,anomaly\n")
        assert answer.headers["content-disposition"] == 'attachment; filename="very-secret-place-labels.csv"'
        assert answer.headers["cache-control"] == "no-store"
        assert not exported[0].exists()

    def test_a_file_is_deleted_when_the_browser_disconnects(self, client, exported):
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
            if len(sent) > 1:
                raise OSError("the connection is closed")

        with pytest.raises(Exception):  # noqa: B017, PT011
            asyncio.run(client.app(scope, receive, send))
        assert sent[0]["status"] == 200
        assert not exported[0].exists()

    @pytest.mark.parametrize("kind", ["xml", "..", "%2e%2e", "csv%00", "csv.", "__class__", "%2Fetc%2Fpasswd"])
    def test_unknown_kinds(self, client, exported, kind):
        assert client.get(f"/export/{kind}").status_code in (400, 404)
        assert exported == []

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (StorageError("cannot write /a/b/x.zip: the disk is full"), 400, "cannot write x.zip: the disk is full"),
            (ValueError("nothing at /a/b"), 500, "An internal error occurred: see the terminal."),
        ],
    )
    def test_errors_are_sentences_without_folders(self, client, service, monkeypatch, caplog, error, status, message):
        def fail(kind):
            raise error

        monkeypatch.setattr(service, "export", fail)
        answer = client.get("/export/csv")
        assert (answer.status_code, answer.text) == (status, message)
        assert ("/export/csv failed" in caplog.text) == (status == 500)


def test_report_of_the_run(client, service, tmp_path):
    assert client.get("/report").status_code == 404
    report = service.run / "report.html"
    report.write_text("<h1>cycle 1</h1>")
    answer = client.get("/report")
    assert (answer.status_code, answer.text) == (200, "<h1>cycle 1</h1>")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["cache-control"] == "no-store"
    report.write_text("<h1>cycle 2</h1>")
    assert "cycle 2" in client.get("/report").text
    report.unlink()
    (tmp_path / "secret").write_text("secret")
    report.symlink_to(tmp_path / "secret")
    assert client.get("/report").status_code == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
@pytest.mark.parametrize("path", ["/thumb?id=a.jpg", "/full?id=a.jpg", "/export/csv"])
def test_other_methods_are_refused(client, exported, method, path):
    assert client.request(method, path, headers=ORIGIN).status_code == 405
    assert exported == []


def test_number_of_pictures_drawn_at_once(service, monkeypatch, count_calls):
    slow = count_calls(lambda *_, **__: b"\xff\xd8")
    monkeypatch.setattr(service.pictures, "thumbnail", slow)
    with (
        TestClient(Starlette(routes=routes(service, workers=3)), base_url=BASE) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda k: client.get(f"/thumb?id={k}").status_code, range(40)))
    assert set(answers) == {200}
    assert slow.most == 3
