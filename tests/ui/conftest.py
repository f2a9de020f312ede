"""Fixtures of the page: a service in memory, and NiceGUI's simulated user without its pytest plugin."""

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# See the fixtures above: what is imported for the first time by the library would be compiled anew.
import nicegui
import plotly.graph_objects  # noqa: F401
import pytest
from nicegui.storage import Storage
from nicegui.testing import User, general, user_simulation


def _fake_module() -> Any:
    path = Path(__file__).parent / "fake_service.py"
    spec = importlib.util.spec_from_file_location("fake_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_fake(make_source: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Make a `FakeService` over images in memory; options are those of the source, and `sky`."""
    fake = _fake_module()

    def make(count: int = 40, *, sky: bool = False, **options: Any) -> Any:
        return fake.FakeService(make_source(count, **options), tmp_path / "run", sky=sky)

    return make


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any, Callable[..., Awaitable[None]]], None]:
    """Open the page of a service as a simulated user and do something there: `visit(service, act)` awaits `act(user)`.

    An error that NiceGUI would only log fails the test.
    """
    monkeypatch.setattr(Storage, "path", tmp_path / "storage")  # else it is the folder one is in
    # It collects garbage before and after, which takes a second while the whole library is loaded.
    monkeypatch.setattr(general, "gc", SimpleNamespace(collect=lambda: 0))
    from anomalymatch.ui.web.page import build_page

    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "anomalymatch"}

    async def simulate(service: Any, act: Callable[[User], Awaitable[None]]) -> None:
        errors: list[Exception] = []
        async with user_simulation(root=lambda: None) as user:
            nicegui.app.on_exception(errors.append)
            build_page(service)
            await user.open("/")
            await act(user)
            if errors:
                raise errors[0]

    def run(service: Any, act: Callable[[User], Awaitable[None]]) -> None:
        try:
            asyncio.run(simulate(service, act))
        finally:
            sys.modules.update(kept)  # the simulation throws the modules of pages out

    return run
