"""Active learning: loop, oracles, query strategies, cold starts, audit, run folder and report."""

from anomalymatch.active.cold_start import ColdStart, KCentreOrder, MixedOrder, RandomOrder
from anomalymatch.active.loop import ActiveLoop, LoopSpec
from anomalymatch.active.oracles import Oracle, PaperOracle, TopKOracle
from anomalymatch.active.run_folder import RunFolder, RunReader
from anomalymatch.active.strategies import Strategy
from anomalymatch.active.tracking import Tracker, WandbTracker

__all__ = [
    "ActiveLoop",
    "ColdStart",
    "KCentreOrder",
    "LoopSpec",
    "MixedOrder",
    "Oracle",
    "PaperOracle",
    "RandomOrder",
    "RunFolder",
    "RunReader",
    "Strategy",
    "TopKOracle",
    "Tracker",
    "WandbTracker",
]
