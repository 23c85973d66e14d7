"""Steering from outside: pause, stop, and what was set, kept in a file so that a run submitted again remembers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from common.atomic import write_atomic
from common.config.federation import FederationConfig
from common.config.run import RunConfig
from common.config.section import Section
from common.config.yaml_text import parse_value
from common.errors import ConfigError, RunError
from server.cohort import expect_rule_holds
from server.control.board import Board
from server.steering import Steering

if TYPE_CHECKING:
    from flwr.serverapp import Grid

PAUSE_POLL_S = 1.0
AS_CONFIGURED = "all"
"""Value that takes a setting back to that of the run config."""


class StoppedError(RunError):
    """An operator ended the run at once."""


class Settings(Section):
    """What an operator has set. None keeps what the run config says."""

    paused: bool = False
    """No further round begins."""
    stops_after_round: bool = False
    """The run ends with the round in progress."""
    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """Sites sampled for a round."""
    round_timeout_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    """Seconds after which a round goes on with the updates it has."""


SETTABLE = ("sites_per_round", "round_timeout_s")


class Steered(Steering):
    """Steering that other threads may change.

    Args:
        file: where settings are kept.
        config: the run config.
        board: told of pauses.
    """

    def __init__(self, file: Path, config: RunConfig, board: Board) -> None:
        self._file, self._config, self._board = file, config, board
        self._changed = threading.Condition()
        self._stopped = False
        self._settings = _read(file)

    @property
    def settings(self) -> Settings:
        """What is set now."""
        return self._settings

    def proceed(self, number: int, grid: Grid) -> bool:
        """Wait while the run is paused, and return whether it goes on.

        While it waits it keeps calling the grid: only there does Flower end a ServerApp whose run was stopped.

        Raises:
            StoppedError: if an operator ended the run.
        """
        waited = False
        while True:
            self.expect_running()
            if self._settings.stops_after_round:
                return False
            if not self._settings.paused:
                if waited:
                    self._board.resumed()
                return True
            if not waited:
                self._board.paused(number)
                waited = True
            list(grid.get_node_ids())
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._settings.paused, PAUSE_POLL_S)

    def ends(self) -> bool:
        """Return whether an operator ended the run, now or with the round in progress."""
        return self._stopped or self._settings.stops_after_round

    def sites_per_round(self, configured: int | None) -> int | None:
        """Return how many sites a round asks, None for all."""
        return self._settings.sites_per_round or configured

    def round_timeout_s(self, configured: float) -> float:
        """Return the seconds after which a round goes on with the updates it has."""
        return self._settings.round_timeout_s or configured

    def expect_running(self) -> None:
        """Check that nobody ended the run.

        Raises:
            StoppedError: if somebody did.
        """
        if self._stopped:
            raise StoppedError("an operator stopped the run; expected nothing further. Its checkpoint is kept.")

    def pause(self) -> None:
        """Let no further round begin."""
        self._change(paused=True)

    def resume(self) -> None:
        """Let the run go on."""
        self._change(paused=False)

    def stop(self, *, after_round: bool) -> None:
        """End the run, now or after the round in progress."""
        if after_round:
            self._change(stops_after_round=True, paused=False)
        else:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def set(self, key: str, text: str) -> None:
        """Set what may change between rounds.

        Args:
            key: one of ``SETTABLE``.
            text: the value as in YAML, or "all".

        Raises:
            ConfigError: for another key, or a value that the run cannot have.
        """
        if key not in SETTABLE:
            raise ConfigError(f"{key!r} cannot be set while a run goes on; expected one of {', '.join(SETTABLE)}.")
        value = None if text.strip() == AS_CONFIGURED else parse_value(text)
        if key == "round_timeout_s" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        self._change(**{key: value})

    def _change(self, **changes: object) -> None:
        with self._changed:
            try:
                fresh = Settings.model_validate({**self._settings.model_dump(), **changes})
            except ValidationError as error:
                found = error.errors(include_url=False)[0]
                rule = found["msg"].removeprefix("Input should be ")
                raise ConfigError(f"{found['loc'][0]} is {found['input']!r}; expected {rule}.") from None
            if "sites_per_round" in changes:
                _expect_askable(self._config, fresh.sites_per_round)
            write_atomic(self._file, (fresh.model_dump_json(indent=2) + "\n").encode())
            self._settings = fresh
            self._changed.notify_all()
        self._board.touch()


def _expect_askable(config: RunConfig, sites: int | None) -> None:
    """Check that the rounds of a run could ask another number of sites, and be complete.

    Args:
        config: the run config.
        sites: to ask, before over-selection; None for as many as the run config says.

    Raises:
        ConfigError: under site-level privacy, or for a number that the run config itself could not have.
    """
    if config.privacy.site_level_settings is not None:
        raise ConfigError(
            "sites_per_round is part of the mechanism of site-level privacy; expected no change. Start a new run."
        )
    if sites is None:
        return
    try:
        federation = FederationConfig.model_validate({**config.federation.model_dump(), "sites_per_round": sites})
        changed = RunConfig.model_validate({**dict(config), "federation": federation})
        expect_rule_holds(changed, sites)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"sites_per_round cannot be {sites} in this run: {reason}. Set another number.") from None
    except RunError as error:
        raise ConfigError(f"sites_per_round cannot be {sites} in this run: {error}") from None


def _read(file: Path) -> Settings:
    try:
        return Settings.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except ValidationError:
        raise RunError(f"{file} is damaged; expected what fedtune wrote. Remove it to begin unpaused.") from None
