"""Question before a training, and its progress in the header."""

import math

from nicegui import ui

from anomalymatch.ui.training import TrainingStatus
from anomalymatch.ui.web.preparation import time_text
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import many

UNKNOWN_TIME = "It is the first one here, so its time is unknown: minutes on a graphics card, up to hours without one."


class TrainingQuestion:
    """Dialog that asks whether to train, with an estimate of the time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._dialog = ui.dialog().props("aria-label='Train' data-testid=train-dialog")
        with self._dialog, ui.card().classes("am-ask"):
            self._title = ui.label().classes("am-title")
            self._text = ui.label().classes("am-wrap").props("data-testid=train-estimate")
            with ui.row().classes("am-line"):
                yes = ui.button("Train", on_click=self._train)
                yes.props("unelevated dense no-caps autofocus data-testid=train-yes")
                no = ui.button("Cancel", on_click=self._dialog.close, color=None)
                no.props("flat dense no-caps data-testid=train-no")

    async def ask(self) -> None:
        """Ask, unless a training is running or impossible, which the status line then says."""
        training = self.session.service.training
        if await self.session.call(training.check) is None:
            return
        seconds = training.estimate()
        summary = await self.session.fetch_summary()
        labels = 0 if summary is None else sum(summary.counts.values())
        time = UNKNOWN_TIME if math.isnan(seconds) else f"The last one took {time_text(seconds)}."
        self._title.text = f"Train on {many(labels, 'label')}?"
        self._text.text = f"{time} You can label meanwhile; the new order is offered when it is there."
        self._dialog.open()

    async def _train(self) -> None:
        self._dialog.close()
        await self.session.train()


class TrainingProgress:
    """Progress of a training in the header, also on small screens."""

    def __init__(self) -> None:
        self._text = ui.label().classes("am-training").props("data-testid=training-header aria-live=polite")
        self._bar = ui.linear_progress(0, show_value=False, size="3px").classes("am-training-bar")
        self._bar.props("aria-label='Progress of the training'")

    def show(self, status: TrainingStatus) -> None:
        """Show the status of the training; nothing unless one runs."""
        is_busy = status.state in ("running", "stopping")
        self._text.set_visibility(is_busy)
        self._bar.set_visibility(is_busy)
        self._text.text = header_text(status) if is_busy else ""
        self._bar.set_value(status.step / status.steps if status.steps else 0)
        self._bar.props("indeterminate" if not status.step else "", remove="" if not status.step else "indeterminate")


def header_text(status: TrainingStatus) -> str:
    """Describe a running training in a few words."""
    if status.state == "stopping":
        return "Training: stopping …"
    if not status.step:
        return "Training: starting …"
    if not status.steps:
        return f"Training: step {status.step:,}"
    left = status.seconds / status.step * max(0, status.steps - status.step)
    return f"Training: {min(1, status.step / status.steps):.0%} · {time_text(left)} left"
