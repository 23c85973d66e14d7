"""What is shown while a command makes many runs, and how it ends on Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import typer
from rich.console import Console

from common.console import INTERRUPTED, error_console
from server.events import Observer
from simulations.progress import LiveProgress
from simulations.study.runs import PlannedRun


class RunLines:
    """Names each run before it goes on, and shows it live.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, run: PlannedRun) -> AbstractContextManager[Observer]:
        """Begin a run."""
        self.say(f"{run.label}, seed {run.seed}")
        return LiveProgress(self._console)

    def say(self, what: str) -> None:
        """Print a line."""
        self._console.print(f"— {what}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def kept_on_interrupt() -> Iterator[None]:
    """End on Ctrl-C with one line: complete runs and checkpoints stay."""
    try:
        yield
    except KeyboardInterrupt:
        error_console().print(
            "interrupted. What is complete is kept, and a run cut short goes on from its last round: give the same "
            "command again.",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED) from None
