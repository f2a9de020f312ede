"""Several people at one search: the request for a name, annotators, conflicts, blind mode and disjoint parts."""

import math
import secrets
from collections.abc import Sequence

from nicegui import ui

from anomalymatch.data.label_log import AUTOMATIC
from anomalymatch.ui.labels import MAX_NAME
from anomalymatch.ui.people import needs_name
from anomalymatch.ui.views import QUEUES, Agreement, Summary
from anomalymatch.ui.web.routes import thumbnail_address, version
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import drop_down, many

CONFLICTS, SIDE = 12, 96
COMMON = 10
"""Smallest number of common images for which the agreement of two annotators says anything."""
MAX_TEAM = 6
"""Largest number of parts in the list; an address can have more."""
WHO = "Somebody else labels here, too: write your name at the top, so that labels can be told apart."
BLIND = "The labels of others stay hidden until you have given yours."
PART = "Different parts have no image in common: people who label at once choose one each."


def share_text(share: tuple[int, int]) -> str:
    """Name a part of the images."""
    return "all images" if share == (1, 1) else "part {} of {}".format(*share)


SHARES = {share_text((part, parts)): (part, parts) for parts in range(1, MAX_TEAM + 1) for part in range(1, parts + 1)}


class NameRequest:
    """Request for a name while another browser has the page open and this person is still called "me".

    Attributes:
        field: the field for the name.
    """

    def __init__(self, session: Session) -> None:
        self.session, self._is_asking = session, False
        self.field: ui.input | None = None
        self._text = ui.label("your name?").classes("am-who").props(f"data-testid=who title='{WHO}'")
        self._text.set_visibility(False)
        session.watchers.append(lambda kinds, _: self.refresh() if "people" in kinds else None)

    def join(self, browser: str) -> None:
        """Note that the page is open in a browser, which gets a random name at its first visit."""
        people, client = self.session.service.people, self.session.client
        browser = browser[:MAX_NAME]
        if not browser:
            browser = secrets.token_hex(8)
            self.session.gallery.remember("browser", browser)
        if not client.is_deleted:
            people.join(client.id, browser)
            client.on_disconnect(lambda: people.leave(client.id))
            client.on_connect(lambda: people.join(client.id, browser))
        self.refresh()

    def refresh(self) -> None:
        """Ask for a name, or stop asking."""
        others = self.session.service.people.others(self.session.client.id)
        is_asking = needs_name(self.session.annotator, others)
        if is_asking == self._is_asking:
            return
        self._is_asking = is_asking
        if self.field is not None:
            self.field.classes(**{"add" if is_asking else "remove": "am-asked"})
        self._text.set_visibility(is_asking)
        if is_asking and not self.session.status.text:  # what is said there is more urgent
            self.session.say(WHO)


class PeoplePanel:
    """Annotators with their agreement, what is to review, and the settings of a team."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lines: dict[str, ui.label] = {}
        self._conflicts: Sequence[str] = ()
        self._nobody = ui.label("There are no labels yet.").classes("am-hint")
        self._people = ui.column().classes("am-stack").props("data-testid=annotators")
        self._review = ui.button(on_click=session.review).props("dense flat no-caps size=sm data-testid=review")
        self._hint = ui.label("Images in conflict or unsure. The next label of one settles it.").classes("am-hint")
        self._pictures = ui.row().classes("am-examples")
        with ui.element("div").classes("am-stack").props("data-testid=team") as self._team:
            with ui.row().classes("am-line"):
                ui.label("I label").classes("am-hint")
                self._part = drop_down(list(SHARES), share_text((1, 1)), "my images", "part", self._choose_part)
                self._part.tooltip(PART)
            self._blind = ui.switch("blind", value=False, on_change=self._choose_blind)
            self._blind.props("dense data-testid=blind").tooltip(BLIND)
        self._show_query()
        session.on_query.append(self._show_query)

    def restore(self, kept: dict[str, str]) -> None:
        """Restore the settings of the last visit."""
        self.session.blind = kept.get("blind") == "true"  # at once: what follows may bring images
        self._blind.value = self.session.blind

    def show(self, summary: Summary) -> None:
        """Show a summary."""
        lines = {name: many(labels, "label") for name, labels in summary.annotators.items()}
        for pair in summary.agreements:
            if pair.images >= COMMON:
                lines[f"{pair.first} and {pair.second}"] = _agreement_text(pair)
        if lines.keys() != self._lines.keys():
            self._people.clear()
            with self._people:
                self._lines = {name: _line(name) for name in lines}
        for name, text in lines.items():
            self._lines[name].text = text
        self._nobody.set_visibility(not lines)
        self._review.text = f"{summary.reviews:,} to review (q)"
        for element in (self._review, self._hint):
            element.set_visibility(summary.reviews > 0)
        if summary.conflicts[:CONFLICTS] != self._conflicts:
            self._conflicts = summary.conflicts[:CONFLICTS]
            self._show_conflicts()
        people = [name for name in summary.annotators if name not in AUTOMATIC]
        others = self.session.service.people.others(self.session.client.id)
        is_set = self._blind.value or self.session.query.share != (1, 1)
        self._team.set_visibility(len(people) > 1 or others > 0 or is_set)

    def _show_conflicts(self) -> None:
        self._pictures.clear()
        self._pictures.set_visibility(bool(self._conflicts))
        with self._pictures:
            for id_ in self._conflicts:
                look = ui.element("button").classes("am-example")
                look.on("click", lambda _, id_=id_: self.session.view(id_))
                look.props.update({"title": id_, "aria-label": f"show {id_}, in conflict", "data-testid": "conflict"})
                with look:
                    picture = ui.element("img")
                    address = thumbnail_address(id_, SIDE, version(self.session.service.source))
                    picture.props.update({"src": address, "alt": "", "loading": "lazy"})

    def _show_query(self) -> None:
        share = self.session.query.share
        if share not in SHARES.values():  # an address may have more parts
            self._part.set_options([*SHARES, share_text(share)])
        self._part.value = share_text(share)
        self._review.props(f"aria-pressed={'true' if self.session.query.show in QUEUES else 'false'}")

    async def _choose_part(self) -> None:
        share = SHARES.get(str(self._part.value), self.session.query.share)
        if share != self.session.query.share:
            await self.session.change(share=share)

    async def _choose_blind(self) -> None:
        self.session.gallery.remember("blind", str(bool(self._blind.value)).lower())
        await self.session.set_blind(bool(self._blind.value))


def _line(name: str) -> ui.label:
    """Create a line with a name; return the label beside it."""
    with ui.row().classes("am-line"):
        ui.label(name).classes("am-grow am-id")
        return ui.label().classes("am-hint")


def _agreement_text(agreement: Agreement) -> str:
    kappa = "" if math.isnan(agreement.kappa) else f", κ {agreement.kappa:.2f}"
    return f"agree on {agreement.share:.0%} of {agreement.images:,}{kappa}"
