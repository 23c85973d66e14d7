"""Where a coordinator keeps a run, and who may work on it: at most one ServerApp at a time, and never an old one.

::

    runs/NAME/
      submission.json   what was asked for and how often it was submitted; written by the caretaker alone
      lease.lock        locked by the ServerApp at work for as long as it lives
      lease.json        the fence of the ServerApp that held the lock last
      outcome.json      how it ended, if it could still say so
      steering.json     pause, and what was set between rounds
      stop              asks the caretaker, and a ServerApp that begins, to give the run up
      run.log           log of the ServerApp
      run/              the run folder: checkpoint, metrics, adapter

A submission has a *fence*, a number that grows each time the run is submitted. A ServerApp whose fence is not the
newest ends before it does anything: it is one that Flower started late, while a newer one was submitted in its place.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from common.atomic import write_atomic
from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from common.config.section import Section
from common.errors import ConfigError, RunError
from common.run_folder import RunFolder
from server.state_folder import StateFolder

LEASE_WAIT_S = 60.0
"""Longest that a ServerApp waits for the one before it, which may still be ending."""


class Submission(Section):
    """A run as it was asked for, and where its submission stands."""

    format: Literal[1] = 1
    name: str
    """Name of the run."""
    config_yaml: str
    """The resolved run config."""
    asked: str
    """When it was asked for, UTC."""
    state: Literal["waiting", "submitting", "submitted", "completed", "stopped", "failed"] = "waiting"
    """waiting for the SuperLink; submitting while Flower is asked; submitted once Flower has it; or how it ended."""
    fence: Annotated[int, Field(ge=0)] = 0
    """Grows with every submission."""
    flower_run: int | None = None
    """Flower's id of the newest submission."""
    flower_runs: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Flower's ids of all submissions."""
    stopping: bool = False
    """The caretaker ends the newest submission at Flower, to submit the run again; no operator asked for it."""
    submitted_s: float = 0.0
    """When it was submitted last, in seconds since 1970."""
    due_s: float = 0.0
    """Not before this time is it submitted again."""
    fruitless: Annotated[int, Field(ge=0)] = 0
    """Submissions in a row that completed no round."""
    round_before: Annotated[int, Field(ge=0)] = 0
    """Rounds that were complete when it was submitted last."""
    reason: str | None = None
    """Why it failed."""

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("completed", "stopped", "failed")

    def config(self) -> RunConfig:
        """Return the run config."""
        return parse_run_config(self.config_yaml, self.name, None)


class Outcome(Section):
    """How a ServerApp ended."""

    fence: int
    ended: Literal["completed", "stopped", "failed"]
    reason: str | None = None
    final: bool = True
    """Whether it would end the same way again."""


class _Holder(Section):
    fence: int
    pid: int


Kept = TypeVar("Kept", bound=Section)


