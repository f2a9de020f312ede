"""Order by a description on the page: computed in the background, kept in the run folder, equal to the command's."""

import asyncio
import threading

import numpy as np
import pytest
from tiny_clip import write_tiny_clip

pytest.importorskip("open_clip", reason='pip install "anomalymatch[text]"')

from anomalymatch import run
from anomalymatch.active.text_ranker import DESCRIBED, DESCRIPTION, TextRanker, read_description
from anomalymatch.backbones import image_text
from anomalymatch.backbones.image_text import ImageTextEmbedding, ImageTextSpec
from anomalymatch.backbones.inference import Inference
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.evaluation.ranks import interleave
from anomalymatch.label import open_service
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label
from anomalymatch.ui import FirstOrder, Query, Show, Sort
from anomalymatch.ui.web.gallery import GalleryElement


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def embed(clip, tmp_path):
    def make(source, model=clip):
        spec = ImageTextSpec(model, None, None, ["{}", "a photo of {}"])
        inference = Inference(device="cpu", precision="fp32", workers=1, backend="torch")
        return ImageTextEmbedding(spec, source=source, cache_dir=tmp_path / "cache", inference=inference)

    return make


@pytest.fixture
def source(make_source):
    return make_source(40, size=16, unreadable=["im000007"])


def order(service, **parts):
    query = {"sort": Sort.DESCRIPTION, "show": Show.ALL, "size": 100} | parts
    return [tile.id for tile in service.page(Query(**query)).tiles]


def wait(service, wait_for, state="ready"):
    wait_for(lambda: service.description.status().state == state)
    return service.description.status()


def test_a_description_makes_and_replaces_the_order(make_service, source, embed, wait_for):
    service = make_service(source=source, text=embed(source))
    assert service.description.status().state == "none"
    assert "side panel" in service.page(Query(sort=Sort.DESCRIPTION)).note
    changes = []
    service.subscribe(lambda change: changes.append(change.kind))
    for text in ("a ring galaxy", "a merger; noise"):
        service.description.set(text)
        assert wait(service, wait_for).text == text
        expected = TextRanker(embed(source), text.split("; ")).rank(source.ids).top(100)
        assert order(service) == [*expected, "im000007"]  # unreadable images come last
        assert service.page(Query(sort=Sort.DESCRIPTION)).note == ""
    wait_for(lambda: changes.count("ranking") >= 2)
    assert "description" in changes
    service.description.set("  ")
    assert service.description.status().state == "none"
    assert order(service) == list(source.ids)
    assert not (service.run / DESCRIBED).exists()


def test_the_description_is_there_after_a_restart(make_service, source, embed, wait_for):
    first = make_service(source=source, text=embed(source), descriptions=["noise"])
    wait(first, wait_for)
    first.description.set("a ring galaxy")
    wait(first, wait_for)
    expected = order(first)
    first.close()
    again = make_service(source=source, text=embed(source, "local-dir:gone"), descriptions=["noise"])
    assert again.description.status() == first.description.status()  # without the model
    assert order(again) == expected
    again.close()
    (again.run / DESCRIBED).write_bytes(b"PAR1")  # damaged: computed again
    third = make_service(source=source, text=embed(source))
    wait(third, wait_for)
    assert order(third) == expected
    third.close()
    (third.run / DESCRIPTION).write_text("{")
    with pytest.raises(StorageError, match="delete that file"):
        make_service(source=source, text=embed(source))


@pytest.mark.parametrize("first", list(FirstOrder))
def test_the_first_images_are_those_of_the_description_and_of_the_cold_start_in_turn(
    make_service, source, embed, wait_for, first
):
    novelty = np.random.default_rng(0).random(40).astype(np.float32)
    service = make_service(source=source, text=embed(source), first=first, novelty=novelty)
    plain = order(service, sort=Sort.SCORE, show=Show.UNLABELLED)
    service.description.set("a ring galaxy")
    wait(service, wait_for)
    place = {id_: i for i, id_ in enumerate(source.ids)}
    described = order(service)
    turns = interleave(*(np.array([place[id_] for id_ in ids]) for ids in (described, plain)))
    page = service.page(Query(size=100))
    assert [tile.id for tile in page.tiles] == [source.ids[i] for i in turns]
    assert "description" in page.note
    service.description.set("")
    assert order(service, sort=Sort.SCORE, show=Show.UNLABELLED) == plain


def test_labels_do_not_wait_for_the_features(make_service, source, embed, wait_for, monkeypatch):
    gate, read = threading.Event(), source.read_for

    def wait_at_the_gate(ids, size):
        if size == 32:  # of the image-text model
            assert gate.wait(30)
        return read(ids, size)

    monkeypatch.setattr(source, "read_for", wait_at_the_gate)
    service = make_service(source=source, text=embed(source))
    service.description.set("noise")
    wait_for(lambda: service.description.status().total == 40)
    status = service.description.status()
    assert (status.state, status.done) == ("working", 0)
    assert service.label(["im000000"], Label.ANOMALY, "ada") == 1
    assert order(service) == list(source.ids)
    service.description.set("a ring galaxy")  # meanwhile
    gate.set()
    wait(service, wait_for)
    assert order(service)[:39] == TextRanker(embed(source), "a ring galaxy").rank(source.ids).top(39)
    assert read_description(service.run).descriptions == ("a ring galaxy",)


