"""Side panel: counts, ranking, groups, training, annotators, examples, export and import."""

import asyncio
import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlencode

from nicegui import background_tasks, ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from anomalymatch.active.run_folder import RunReader
from anomalymatch.types import Label
from anomalymatch.ui.sky_map import SkyMap
from anomalymatch.ui.training import TrainingStatus
from anomalymatch.ui.views import Summary
from anomalymatch.ui.web import charts
from anomalymatch.ui.web.audit import AuditPanel
from anomalymatch.ui.web.description import DescriptionPanel
from anomalymatch.ui.web.gallery import DropZone
from anomalymatch.ui.web.groups import GroupsPanel
from anomalymatch.ui.web.histogram import ScoreHistogram
from anomalymatch.ui.web.people import PeoplePanel
from anomalymatch.ui.web.sections import Sections
from anomalymatch.ui.web.sending import TARGETS, Sending
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.sky import SkyPanel
from anomalymatch.ui.web.theme import SHAPES

LOG_LINES = 8
STATES = {
    "idle": "No training yet. Training fine-tunes the network on all labels and takes minutes.",
    "running": "Training",
    "stopping": "Stopping after this step …",
    "interrupted": "Interrupted. Nothing is lost; the next training continues from the last cycle.",
    "failed": "The training failed. All labels are safe.",
    "finished": "Finished",
}
AGAIN = {"interrupted": "Resume", "failed": "Resume", "finished": "Train again"}