class RunPlace:
    """Paths of one run at a coordinator.

    Args:
        state: the state folder.
        name: of the run.
    """

    def __init__(self, state: StateFolder, name: str) -> None:
        self.name = name
        self.path = state.runs / name
        self.folder = RunFolder(self.path / "run")
        self.log = self.path / "run.log"
        self.steering = self.path / "steering.json"
        self.stop_wish = self.path / "stop"
        self.socket = state.socket(name)
        self._submission = self.path / "submission.json"
        self._outcome = self.path / "outcome.json"
        self._lock, self._holder = self.path / "lease.lock", self.path / "lease.json"

    def submission(self) -> Submission:
        """Read the submission.

        Raises:
            ConfigError: if there is no such run.
        """
        found = _read(self._submission, Submission)
        if found is None:
            raise ConfigError(f"no run {self.name!r} is known; expected one that fedtune-server runs lists.")
        return found

    def write(self, submission: Submission) -> None:
        """Write the submission; the caretaker's part once it was asked for."""
        _write(self._submission, submission)

    def outcome(self) -> Outcome | None:
        """Return how the newest submission's ServerApp ended, None if it has not or could not say."""
        return _read(self._outcome, Outcome)

    def write_outcome(self, outcome: Outcome) -> None:
        """Say how it ended."""
        _write(self._outcome, outcome)

    def last_fence(self) -> int | None:
        """Return the fence of the ServerApp that worked on the run last, None before the first."""
        holder = _read(self._holder, _Holder)
        return None if holder is None else holder.fence

    def is_live(self) -> bool:
        """Whether a ServerApp works on the run now. The kernel knows: its lock ends with the process."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)

    def completed_rounds(self) -> int:
        """Return the rounds of the newest checkpoint, 0 if there is none."""
        try:
            state = json.loads((self.folder.checkpoint / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0
        return int(state["round"])

    def expect_current(self, fence: int) -> None:
        """Check that a ServerApp's submission is the newest one.

        Raises:
            RunError: if the run was submitted again.
        """
        newest = self.submission().fence
        if fence != newest:
            raise RunError(
                f"submission {fence} of run {self.name!r} was replaced by {newest}; expected the newest one alone to "
                "work on it. Nothing is to be done."
            )

    @contextmanager
    def lease(self, fence: int, wait_s: float = LEASE_WAIT_S) -> Iterator[None]:
        """Be the one ServerApp that works on the run.

        Raises:
            RunError: if another one works on it, or a newer submission was made.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + wait_s
            while not _try_lock(descriptor):
                self.expect_current(fence)
                if time.monotonic() >= deadline:
                    raise RunError(f"another ServerApp works on run {self.name!r}; expected none. Wait for its end.")
                time.sleep(0.2)
            self.expect_current(fence)
            _write(self._holder, _Holder(fence=fence, pid=os.getpid()))
            yield
        finally:
            os.close(descriptor)


def ask_for_run(state: StateFolder, config: RunConfig, *, again: bool = False) -> RunPlace:
    """Put a run down for the caretaker to submit.

    Args:
        state: the state folder.
        config: the run config.
        again: go on with a run of that name that has ended before its last round.

    Raises:
        ConfigError: for a simulation, or another config than the run was started with.
        RunError: if a run of that name is there, or, with ``again``, is not over.
    """
    if config.simulation is not None:
        raise ConfigError("simulation is set; expected no such section outside fedtune-sim. Remove it from the config.")
    place = RunPlace(state, config.name)
    asked = datetime.now(UTC).isoformat(timespec="seconds")
    if not again:
        try:
            place.path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(
                f"a run {config.name!r} is there already; expected a new name (--set name=...), or --resume to go on."
            ) from None
        place.write(Submission(name=config.name, config_yaml=dump_run_config(config), asked=asked))
        return place
    known = place.submission()
    if not known.over:
        raise RunError(f"run {config.name!r} is not over; expected one that was stopped or failed. Watch it instead.")
    if known.config().digest() != config.digest():
        raise ConfigError(f"run {config.name!r} was started with another config; expected the same. Choose a new name.")
    place.stop_wish.unlink(missing_ok=True)
    place.steering.unlink(missing_ok=True)
    afresh = {"state": "waiting", "fence": known.fence + 1, "fruitless": 0, "due_s": 0.0, "reason": None}
    place.write(known.model_copy(update=afresh))  # with another fence, the old outcome counts no more
    return place


def known_runs(state: StateFolder) -> list[RunPlace]:
    """Return the runs of a coordinator, in the order in which they were asked for."""
    places = [RunPlace(state, path.parent.name) for path in state.runs.glob("*/submission.json")]
    return sorted(places, key=lambda place: (place.submission().asked, place.name))


def find_run(state: StateFolder, name: str) -> RunPlace:
    """Return a run by name.

    Raises:
        ConfigError: if there is none.
    """
    known = [place.name for place in known_runs(state)]
    if name not in known:
        raise ConfigError(f"no run {name!r} is known; expected one of: {', '.join(known) or 'none'}.")
    return RunPlace(state, name)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, kind: type[Kept]) -> Kept | None:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise RunError(f"{path} is damaged; expected what fedtune wrote. Restore the file.") from None


def _write(path: Path, values: Section) -> None:
    write_atomic(path, (values.model_dump_json(indent=2) + "\n").encode())