def test_closing_stops_the_features(make_service, source, embed, wait_for, monkeypatch):
    service = make_service(source=source, text=embed(source))
    began, read = threading.Event(), source.read_for

    def read_for(ids, size):
        began.set()
        service.description._meter.cancel()  # as closing does, but before the few images are ranked
        return read(ids, size)

    monkeypatch.setattr(source, "read_for", read_for)
    service.description.set("noise")
    assert began.wait(30)
    service.close()
    assert not service.description._task._thread.is_alive()
    assert read_description(service.run) == (("noise",), None)


def test_what_is_missing_is_told(make_service, source, embed, wait_for, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(image_text, "find_spec", lambda _: None)
        service = make_service(source=source, text=embed(source))
        assert "anomalymatch[text]" in wait(service, wait_for, "unavailable").message
        with pytest.raises(ConfigError, match="text"):
            service.description.set("noise")
        service.close()
    name = write_tiny_clip(tmp_path / "broken")
    (tmp_path / "broken" / "open_clip_model.safetensors").write_bytes(b"")
    service = make_service(source=source, text=embed(source, name))
    service.description.set("noise")
    assert "cannot be loaded" in wait(service, wait_for, "failed").message
    write_tiny_clip(tmp_path / "broken")
    service.description.set("noise")  # may be tried again
    wait(service, wait_for)
    with pytest.raises(ConfigError, match="characters"):
        service.description.set("x" * 501)
    service.description.set("galaxy " * 30)
    wait_for(lambda: "does not count" in service.description.status().message)


def test_the_page_shows_the_order_of_the_command(image_folder, tiny_model, clip, tmp_path, wait_for, without_pictures):
    words = ["dataset=folder", f"data.root={image_folder(30, ['damaged.png'])}", *tiny_model, f"text.model={clip}"]
    run(*words, "algorithm=probe", "al.cold_start=mixed", "al.describe=a ring galaxy", folder=tmp_path / "run")
    expected = Ranking.read(tmp_path / "run" / DESCRIBED).top(30)
    for again in ([f"resume={tmp_path / 'run'}"], [*words, "al.describe=a ring galaxy", f"ui.run={tmp_path / 'page'}"]):
        service = open_service(compose(*again, name="label"), again)
        wait(service, wait_for)
        assert order(service) == [*expected, "damaged.png"]
        service.close()
    assert read_description(tmp_path / "page").ranking.top(30) == expected


def test_a_wrong_description_or_model_is_told_before_the_page_opens(image_folder, tiny_model, clip, tmp_path):
    words = ["dataset=folder", f"data.root={image_folder(3)}", *tiny_model, f"ui.run={tmp_path / 'page'}"]
    for wrong, says in (("al.describe= ", "al.describe"), ("al.describe=noise", "text.model=local-dir:gone")):
        again = [*words, wrong, "text.model=local-dir:gone" if "noise" in wrong else f"text.model={clip}"]
        with pytest.raises(ConfigError, match=says):
            open_service(compose(*again, name="label"), again)
    assert not (tmp_path / "page" / "config.yaml").exists()


# --- the field --------------------------------------------------------------------------------------------------


def element(user, name):
    (found,) = [e for e in user.client.elements.values() if e.props.get("data-testid") == name]
    return found


def test_the_field_orders_the_page(make_service, source, embed, visit):
    service = make_service(source=source, text=embed(source))

    async def act(user):
        (gallery,) = user.find(kind=GalleryElement).elements
        element(user, "description").value = "a ring galaxy"
        user.find(kind=type(element(user, "description-rank")), content="Rank").click()
        await user.should_see("is ready", retries=100)
        for _ in range(100):
            if gallery.ids == order(service, show=Show.UNLABELLED)[:48]:
                break
            await asyncio.sleep(0.1)
        assert gallery.ids == order(service, show=Show.UNLABELLED)[:48]
        assert element(user, "sort").value == Sort.DESCRIPTION

    visit(service, act)
    service.close()
    again = make_service(source=source, text=embed(source))

    async def look(user):
        assert element(user, "description").value == "a ring galaxy"

    visit(again, look)


def test_the_field_is_off_without_open_clip(make_service, source, embed, visit, monkeypatch):
    monkeypatch.setattr(image_text, "find_spec", lambda _: None)
    service = make_service(source=source, text=embed(source))

    async def act(user):
        await user.should_see("anomalymatch[text]", retries=100)
        assert not element(user, "description").enabled
        assert not element(user, "description-rank").enabled

    visit(service, act)
