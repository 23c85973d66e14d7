"""One audited run: the project's own round loop and trainer on rows with canaries, watched at the Grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config.run import RunConfig
from common.data.examples import Example
from common.data.federated import FederatedData, load_federated_data
from common.errors import RunError
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from server.checkpoint import load_checkpoint
from server.events import Observer
from simulations.audit.canaries import Canaries
from simulations.audit.scores import Scores, Watched, row_losses, tokenised, white_box_scores
from simulations.engines.app_handler import FIRST_NODE_ID
from simulations.run import simulate


@dataclass(frozen=True)
class AuditedRun:
    """What an audited run claims and what adversaries see of it.

    Attributes:
        epsilon: ε claimed for the canaries' site at the run's δ, infinite without a guarantee.
        white_box: [m] scores of the canaries to the coordinator.
        black_box: [m] scores of the canaries to whoever has the adapter: loss before minus loss after.
        members: scores (minus the loss under the final adapter) of the sites' own training rows.
        others: the same for test rows that are no training rows; empty where there is no test part.
    """

    epsilon: float
    white_box: Scores
    black_box: Scores
    members: Scores
    others: Scores


def run_audited(
    config: RunConfig,
    canaries: Canaries,
    folder: Path,
    *,
    noisy: bool,
    device: str = "auto",
    observer: Observer | None = None,
) -> AuditedRun:
    """Run ``config``, whose data hold the canaries that are in, and score canaries and rows.

    Args:
        config: the audited config.
        canaries: all canaries.
        folder: the run folder, new.
        noisy: whether its noise is meant to protect anything; otherwise nothing is claimed.
        device: to compute on.
        observer: told what happens.

    Raises:
        FedtuneError: for whatever keeps it from running.
    """
    data = load_federated_data(config.data, config.seed)
    model = resident_model(config, device)
    watched = Watched(FIRST_NODE_ID + data.sites.index(canaries.site))
    summary = simulate(config, folder, device=device, observer=observer, watch=watched)
    if not watched.exchanges:
        raise RunError(f"site {canaries.site!r} was in no round; expected it in one. Ask more sites, or more rounds.")
    start = initial_adapter(model, config.seed)
    final = {**start, **load_checkpoint(RunFolder(folder).checkpoint).adapter}
    rows = tokenised(model, config, canaries.examples)
    members, others = (tokenised(model, config, part) for part in _own_rows(data, canaries))
    return AuditedRun(
        epsilon=float(summary["epsilon"].get(canaries.site, math.inf)) if noisy else math.inf,
        white_box=white_box_scores(
            model,
            config,
            start,
            watched,
            rows,
            tokenised(model, config, _neighbours(data, canaries)),
        ),
        black_box=row_losses(model, config, start, rows) - row_losses(model, config, final, rows),
        members=-row_losses(model, config, final, members),
        others=-row_losses(model, config, final, others) if others else np.zeros(0),
    )


def _neighbours(data: FederatedData, canaries: Canaries) -> list[Example]:
    """The site's rows besides the canaries."""
    planted = {row.content for row in canaries.inserted}
    return [row for row in data.train[canaries.site] if row.content not in planted]


def _own_rows(data: FederatedData, canaries: Canaries) -> tuple[list[Example], list[Example]]:
    """Training rows of all sites without the canaries, and test rows that are not also training rows."""
    planted = {row.content for row in canaries.inserted}
    members = [row for rows in data.train.values() for row in rows if row.content not in planted]
    seen = {row.content for row in members}
    return members, [row for rows in data.test.values() for row in rows if row.content not in seen]