class TrainingPanel:
    """Controls of the training, with progress, losses and errors."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._drawn: Any = None
        self._failure = self._before = ""
        self.on_status: list[Callable[[TrainingStatus], None]] = []
        with ui.row().classes("am-line"):
            self._state = ui.label().classes("am-wrap").props("data-testid=training-state")
            self._start = ui.button("Train", on_click=lambda: session.ask_training()).props(
                "dense unelevated no-caps size=sm data-testid=training-start"
            )
            self._stop = ui.button("Stop", on_click=self._halt).props(
                "dense outline no-caps size=sm data-testid=training-stop"
            )
        self._progress = ui.linear_progress(0, show_value=False, size="4px").props(
            "data-testid=training-progress aria-label='Progress of the training'"
        )
        self._message = ui.label().classes("am-error").props("role=alert data-testid=training-message")
        self._place = ui.element("div")
        self._plot: ui.plotly | None = None
        self._log = ui.label().classes("am-log")
        self._log.props("tabindex=0 role=log aria-label='Output of the training' data-testid=training-log")
        self._report = TextElement(tag="a", text="Report of the run ↗").classes("am-link")
        self._report.props("href=report target=_blank rel=noopener data-testid=report")
        self._timer = ui.timer(1.0, self.refresh, immediate=False)
        self.refresh()

    def refresh(self) -> None:
        """Show the current state."""
        status = self.session.service.training.status()
        self._timer.active = is_busy = status.state in ("running", "stopping")
        self._state.text = _state(status)
        self._start.set_visibility(not is_busy)
        self._start.text = AGAIN.get(status.state, "Train")
        self._stop.set_visibility(status.state == "running")
        self._progress.set_visibility(is_busy and bool(status.steps))
        self._progress.set_value(status.step / status.steps if status.steps else 0)
        self._message.text = status.message
        self._message.set_visibility(bool(status.message) and status.state == "failed")
        drawn = (status.state, status.cycle, status.step)
        if drawn != self._drawn and any(status.losses.values()):
            self._drawn = drawn
            self._draw(charts.training(status.losses))
        self._log.text = "\n".join(status.log[-LOG_LINES:])
        self._log.set_visibility(bool(status.log))
        self._report.set_visibility(RunReader(self.session.service.run).report() is not None)
        self._tell_end(status)
        for listener in self.on_status:
            listener(status)

    def _draw(self, figure: dict[str, Any]) -> None:
        if self._plot is not None:
            self._plot.update_figure(figure)
            return
        with self._place:
            self._plot = ui.plotly(figure).classes("am-chart").props("data-testid=losses")

    def _tell_end(self, status: TrainingStatus) -> None:
        if status.state == "finished" and self._before in ("running", "stopping"):
            self.session.say(f"Training {status.cycle} has finished: press r for the new order.")
        self._before = status.state
        failure = status.message if status.state == "failed" else ""
        if failure and failure != self._failure:
            self.session.say(f"The training failed, all labels are safe: {failure}", is_error=True)
        self._failure = failure

    async def _halt(self) -> None:
        await self.session.call(self.session.service.training.stop)
        self.refresh()


def _state(status: TrainingStatus) -> str:
    if status.state == "idle" and status.log:
        return "Stopped. Nothing is lost; the next training continues from the last cycle."
    words = [STATES.get(status.state, status.state)]
    if status.state != "idle" and (status.steps or status.step):
        words += [f"cycle {status.cycle}"] * bool(status.cycle)
        is_starting = status.state == "running" and not status.step
        words += ["starting" if is_starting else f"step {status.step:,}" + f" of {status.steps:,}" * bool(status.steps)]
        words += [f"{status.seconds / 60:.0f} min" if status.seconds >= 60 else f"{status.seconds:.0f} s"]
    return " · ".join(words)


REFRESH_S = 0.5
"""Shortest time between two updates of the panel."""
EXAMPLE_SIDE = 96
EXPORTS = {
    "csv": "Labels (CSV)",
    "parquet": "Labels and scores (Parquet)",
    "votable": "Labelled and top images (VOTable)",
    "zip": "Images of the anomalies (zip)",
    "dossier": "Dossier of the anomalies (HTML)",
    "labelstudio": "Label Studio tasks (JSON)",
    "labelstudio-config": "Label Studio labelling interface (XML)",
}


class Panel:
    """The side panel."""

    def __init__(self, session: Session, sending: Sending, sky: SkyMap) -> None:
        self.session = session
        self._is_waiting = False
        self._mode = ""
        self.sections = Sections(session)
        with ui.element("section").classes("am-section"):
            with ui.row().classes("am-counts").props("data-testid=counts"):
                self._figures = {label: _count(label) for label in Label}
                self._labelled = ui.label().classes("am-hint am-whole")
            AuditPanel(session)
        with self.sections.add("Description", "description"):
            self._description = DescriptionPanel(session)
        with self.sections.add("Ranking", "ranking"):
            with ui.row().classes("am-line"):
                self._modes = ui.toggle([], on_change=self._choose_mode).props(
                    "dense no-caps unelevated size=sm data-testid=mode"
                )
                self._speed = ui.label().classes("am-hint am-grow am-right").props("data-testid=speed")
            self._unranked = ui.label("Nothing is ranked yet.").classes("am-hint")
            self._histogram = ScoreHistogram(session).plot
            self._histogram.set_visibility(False)
        with self.sections.add("Discovery", "discovery"):
            self._unlabelled = ui.label("There are no labels yet.").classes("am-hint")
            self._discovery = ui.plotly(charts.discovery([])).classes("am-chart").props("data-testid=discovery")
            self._discovery.set_visibility(False)
        with self.sections.add("Sky", "sky") as section:
            SkyPanel(session, sky, section)
        with self.sections.add("Groups", "groups"):
            self._groups = GroupsPanel(session)
        with self.sections.add("Training", "training"):
            self.training = TrainingPanel(session)
        with self.sections.add("Annotators", "annotators"):
            self.people = PeoplePanel(session)
        with self.sections.add("Examples", "examples"):
            self._zones = [self._drop_examples()]
            self._examples = ui.row().classes("am-examples").props("data-testid=examples")
        with self.sections.add("Export and import", "exchange"):
            self._exports()
            self._send = ui.button("Send the table to TOPCAT, Aladin …", on_click=sending.send_table)
            self._send.props("dense outline no-caps size=sm data-testid=send-table").tooltip(TARGETS)
            text = "Import labels: a CSV with the columns filename,label"
            self._zones.append(DropZone("import", text, accept=".csv,text/csv", many=False, on_sent=self._sent))
        session.watchers.append(self.watch)
        session.on_summary.append(self._show)

    def watch(self, kinds: set[str], ids: set[str]) -> None:
        """Update after changes, with a delay."""
        if "description" in kinds:
            self.sections.fill("description", self._description.is_available)
        if "training" in kinds:
            self.training.refresh()
        if not kinds <= {"training", "description"} and not self._is_waiting:
            self._is_waiting = True
            background_tasks.create(self._follow("examples" in kinds), name="side panel")

    def set_annotator(self, name: str) -> None:
        """Set the annotator of the uploads."""
        for zone in self._zones:
            zone.set_annotator(name)

    async def refresh(self, *, examples: bool = True) -> None:
        """Fetch and show the summary and the examples."""
        self.sections.fill("description", self._description.is_available)
        await self.session.fetch_summary()
        await self._update_refusals()
        if examples and not self.session.client.is_deleted:
            await self._show_examples()

    async def _follow(self, examples: bool) -> None:
        try:
            await asyncio.sleep(self.session.pace(REFRESH_S) * random.uniform(1, 1.5))  # not all pages at once
        finally:
            self._is_waiting = False
        await self.refresh(examples=examples)

    def _show(self, summary: Summary) -> None:
        self._show_counts(summary)
        self._mode = summary.mode
        self._modes.set_options(list(summary.modes), value=summary.mode if summary.mode in summary.modes else None)
        self._modes.set_visibility(len(summary.modes) > 1)
        self._speed.text = (
            "" if summary.histogram is None or math.isnan(summary.seconds) else f"ranked in {summary.seconds:.2f} s"
        )
        for name, chart, hint, is_there in (
            ("ranking", self._histogram, self._unranked, summary.histogram is not None),
            ("discovery", self._discovery, self._unlabelled, bool(summary.found)),
        ):
            chart.set_visibility(is_there)
            hint.set_visibility(not is_there)
            self.sections.fill(name, is_there)
        self._discovery.update_figure(charts.discovery(summary.found))
        self.people.show(summary)

    def _show_counts(self, summary: Summary) -> None:
        for label, figure in self._figures.items():
            figure.text = f"{summary.counts.get(label, 0):,}"
        rest = f"{sum(summary.counts.values()):,} of {summary.images:,} labelled"
        unreadable = f" · {summary.unreadable:,} unreadable" if summary.unreadable else ""
        self._labelled.text = rest + unreadable

    async def _choose_mode(self) -> None:
        if self._modes.value and self._modes.value != self._mode:
            await self.session.call(self.session.service.rank_by, self._modes.value)

    def _drop_examples(self) -> DropZone:
        ui.label("Images of what you look for, also from outside the archive: the ranking learns from them.").classes(
            "am-hint"
        )
        text = "Drop images here as examples, or choose files"
        accept = "image/*,.fits,.fit,.fts,.tif,.tiff"
        return DropZone("examples", text, accept=accept, many=True, on_sent=self._sent)

    async def _show_examples(self) -> None:
        examples = await self.session.call(self.session.service.examples.all)
        self._examples.clear()
        with self._examples:
            for example in examples or ():
                with ui.element("div").classes("am-example").props("data-testid=example"):
                    picture = ui.element("img")
                    picture.props["src"] = "example?" + urlencode({"id": example.id, "side": EXAMPLE_SIDE})
                    picture.props["alt"] = "example"
                    button = ui.button(icon="close", on_click=partial(self._remove_example, example.id), color=None)
                    button.props("dense flat size=sm aria-label='remove the example' data-testid=example-remove")

    async def _remove_example(self, id_: str) -> None:
        await self.session.call(self.session.service.remove_example, id_)
        await self._show_examples()

    def _sent(self, is_ok: bool, message: str) -> None:
        self.session.say(message, is_error=not is_ok)

    def _exports(self) -> None:
        self._links: dict[str, Element] = {}
        self._exportable: tuple[bool, ...] = ()
        with ui.element("div").classes("am-exports"):
            for kind, text in EXPORTS.items():
                self._links[kind] = link = TextElement(tag="a", text=text).classes("am-export")
                link.props["href"], link.props["download"] = f"export/{kind}", ""
                link.props["data-testid"] = f"export-{kind}"
                link.on("click.prevent", partial(self._export, kind))

    async def _export(self, kind: str) -> None:
        """Download an export, or say why it is refused, which the browser would report as a failed download."""
        refused = await self._show_refusals()
        if kind in refused:
            self.session.say(f"{EXPORTS[kind]}: {refused[kind]}.", is_error=True)
        elif not self.session.client.is_deleted:
            with self.session.client:
                ui.download.from_url(f"/export/{kind}")

    async def _update_refusals(self) -> None:
        """Ask for the refusals when something that they depend on has begun or ended to exist."""
        summary = self.session.summary
        if summary is not None:
            counts = summary.counts
            state = (any(counts.values()), counts.get(Label.ANOMALY, 0) > 0, summary.histogram is not None)
            if state != self._exportable:
                self._exportable = state
                await self._show_refusals()

    async def _show_refusals(self) -> Mapping[str, str]:
        """Mark the exports that cannot be had now, each with the reason as its tooltip; return the reasons."""
        refused = await self.session.call(self.session.service.refused_exports) or {}
        for kind, link in self._links.items():
            link.classes(**{"add" if kind in refused else "remove": "am-off"})
            link.props["aria-disabled"] = "true" if kind in refused else "false"
            link.props["title"] = refused.get(kind, "")
            link.update()
        self._send.set_enabled("votable" not in refused)
        return refused


def _count(label: Label) -> ui.label:
    """Create the number of a label; return its figure."""
    with ui.element("div").classes(f"am-number am-{label}").props(f"data-testid=count-{label}"):
        figure = ui.label("0").classes("am-figure")
        ui.label(f"{SHAPES[label][0]} {label}").classes("am-hint")
    return figure
