"""Tests of the side panel as a simulated user sees it: training, groups, examples, exports, charts."""

import math
import sys
from dataclasses import replace

import numpy as np
from nicegui.testing.user_interaction import UserInteraction
from visitor import on_page

from anomalymatch.types import Label
from anomalymatch.ui.training import TrainingStatus
from anomalymatch.ui.views import Query
from anomalymatch.ui.web import charts
from anomalymatch.ui.web.gallery import DropZone
from anomalymatch.ui.web.training import header_text

FAILS = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1].removeprefix("resume="))
rows = [{"cycle": 2, "step": i, "loss_lb": 1 / (i + 1)} for i in range(200)]
(run / "live.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
print("step 200: loss 0.24", flush=True)
while not (run / "fail").exists():
    time.sleep(0.01)
sys.exit("error: the GPU is out of memory")
"""


@on_page
async def test_a_training_fails_starts_again_and_stops(page, service):
    service.label(service.source.ids[:1], Label.ANOMALY, "ada")
    service.label(service.source.ids[1:2], Label.NORMAL, "ada")
    service.training.program = (sys.executable, "-c", FAILS)
    page.send("train")
    await page.sees("Train on 2 labels?")
    assert "time is unknown" in page.get("train-estimate").text
    page.act("train-yes")
    state = page.get("training-state")
    await page.until(lambda: state.text.startswith("Training · cycle 2 · step 200 of 1,000"))
    assert page.get("training-stop").visible
    assert not page.get("training-start").visible
    await page.sees("step 200: loss 0.24")
    (service.run / "fail").touch()
    await page.until(lambda: page.get("training-message").visible)
    assert page.get("training-message").text == "error: the GPU is out of memory"
    await page.says("all labels are safe: error: the GPU is out of memory", error=True)
    assert page.get("training-start").text == "Resume"
    (service.run / "fail").unlink()
    page.act("training-start")
    await page.until(lambda: page.get("train-dialog").value)
    page.act("train-yes")
    await page.until(lambda: page.get("training-stop").visible)
    assert page.get("training-header").text.startswith("Training: ")
    page.send("train")
    await page.says("is running", error=True)
    page.act("training-stop")
    await page.until(lambda: page.get("training-start").visible)
    assert len(service.labels) == 2


def test_progress_of_a_training_in_a_few_words():
    status = TrainingStatus(state="running", cycle=1, step=0, steps=1000, seconds=50.0)
    assert header_text(status) == "Training: starting …"
    assert header_text(replace(status, step=250)) == "Training: 25% · 2 min left"
    assert header_text(replace(status, step=9, steps=0)) == "Training: step 9"
    assert header_text(replace(status, state="stopping")) == "Training: stopping …"


@on_page
async def test_a_finished_training_offers_its_order(page, service, finish_training):
    service.label(service.source.ids[:1], Label.ANOMALY, "ada")
    service.label(service.source.ids[1:2], Label.NORMAL, "ada")
    service.training.program = (sys.executable, "-c", "import time; time.sleep(60)")
    before = page.ids
    page.send("train")
    await page.until(lambda: page.get("train-dialog").value)
    page.act("train-yes")
    await page.until(lambda: page.get("training-header").text == "Training: starting …")
    finish_training(service.run, 2, service.source.ids, range(60), cold=False)
    assert not page.get("report").visible
    (service.run / "report.html").write_text("cycle 2")
    service.training._process.kill()
    await page.says("Training 2 has finished: press r")
    await page.until(lambda: page.get("report").visible)
    await page.until(lambda: page.status["offered"])
    assert page.ids == before
    assert math.isnan(service.training.estimate())
    (service.run / "cycles" / "02" / "metrics.json").write_text('{"seconds": 90}')
    page.send("train")
    await page.until(lambda: "took 2 min" in page.get("train-estimate").text)


@on_page
async def test_ranking_mode(page, service):
    service.label(service.source.ids[:1], Label.ANOMALY, "ada")
    service.rerank()
    await page.until(lambda: page.get("mode").value == "both")
    page.get("mode").value = "live"
    await page.until(lambda: service.summary().mode == "live")


@on_page
async def test_examples_and_uploads(page, service):
    service.add_example("a.png", service.pictures.full("im000003"), "me")
    await page.until(lambda: page.all("example"))
    zones = page.user.find(kind=DropZone)
    assert {zone._props["url"] for zone in zones.elements} == {"/examples", "/import"}
    refused = '{"added": [], "refused": [{"name": "b.png", "reason": "it is no image"}]}'
    for is_ok, message, shown in (
        (True, '{"added": ["a"], "refused": []}', "1 example added."),
        (False, refused, "b.png: it is no image"),
        (True, '{"labels": 1200}', "1,200 labels imported."),
    ):
        zones.trigger("sent", {"ok": is_ok, "message": message})
        await page.says(shown, error=not is_ok)
    page.act("example-remove")
    await page.until(lambda: not service.examples.all())


@on_page
async def test_agreement_is_told_from_ten_common_images_and_conflicts_are_pictures(page, service):
    ids = page.ids[:10]
    service.label(ids[:9], Label.NORMAL, "ada")
    service.label(ids[:9], Label.ANOMALY, "bob")
    await page.until(lambda: len(page.all("conflict")) == 9)
    await page.user.should_not_see("ada and bob")
    service.label(ids[9:], Label.NORMAL, "ada")
    service.label(ids[9:], Label.NORMAL, "bob")
    await page.sees("ada and bob")
    (first,) = [one for one in page.all("conflict") if one.props["title"] == ids[0]]
    UserInteraction(page.user, {first}, None).click()
    await page.until(lambda: page.gallery._props["viewing"] == ids[0])
    page.label([ids[0]], "anomaly")
    await page.until(lambda: len(page.all("conflict")) == 8)


@on_page
async def test_a_refused_export_is_told_and_disabled(page, service, monkeypatch):
    downloads = []
    monkeypatch.setattr("nicegui.ui.download.from_url", downloads.append)
    for kind, reason in (("zip", "labelled anomaly"), ("votable", "coordinates")):
        link = page.get(f"export-{kind}")
        await page.until(lambda link=link: link.props.get("aria-disabled") == "true")
        assert reason in link.props["title"]
        page.act(f"export-{kind}", "click.prevent")
        await page.until(lambda reason=reason: reason in page.status["text"] and page.status["isError"])
    page.label(page.ids[:1], "anomaly")
    await page.until(lambda: page.get("export-zip").props["aria-disabled"] == "false")
    for kind in ("zip", "csv"):
        page.act(f"export-{kind}", "click.prevent")
    await page.until(lambda: sorted(downloads) == ["/export/csv", "/export/zip"])


@on_page
async def test_groups_are_made_shown_named_and_labelled(page, service):
    page.send("group")
    await page.says("There are no groups yet")
    page.get("groups-selection").value = "top 100"
    page.act("groups-make")
    await page.until(lambda: page.all("group-2"))
    first, second, _ = service.groups.all()
    page.send("group")
    await page.until(lambda: page.ids == list(first.ids))
    assert page.gallery._props["grouped"]
    assert "group 1 of 3" in page.page["note"]
    page.send("group")
    await page.until(lambda: page.ids == list(second.ids))
    page.send("whole", label="artefact")
    await page.until(lambda: service.labels == dict.fromkeys(second.ids, "artefact"))
    page.get("group-name-1").value = "trails"
    page.act("group-name-1", "blur")
    await page.until(lambda: service.groups.all()[1].name == "trails")
    page.act("group-off")
    await page.until(lambda: not page.gallery._props["grouped"] and len(page.ids) > len(second.ids))
    assert not set(page.ids) & set(second.ids)


@on_page
async def test_groups_are_split_and_merged(page, service):
    service.groups.make("top 100", None)
    await page.until(lambda: page.all("group-2"))
    page.act("group-show-0")
    first = service.groups.all()[0].ids
    await page.until(lambda: page.ids == list(first))
    service.groups.split(0)  # by another person: the images stay until the new group is taken
    await page.until(lambda: page.status["offered"])
    assert page.ids == list(first)
    page.send("rerank")
    await page.until(lambda: page.ids == list(first[::2]))
    page.act("group-split-0")
    await page.until(lambda: page.all("group-4"))
    ticks = [e for e in page.user.client.elements.values() if type(e).__name__ == "Checkbox"]
    for tick in ticks[:2]:
        tick.value = True
    page.act("groups-merge")
    await page.until(lambda: len(service.groups.all()) == 4 and not page.gallery._props["grouped"])


@on_page
async def test_kinds_have_a_key_and_an_order(page, service):
    page.get("kind-name").value = "rings"
    page.act("kind-add")
    await page.until(lambda: page.all("group-0"))
    assert page.gallery._props["groups"] == 1
    ids = page.ids[:2]
    page.send("label", ids=ids, label="anomaly", group=0)
    await page.until(lambda: service.labels == dict.fromkeys(ids, Label.ANOMALY))
    await page.until(lambda: service.groups.get(0).ids == tuple(ids))
    service.groups.add("bars")
    await page.until(lambda: page.all("group-1"))
    page.act("group-find-0")
    await page.until(lambda: page.get("kind-off").visible)
    ranked = [tile.id for tile in service.page(Query(kind=0)).tiles]
    await page.until(lambda: page.ids == ranked)
    page.act("kind-off")
    await page.until(lambda: not page.get("kind-off").visible)
    page.act("group-find-1")
    await page.sees("no image of this group is labelled anomaly yet")


def test_charts():
    found = (np.arange(5000) // 10).tolist()
    curve = charts.discovery(found)["data"][1]
    assert len(curve["x"]) <= 502
    assert (curve["x"][0], curve["y"][0]) == (0, 0)
    assert (curve["x"][-1], curve["y"][-1]) == (5000, 499)
    few = charts.discovery([0, 1, 1])["layout"]
    assert (few["xaxis"]["dtick"], few["yaxis"]["tickformat"]) == (1, ",d"), "counts are whole numbers"
    assert [few[axis]["title"]["text"] for axis in ("xaxis", "yaxis")] == ["labels", "anomalies found"]
    (trace,) = charts.training({"loss": [1.0, float("nan"), float("inf"), 0.5]})["data"]
    assert trace["y"] == [1.0, None, None, 0.5]
    for empty in (charts.histogram(None), charts.discovery([]), charts.training({"loss": []})):
        assert empty["data"] == []
        assert empty["layout"]["annotations"][0]["text"]
