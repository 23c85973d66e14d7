"""Whether a site runs and how it is ended: the process that holds the lock is signalled, and no other."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.places import Places
from client.supervise.running import end, only_one, what_runs
from common.errors import RunError
from common.processes import identity_of, process_of

NOBODY = 65534
HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"


@pytest.fixture
def places() -> Iterator[Places]:
    """A site's, in a folder that everybody may pass through."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        yield Places.beside(folder / "site.yaml")


@contextmanager
def sleeper(code: str, *arguments: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says something once ``code`` is done, and then sleeps."""
    command = [sys.executable, "-c", f"{code}; time.sleep(600)", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@contextmanager
def another_user() -> Iterator[None]:
    """This process as a user that is not root."""
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_site_runs_once_and_is_known_to_run_by_the_lock_alone(places: Places) -> None:
    assert what_runs(places) is None
    assert not end(places)
    with only_one(places):
        places.running.write_text(json.dumps({"pid": 4194304, "components": {}}))
        assert what_runs(places) == {"pid": 4194304, "components": {}}
        with pytest.raises(RunError, match="runs already"), only_one(places):
            pass
    # The note is still there, with an id that may be somebody else's by now: nothing is signalled.
    assert what_runs(places) is None
    assert not end(places)


def test_supervisor_says_which_process_it_is_as_soon_as_it_has_the_lock(places: Places) -> None:
    places.running.write_text(json.dumps({"pid": os.getppid(), "components": {}}))
    with only_one(places):
        noted = process_of(what_runs(places))
        assert noted is not None
        assert noted.pid == os.getpid()


def test_down_ends_the_process_that_holds_the_lock(places: Places) -> None:
    with sleeper(HOLDER, places.lock) as process:
        places.running.write_text(json.dumps(identity_of(process.pid)))
        assert end(places)
        assert process.wait() == -signal.SIGTERM
    with places.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_down_signals_no_stranger_that_has_the_id_of_an_earlier_supervisor(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sleeper(HOLDER, places.lock) as process, sleeper("import time; print(1, flush=True)") as stranger:
        earlier = {**identity_of(stranger.pid), "created": 1.0}
        for note in (earlier, {"pid": stranger.pid}):
            places.running.write_text(json.dumps(note))
            monkeypatch.setattr("client.supervise.running.NOTED_S", 0.2)
            with pytest.raises(RunError, match=r"does not name the process that runs the site; expected"):
                end(places)
        monkeypatch.undo()
        identity = json.dumps(identity_of(process.pid))
        note_later = threading.Timer(0.3, lambda: places.running.write_text(identity))
        note_later.start()
        assert end(places)
        note_later.join()
        assert process.wait() == -signal.SIGTERM
        assert stranger.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may switch users")
def test_down_of_a_user_who_may_not_look_or_signal_is_an_error(places: Places) -> None:
    with sleeper(HOLDER, places.lock) as process:
        places.running.write_text(json.dumps(identity_of(process.pid)))
        places.lock.chmod(0o600)
        for ask in (end, what_runs):
            with another_user(), pytest.raises(RunError, match=r"may not be opened by user 65534; expected"):
                ask(places)
        places.lock.chmod(0o666)
        with another_user(), pytest.raises(RunError, match=r"may not be ended by user 65534; expected"):
            end(places)
        assert process.poll() is None
