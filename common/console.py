"""How every command ends: one line for what a person got wrong, a traceback only on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from common.errors import ConfigError, DataError, FedtuneError, ModelError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

KEPT = "What was checkpointed is kept: make room, then go on with --resume."
"""What a run that can be resumed says where it cannot write."""


def error_console() -> Console:
    """Return a console on standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors(debug: bool, kept: str = "") -> Iterator[None]:
    """Turn a :class:`FedtuneError` into one line on standard error and an exit status that is not zero.

    2 for bad input (config, data, model), 1 for a run that failed. With ``debug`` the traceback is shown. Ctrl-C ends
    with a line too, and status 130.

    Args:
        debug: whether to show tracebacks.
        kept: what is said of a place that cannot be written: what is not lost, and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:  # typer would end without a word
        error_console().print("interrupted.", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    except FedtuneError as error:
        if debug:
            raise
        line = " ".join(str(error).split())
        error_console().print(f"error: {line}", markup=False)
        raise typer.Exit(2 if isinstance(error, ConfigError | DataError | ModelError) else 1) from None
    except OSError as error:
        if debug:
            raise
        place = f" {error.filename}" if error.filename else ""
        rule = f"expected a place that can be written. {kept}".rstrip()
        error_console().print(f"error:{place}: {error.strerror or type(error).__name__}; {rule}", markup=False)
        raise typer.Exit(1) from None


def new_app(program: str, purpose: str) -> typer.Typer:
    """Return the typer app of a command, with ``--version``; called without arguments it prints its help.

    Args:
        program: name of the command.
        purpose: first paragraph of its help.
    """
    app = typer.Typer(
        help=purpose,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        invoke_without_command=True,
    )

    @app.callback()
    def options(
        show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if show_version:
            sys.stdout.write(f"{program} {version('fedtune')}\n")
            raise typer.Exit

    return app
