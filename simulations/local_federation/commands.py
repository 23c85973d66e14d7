"""fedtune's own commands as processes, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import RunError
from server.supervise.processes import end_families

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 900.0
"""Longest wait for a process to do what it should, on a machine that is busy with other things."""
END_S = 60.0
LOOPBACK = "127.0.0.1"


def environment() -> dict[str, str]:
    """Return the environment of the processes, with this source tree before any installed one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    rare = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}  # a machine for all shares it with what is asked that often
    return {**os.environ, **quiet, **rare, "PYTHONPATH": path}


def command(program: str, *arguments: str | Path) -> str:
    """Run a command of ``server`` or ``client`` and return what it prints.

    Raises:
        RunError: if it fails, with what it says.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{program}.cli", *map(str, arguments)],
        cwd=ROOT, env=environment(), timeout=WAIT_S, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RunError(
            f"fedtune-{program} {arguments[0]} ended with status {done.returncode} "
            f"({' '.join(done.stderr.split())[-300:]}); expected 0."
        )
    return done.stdout


def json_of(program: str, *arguments: str | Path) -> Any:
    """Run a command with ``--json`` and return what it prints."""
    return json.loads(command(program, *arguments, "--json"))


@contextlib.contextmanager
def running(
    arguments: Sequence[str | Path], log: Path, folder: Path = ROOT, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process for as long as the context lasts; then end it and all that it started.

    Args:
        arguments: of this interpreter, or a program.
        log: file for its output.
        folder: its working folder.
        variables: of its environment.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in arguments], cwd=folder, env={**environment(), **variables}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # a supervisor ends what it started itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        end_families([process.pid])
        process.wait()


def wait_for(
    holds: Callable[[], bool], what: str, processes: Sequence[subprocess.Popen[bytes]] = (), look_s: float = 0.2
) -> None:
    """Wait until something holds.

    Args:
        holds: whether it does.
        what: what is waited for, for the error.
        processes: that must not end meanwhile.
        look_s: seconds between two looks.

    Raises:
        RunError: if a process ends, or it takes too long.
    """
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if any(process.poll() is not None for process in processes):
            raise RunError(f"a process ended before {what}; expected it to go on. Look at its log.")
        if time.monotonic() > deadline:
            raise RunError(f"waited {WAIT_S:g} s for {what}; expected it by then. Look at the logs.")
        time.sleep(look_s)


@contextlib.contextmanager
def short_folder(keep: Path | None, part: str) -> Iterator[Path]:
    """A new folder with a short path, as unix sockets need one.

    Args:
        keep: where to copy what is worth it afterwards, without keys; None for nowhere.
        part: name of the copy.

    Raises:
        RunError: for a run that failed, with where its logs are: they are copied in any case then.
    """
    with tempfile.TemporaryDirectory(prefix="fedtune", ignore_cleanup_errors=True) as name:
        try:
            yield Path(name)
        except RunError as error:
            if keep is not None:
                raise
            keep = Path(tempfile.mkdtemp(prefix="fedtune-failed-"))
            raise RunError(f"{error} They are kept in {keep}/{part}.") from None
        finally:
            if keep is not None:
                shutil.copytree(name, keep / part, ignore=shutil.ignore_patterns("*.sock", "flower", "*.key", "secret"))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
