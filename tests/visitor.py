"""Simulated user of the labelling page, without a browser."""

import asyncio
import inspect

from nicegui.testing.user_interaction import UserInteraction

from anomalymatch.ui.web.gallery import GalleryElement
from anomalymatch.ui.web.status import StatusBar


class Visitor:
    """Simulated user of the page, with the actions that the tests need."""

    def __init__(self, user):
        self.user = user

    @property
    def gallery(self):
        (gallery,) = self.user.find(kind=GalleryElement).elements
        return gallery

    @property
    def ids(self):
        return self.gallery.ids

    @property
    def page(self):
        return self.gallery._props["page"]

    @property
    def status(self):
        """The properties of the status line; the page and the large view show the same."""
        first, second = self.user.find(kind=StatusBar).elements
        assert first._props["text"] == second._props["text"]
        return first._props

    async def says(self, text, *, error=False):
        await self.until(lambda: text in self.status["text"] and self.status["isError"] == error)

    def send(self, event, **args):
        """Send an event of the gallery, like the browser."""
        self.user.find(kind=GalleryElement).trigger(event, args)

    def label(self, ids, label):
        self.send("label", ids=list(ids), label=label)

    def all(self, name):
        return [e for e in self.user.client.elements.values() if e.props.get("data-testid") == name]

    def get(self, name):
        (found,) = self.all(name)
        return found

    def act(self, name, event="click"):
        interaction = UserInteraction(self.user, {self.get(name)}, None)
        interaction.click() if event == "click" else interaction.trigger(event)

    async def until(self, condition, seconds=10.0):
        """Wait for a change in a thread or in the event loop."""
        for _ in range(int(seconds / 0.01)):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the condition was not met in time")

    async def sees(self, text):
        await self.user.should_see(text, retries=40)


def on_page(test):
    """Run an asynchronous test on the page of `service` once it shows its first images.

    Its first argument is the visitor, the others are fixtures.
    """
    names = [name for name in inspect.signature(test).parameters if name != "page"]

    def run(service, visit, request):
        fixtures = {name: request.getfixturevalue(name) for name in names}

        async def simulated(user):
            visitor = Visitor(user)
            await visitor.until(lambda: visitor.page["tiles"] is not None)
            await test(visitor, **fixtures)

        visit(service, simulated)

    run.__name__ = test.__name__
    return run
