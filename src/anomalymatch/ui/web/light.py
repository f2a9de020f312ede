"""Light of all tiles: stretch, channel, brightness and contrast, remembered by the browser for each archive."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nicegui import ui

from anomalymatch.ui.pictures import AS_TRAINED
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import drop_down

ALL_CHANNELS = "all"
FILTER = (0.2, 4.0)
"""Smallest and largest brightness and contrast; 1 changes nothing."""


@dataclass(frozen=True)
class Light:
    """Settings of the light.

    Attributes:
        stretch: one of `pictures.STRETCHES`; the server applies it to the original values.
        channel: a channel that is shown alone in grey, or `ALL_CHANNELS`.
        brightness: factor that the browser applies, as it does `contrast`.
    """

    stretch: str = AS_TRAINED
    channel: str = ALL_CHANNELS
    brightness: float = 1.0
    contrast: float = 1.0

    @property
    def parameters(self) -> dict[str, str]:
        """Parameters in the addresses of pictures; none for pictures as trained on."""
        stretch = {} if self.stretch == AS_TRAINED else {"stretch": self.stretch}
        return stretch if self.channel == ALL_CHANNELS else stretch | {"channel": self.channel}

    @classmethod
    def from_json(cls, text: str, stretches: Sequence[str], channels: Sequence[str]) -> "Light":
        """Read the settings of an earlier visit; what is wrong or no longer available takes its default."""
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        given = given if isinstance(given, dict) else {}
        found: dict[str, Any] = {
            name: given[name]
            for name, choices in (("stretch", stretches), ("channel", channels))
            if given.get(name) in choices
        }
        for name in ("brightness", "contrast"):
            value = given.get(name)
            if isinstance(value, int | float) and FILTER[0] <= value <= FILTER[1]:
                found[name] = float(value)
        return cls(**found)


class LightControls:
    """Controls of the light of all tiles.

    Attributes:
        light: the current settings.
        on_change: called with each new setting.
    """

    def __init__(self, session: Session, version: str) -> None:
        self.session, self._name = session, f"light.{version}"
        self.light, self._is_showing = Light(), False
        self.on_change: list[Callable[[Light], None]] = []
        service = session.service
        self._channels = [ALL_CHANNELS, *service.channels]
        with ui.element("div").classes("am-look"):
            ui.label("stretch")
            self._stretch = drop_down(
                service.stretches, AS_TRAINED, "stretch of all tiles", "light-stretch", self._chosen
            )
            with ui.element("div").classes("am-contents") as channel:
                ui.label("channel")
                self._channel = drop_down(
                    self._channels, ALL_CHANNELS, "channel of all tiles", "light-channel", self._chosen
                )
            channel.set_visibility(len(service.channels) > 1)
            self._filters = {name: self._slider(name) for name in ("brightness", "contrast")}
            self._reset = ui.button("Reset the light", on_click=lambda: self.set(Light()), color=None)
            self._reset.props("dense flat no-caps size=sm data-testid=light-default").classes("am-whole")

    def restore(self, kept: dict[str, Any]) -> None:
        """Restore the settings of an earlier visit."""
        text = kept.get(self._name)
        if text:
            self.set(Light.from_json(str(text), self.session.service.stretches, self._channels))

    def set(self, light: Light) -> None:
        """Change the light of all tiles."""
        if light == self.light:
            return
        self.light, self._is_showing = light, True
        self._stretch.value, self._channel.value = light.stretch, light.channel
        for name, slider in self._filters.items():
            slider.value = getattr(light, name)
        self._is_showing = False
        words = {"parameters": light.parameters, "brightness": light.brightness, "contrast": light.contrast}
        self.session.gallery.set_option("light", words)
        self.session.gallery.remember(self._name, json.dumps(asdict(light)))
        for listener in self.on_change:
            listener(light)

    def _slider(self, name: str) -> ui.slider:
        ui.label(name)
        slider = ui.slider(min=FILTER[0], max=FILTER[1], step=0.05, value=1.0)
        slider.props(f"dense aria-label='{name} of all tiles' data-testid=light-{name}")
        # The browser shows it while the slider moves, without waiting for the server.
        slider.on(
            "update:model-value",
            js_handler=f"(value) => document.documentElement.style.setProperty('--{name}', value)",
        )
        slider.on("change", self._chosen)
        return slider

    def _chosen(self) -> None:
        if self._is_showing:
            return
        filters = {name: round(float(slider.value), 2) for name, slider in self._filters.items()}
        self.set(Light(str(self._stretch.value), str(self._channel.value), **filters))
