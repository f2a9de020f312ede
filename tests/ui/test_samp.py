"""Tests of messages to other applications, at a hub of their own."""

import threading
import time
import warnings

import pytest

from anomalymatch.errors import DataError
from anomalymatch.ui.samp import broadcast, image_messages, table_message

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # astropy gives it up
    samp = pytest.importorskip("astropy.samp")
pytestmark = pytest.mark.filterwarnings("ignore:No client was able")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMP_HUB", f"std-lockurl:file://{tmp_path / 'samp'}")


@pytest.fixture
def hub(no_hub):
    with samp.conf.set_temp("use_internet", False):
        hub = samp.SAMPHubServer(addr="127.0.0.1", web_profile=False, mode="single")
        hub.start()
        yield hub
        hub.stop()


@pytest.fixture
def application(hub):
    """Start an application that takes one kind of message; its attribute `taken` has the parameters of each."""
    started = []

    def start(name, kind):
        client = samp.SAMPIntegratedClient(name=name, addr="127.0.0.1")
        client.connect(hub)
        client.taken, client.has_taken = [], threading.Event()

        def take(key, sender, mtype, parameters, extra):
            client.taken.append(parameters)
            client.has_taken.set()

        client.bind_receive_notification(kind, take)
        started.append(client)
        return client

    yield start
    for client in started:
        client.disconnect()


def test_messages_reach_the_applications_that_take_them(hub, application, monkeypatch):
    monkeypatch.setattr("anomalymatch.ui.samp.LINGER_S", 3)
    tables, positions = application("TOPCAT", "table.load.votable"), application("Aladin", "coord.pointAt.sky")
    assert broadcast([table_message("http://127.0.0.1:1/x", "found")]) == ["TOPCAT"]
    assert tables.has_taken.wait(20)
    assert tables.taken == [{"url": "http://127.0.0.1:1/x", "table-id": "http://127.0.0.1:1/x", "name": "found"}]
    assert positions.taken == []
    assert broadcast(image_messages("a.fits", "http://127.0.0.1:1/y", (10.5, -5.25))) == ["Aladin"]
    assert positions.has_taken.wait(20)
    assert positions.taken == [{"ra": "10.500000", "dec": "-5.250000"}]
    end = time.monotonic() + 30
    while len(tables.get_registered_clients()) > 2:  # the hub and the other application
        assert time.monotonic() < end, "the sender does not leave"
        time.sleep(0.1)


def test_a_hub_may_pass_a_message_on_late(hub, application, monkeypatch):
    tables = application("TOPCAT", "table.load.votable")
    launch = hub._launch_thread
    monkeypatch.setattr(hub, "_launch_thread", lambda **words: threading.Timer(0.5, launch, (), words).start())
    broadcast([table_message("http://127.0.0.1:1/x", "found")])
    assert tables.has_taken.wait(20)


def test_what_an_image_has_is_sent():
    (both, position) = image_messages("a.fits", "http://x/y", (10.5, -5.25))
    assert (both.kind, both.parameters["url"], both.parameters["name"]) == ("image.load.fits", "http://x/y", "a.fits")
    assert position.kind == "coord.pointAt.sky"
    assert image_messages("a.fits", "http://x/y", None) == [both]
    assert image_messages("a.jpg", "", (10.5, -5.25)) == [position]
    with pytest.raises(DataError, match=r"a\.jpg"):
        image_messages("a.jpg", "", None)


def test_without_a_hub_or_a_taker_a_sentence_says_so(no_hub, request, tmp_path):
    message = [table_message("http://127.0.0.1:1/x", "found")]
    with pytest.raises(DataError, match="no SAMP hub runs"):
        broadcast(message)
    (tmp_path / "samp").write_text(
        "# of a hub that has died\nsamp.secret=x\nsamp.hub.xmlrpc.url=http\\://127.0.0.1:1/\n"
    )
    with pytest.raises(DataError, match="no SAMP hub runs"):
        broadcast(message)
    (tmp_path / "samp").write_text("nonsense\n")
    with pytest.raises(DataError, match="does not accept"):
        broadcast(message)
    (tmp_path / "samp").unlink()
    application = request.getfixturevalue("application")
    application("Aladin", "coord.pointAt.sky")
    with pytest.raises(DataError, match=r"takes table\.load\.votable"):
        broadcast(message)
