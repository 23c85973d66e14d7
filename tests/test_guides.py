"""The guides *Run a site* and *Run a federation*, walked through: every command that they print, as it stands there.

Two people on one machine, each with an empty folder; what they send each other is copied. What a reader chooses, the
walk chooses too, by options after the guide's own: ports, the processor, one site in place of three.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml

from simulations.local_federation.commands import LOOPBACK, environment, free_ports, running
from tests.conftest import config_text, label_rows, write_rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAMS = {"fedtune-client": "client.cli", "fedtune-server": "server.cli"}
PATIENCE_S = 600.0
LABELS = ["heart", "skin"]


def commands_of(guide: str) -> list[str]:
    """The commands in the blocks of a guide, each in one line and without its comment."""
    blocks = (DOCS / guide).read_text(encoding="utf-8").split("```")[1::2]
    lines = "\n".join(block for block in blocks if block.startswith("\n")).replace("\\\n", " ").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith(tuple(PROGRAMS))]


class Person:
    """Somebody with a folder who types what a guide says.

    Args:
        guide: file name of the guide.
        folder: to make.
    """

    def __init__(self, guide: str, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.left = commands_of(guide)

    def argv(self, command: str, more: tuple[str, ...] = ()) -> list[str]:
        """The command of the guide that begins so, with more options; it counts as walked."""
        found = [known for known in commands_of_all() if known == command]
        assert found, f"no guide has {command!r}"
        self.left = [known for known in self.left if known != command]
        program, *arguments = shlex.split(command)
        return [sys.executable, "-m", PROGRAMS[program], *arguments, *more]

    def types(self, command: str, *more: str, status: int = 0, answer: str = "") -> str:
        done = self.run(self.argv(command, more), answer)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def errs(self, command: str) -> str:
        """Type something wrong; it is refused in one line."""
        program, *arguments = shlex.split(command)
        done = self.run([sys.executable, "-m", PROGRAMS[program], *arguments])
        assert done.returncode in (1, 2), done.stdout
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def run(self, argv: list[str], answer: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env=environment(), input=answer, timeout=PATIENCE_S, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def until(self, command: str, *more: str) -> str:
        """Type it again and again until it succeeds."""
        argv, deadline = self.argv(command, more), time.monotonic() + PATIENCE_S
        while (done := self.run(argv)).returncode != 0:
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(1.0)
        return done.stdout

    def leaves_running(self, command: str, ends: ExitStack) -> subprocess.Popen[bytes]:
        """Type it in a terminal of its own."""
        log = self.folder / f"terminal-{len(list(self.folder.glob('terminal-*')))}.log"
        return ends.enter_context(running(self.argv(command), log, folder=self.folder))


def commands_of_all() -> list[str]:
    return commands_of("site.md") + commands_of("coordinator.md")


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def presses_ctrl_c(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, after which nothing is left."""
    family = descendants(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    _, left = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not left


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, as unix sockets need one."""
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        yield Path(name)


def verify_units(folder: Path) -> None:
    """Have systemd read units, where there is systemd."""
    if shutil.which("systemd-analyze") is None:
        return
    units = sorted(map(str, folder.glob("*.service"))) + sorted(map(str, folder.glob("*.target")))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    about_ours = [line for line in done.stderr.splitlines() if "fedtune" in line]
    assert not about_ours, about_ours


@pytest.mark.slow
def test_guides_can_be_walked_as_they_are_written(folder: Path, tiny_models: dict[str, Path]) -> None:
    site, coordinator = Person("site.md", folder / "s"), Person("coordinator.md", folder / "c")
    rows = [row for row in label_rows(60) if row["label"] in LABELS]
    write_rows(site.folder / "own.jsonl", [{"text": row["text"], "label": row["label"]} for row in rows])
    shutil.copytree(tiny_models["bert"], site.folder / "models" / "minilm")
    shutil.copytree(tiny_models["bert"], coordinator.folder / "models" / "minilm")
    _write_run_config(coordinator.folder)
    with ExitStack() as ends:
        _enrol(site, coordinator, ends)
        _run(site, coordinator, ends)
        coordinator.types("fedtune-server sites revoke north-clinic")
        assert "revoked" in coordinator.types("fedtune-server sites list")
        assert "ended" in site.types("fedtune-client down north/site.yaml")
        assert "ended" in coordinator.types("fedtune-server down")
    site.types("fedtune-client systemd north/site.yaml --name north --out units")
    verify_units(site.folder / "units")
    (coordinator.folder / "units").mkdir()
    units = ("--out", "units", "--user", "root")
    coordinator.types("fedtune-server systemd --out /etc/systemd/system --user fedtune", *units)
    verify_units(coordinator.folder / "units")
    assert site.left == []
    assert coordinator.left == []


def _enrol(site: Person, coordinator: Person, ends: ExitStack) -> None:
    public, superlink, control = free_ports(3)
    chosen = ("--address", f"{LOOPBACK}:{public}", "--listen", LOOPBACK, "--superlink-port", str(superlink))
    coordinator.types(
        "fedtune-server init --federation clinics --address fed.example.org:8443", *chosen, "--control-port",
        str(control), "--device", "cpu",
    )  # fmt: skip
    init = next(command for command in site.left if "fedtune-client init" in command)
    site.types(init, "--device", "cpu")
    site.errs(init)  # it is there already
    assert "enroll" in site.errs("fedtune-client up north/site.yaml")  # not enrolled yet
    coordinator.errs("fedtune-server sites add north-clinic nothing.pub")
    shutil.copy(site.folder / "north" / "keys" / "site.pub", coordinator.folder / "site.pub")
    coordinator.types("fedtune-server sites add north-clinic site.pub")
    coordinator.errs("fedtune-server sites add other site.pub")  # one key, one site
    coordinator.types("fedtune-server sites kit north-clinic")
    kit = coordinator.folder / "north-clinic.kit.yaml"
    (site.folder / "wrong.kit.yaml").write_text(kit.read_text().replace("north-clinic", "south-clinic"))
    site.errs("fedtune-client enroll wrong.kit.yaml --site north/site.yaml")
    site.errs("fedtune-client enroll nothing.kit.yaml --site north/site.yaml")
    shutil.copy(kit, site.folder)
    enroll = "fedtune-client enroll north-clinic.kit.yaml --site north/site.yaml"
    site.types(enroll, answer="n\n", status=2)  # another fingerprint was read out
    site.types(enroll, answer="y\n")
    presses_ctrl_c(_up(coordinator, ends))
    _up(coordinator, ends)
    assert "pass" in site.types("fedtune-client check north/site.yaml")
    presses_ctrl_c(_site_up(site, ends))
    _site_up(site, ends)
    assert "listening" in site.types("fedtune-client logs agent --site north/site.yaml")


def _up(coordinator: Person, ends: ExitStack) -> subprocess.Popen[bytes]:
    process = coordinator.leaves_running("fedtune-server up", ends)
    deadline = time.monotonic() + PATIENCE_S
    while "does not answer" in (said := coordinator.types("fedtune-server status")) or "is not up" in said:
        assert time.monotonic() < deadline, said
    return process


def _site_up(site: Person, ends: ExitStack) -> subprocess.Popen[bytes]:
    process = site.leaves_running("fedtune-client up north/site.yaml", ends)
    site.until("fedtune-client status north/site.yaml")
    return process


def _run(site: Person, coordinator: Person, ends: ExitStack) -> None:
    run = "fedtune-server run configs/mine.yaml --set federation.min_sites=3"
    coordinator.errs("fedtune-server run configs/nothing.yaml")
    coordinator.errs("fedtune-server watch nothing")
    coordinator.types(run, "--set", "federation.min_sites=1")
    coordinator.errs(run)  # it is there already
    watching = coordinator.leaves_running("fedtune-server watch mine", ends)
    _round_after(coordinator, 0)
    coordinator.until("fedtune-server pause mine", "--tcp")
    coordinator.types("fedtune-server set mine round_timeout_s=600")
    coordinator.errs("fedtune-server set mine rounds=5")
    coordinator.errs("fedtune-server export mine --to early")  # it goes on
    coordinator.types("fedtune-server resume mine")
    coordinator.types("fedtune-server stop mine")
    assert watching.wait(PATIENCE_S) == 0
    done = len(json.loads(coordinator.types("fedtune-server rounds mine", "--json")))
    coordinator.errs(f"{run} --resume")  # it was started with another config
    coordinator.types(f"{run} --resume", "--set", "federation.min_sites=1")
    _round_after(coordinator, done)
    stop = "fedtune-server stop mine --after-round"
    watching = coordinator.leaves_running("fedtune-server watch mine", ends)
    coordinator.types(stop)
    assert watching.wait(PATIENCE_S) == 0
    coordinator.types("fedtune-server export mine --to out --merge")
    assert (coordinator.folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (coordinator.folder / "out" / "merged").is_dir()
    coordinator.errs("fedtune-server export mine --to out")  # it is not empty
    assert "mine" in coordinator.types("fedtune-server logs mine")
    report = json.loads(site.run([sys.executable, "-m", "client.cli", "ledger", "north/site.yaml", "--json"]).stdout)
    assert len(report["runs"]) == 1  # under the id that it has, also resumed


def _round_after(coordinator: Person, done: int) -> None:
    """Wait for a round after so many."""
    deadline = time.monotonic() + PATIENCE_S
    while len(json.loads(coordinator.types("fedtune-server rounds mine", "--json"))) <= done:
        assert time.monotonic() < deadline
        time.sleep(1.0)


def _write_run_config(folder: Path) -> None:
    """Write configs/mine.yaml: the coordinator's paths, its own test rows, many short rounds."""
    (folder / "configs").mkdir()
    values = yaml.safe_load(config_text(folder, folder / "models" / "minilm"))
    test = str(write_rows(folder / "own-test.jsonl", [row for row in label_rows(12) if row["label"] in LABELS]))
    values |= {
        "name": "mine",
        "data": {**values["data"], "train": test, "test": test, "labels": LABELS},  # it reads no training rows
        "training": {"lr": 0.01, "batch_size": 4, "local_steps": 1},
        "privacy": {"unit": "example", "epsilon": 4.0, "delta": 1e-5, "clip_norm": 0.5, "sample_rate": 0.1},
        "federation": {"rounds": 60},
        "aggregation": {"method": "ffa_lora"},
    }
    (folder / "configs" / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def test_guides_have_commands_to_walk() -> None:
    assert len(commands_of("site.md")) >= 8
    assert len(commands_of("coordinator.md")) >= 18
