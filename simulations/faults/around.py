"""Puts the faults of a run config around the Grid of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.config.simulation import SimulationConfig
from common.models.adapter import AdaptedModel
from server.federation import RunSettings
from simulations.faults.faults import Faults
from simulations.faults.faulty_grid import FaultyGrid
from simulations.faults.replay import OldAnswers
from simulations.faults.work import TokensDone


def with_faults(
    grid: Grid, config: RunConfig, sites: Sequence[str], model: AdaptedModel, first_node: int, settings: RunSettings
) -> tuple[Grid, RunSettings]:
    """Return the Grid and the settings to run with: the same ones where the config has no ``simulation`` section.

    Where the order of arrival decides what counts, a clock of the simulation's own makes it follow from the run config:
    without a section all replies to a round arrive at once, in an order that is drawn for it.

    Args:
        grid: computes the honest replies.
        config: the run config.
        sites: names of the sites in the order of their nodes.
        model: the resident model, for its tokenizer.
        first_node: node id of the first site.
        settings: of the run.

    Raises:
        ConfigError: for a section that does not fit the sites.
    """
    timed = config
    if config.simulation is None and config.federation.depends_on_time:
        timed = config.model_copy(update={"simulation": SimulationConfig()})  # the same order with every engine
    faults = Faults.of(timed, sites)
    if faults is None:
        return grid, settings
    tokens, old = TokensDone(config, model, sites), OldAnswers(settings.folder.checkpoint)
    faulty = FaultyGrid(grid, faults, first_node, Packing.of_update(config.communication), tokens, old)
    return faulty, replace(settings, clock=faulty.clock, round_notes=faulty.round_notes)
