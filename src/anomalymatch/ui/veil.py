"""Veil over images: hides scores during a random audit, and in blind mode the labels of others before one's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anomalymatch.ui.views import Details, Tile


@dataclass(frozen=True)
class Veil:
    """Veil over the images of a page.

    Attributes:
        scores: True to hide scores and ranks.
        blind: name of a person who sees the labels of others only after a label of their own; empty hides none.
    """

    scores: bool = False
    blind: str = ""

    def hides_label(self, tile: Tile) -> bool:
        """Return True if the label of an image is hidden."""
        return bool(self.blind) and tile.label is not None and self.blind not in tile.people

    def tiles(self, tiles: Sequence[Tile]) -> list[Tile]:
        """Return the tiles without what is hidden; a group would tell the label, too."""
        return [self._tile(tile) for tile in tiles]

    def _tile(self, tile: Tile) -> Tile:
        if self.hides_label(tile):
            tile = replace(tile, label=None, annotator=None, group=None, people=())
        return replace(tile, score=None, rank=None) if self.scores else tile

    def details(self, details: Details) -> Details:
        """Return the details of an image without what is hidden."""
        history = [] if self.hides_label(details.tile) else details.history
        if self.scores:
            history = [event._replace(score=None) for event in history]
        return replace(details, tile=self._tile(details.tile), history=history)


NO_VEIL = Veil()
"""Veil that hides nothing."""
