"""A run at a coordinator: leased, resumed from its checkpoint, watched and steered."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import ConfigError, DataError, FedtuneError, ModelError
from server.control.board import Board
from server.control.service import ControlService, mutual_tls, served
from server.control.steered import Steered, StoppedError
from server.control.steered_grid import SteeredGrid
from server.enrolment import Enrolment
from server.federation import RunSettings, run_federation
from server.run_place import Outcome, RunPlace
from server.state_folder import StateFolder
from server.supervise.components import STATE_VARIABLE

logger = logging.getLogger(__name__)


def run_coordinated(grid: Grid, config: RunConfig, name: str, fence: int) -> None:
    """Work on a run of the coordinator whose state folder the environment names.

    Args:
        grid: what carries the messages.
        config: the run config.
        name: of the run.
        fence: of this submission of it.

    Raises:
        FedtuneError: for whatever keeps it from being complete; written down beside the run, and Flower counts the run
            as failed.
    """
    folder = os.environ.get(STATE_VARIABLE)
    if not folder:
        raise ConfigError(f"{STATE_VARIABLE} is not set; expected the state folder, as fedtune-server up sets it.")
    state = StateFolder.open(Path(folder))
    place = RunPlace(state, name)
    place.expect_current(fence)  # also where the name is unknown, before anything is made of it
    with place.lease(fence), _logged(place.log):
        if place.stop_wish.exists():  # an operator gave the run up before it had begun
            place.write_outcome(Outcome(fence=fence, ended="stopped"))
            return
        board = Board(name, config.federation.rounds)
        try:
            steered = Steered(place.steering, config, board)
            with _controlled(state, place, config, board, steered):
                ended = _run(state, SteeredGrid(grid, steered.expect_running), config, place, fence, board, steered)
                place.write_outcome(Outcome(fence=fence, ended=ended))
                board.ended(ended)
        except FedtuneError as error:
            final = isinstance(error, ConfigError | DataError | ModelError)
            place.write_outcome(Outcome(fence=fence, ended="failed", reason=str(error), final=final))
            logger.error("%s", error)
            raise


def _run(
    state: StateFolder, grid: Grid, config: RunConfig, place: RunPlace, fence: int, board: Board, steered: Steered
) -> Literal["completed", "stopped"]:
    """Run to the end and return how it ended: "completed" or "stopped"."""
    server = state.config()
    resume = (place.folder.checkpoint / "state.json").exists()
    if not resume and place.folder.path.exists():
        shutil.rmtree(place.folder.path)  # it ended before its first checkpoint: there is nothing to go on from
    settings = RunSettings(
        place.folder, resume=resume, device=server.device, steering=steered,
        settle=lambda: place.expect_current(fence), enrolled=Enrolment(state).members(),
    )  # fmt: skip
    try:
        run_federation(grid, config, settings, board)
    except StoppedError:
        return "stopped"
    except FedtuneError as error:
        board.ended("failed", str(error))
        raise
    done = board.read()[1].completed_rounds
    return "completed" if done >= config.federation.rounds else "stopped"


@contextlib.contextmanager
def _controlled(
    state: StateFolder, place: RunPlace, config: RunConfig, board: Board, steered: Steered
) -> Iterator[None]:
    port, tcp = state.config().control_port, None
    if port is not None:
        tcp = (port, mutual_tls(state.ca_certificate, state.certificate("control"), state.key("control")))
    rounds = config.federation
    service = ControlService(board, steered, (rounds.round_timeout_s, rounds.sites_per_round or 0))
    with served(service, place.socket, tcp):
        try:
            yield
        except BaseException:  # also SystemExit, as which Flower ends a ServerApp
            if not board.read()[1].ended:
                board.ended("interrupted")
            raise


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append what this process logs to the run's own log."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = [logging.getLogger(package) for package in ("server", "common")]  # others log each request
    for package in ours:
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        for package in ours:
            package.removeHandler(handler)
        handler.close()
