"""The command line as a person meets it: one line for what is wrong, nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import client.cli
import server.cli
import simulations.cli
from common.config.load import load_run_config
from tests.conftest import config_text

runner = CliRunner()


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    """A config file on tiny data."""
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(tmp_path, tiny_models["bert"]))
    return path


def edited(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    return config


def refused(*arguments: str, status: int = 2) -> str:
    """Run a command that must fail with one line, and return the line."""
    result = runner.invoke(simulations.cli.app, list(arguments))
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD_DATA = {
    "empty file": ("", "no rows"),
    "broken line": ('{"text": "the knee", "label": "bones", "site": "x"}\n{"text"\n', "line 2"),
    "missing field": ('{"label": "bones", "site": "x"}\n', "'text' is missing"),
    "number as text": ('{"text": 5, "label": "bones", "site": "x"}\n', "expected text"),
    "foreign label": ('{"text": "a", "label": "liver", "site": "x"}\n', "'liver' is not in data.labels"),
    "lone surrogate": ('{"text": "\\udc00", "label": "bones", "site": "x"}\n', "surrogate"),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_no_folder(config: Path, tmp_path: Path, case: str, command: str) -> None:
    content, rule = BAD_DATA[case]
    (tmp_path / "train.jsonl").write_text(content)
    out = ["--out", str(tmp_path / "run")] if command == "run" else []
    message = refused(command, str(config), *out)
    assert rule in message
    assert "train.jsonl" in message
    assert not (tmp_path / "run").exists()


BAD_CONFIG = {
    "misspelt key": ("lr: 0.01", "learing_rate: 0.01", "did you mean 'lr'"),
    "wrong type": ("lr: 0.01", "lr: fast", "training.lr is 'fast'"),
    "duplicate key": ("lr: 0.01", "lr: 0.01\n  lr: 0.02", "twice"),
    "not a number": ("lr: 0.01", "lr: .nan", "finite"),
    "infinite": ("lr: 0.01", "lr: .inf", "finite"),
    "negative rounds": ("rounds: 2", "rounds: -2", "greater than or equal to 1"),
    "tab": ("  lr: 0.01", "\tlr: 0.01", "Indent with spaces"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config_is_one_line_with_file_and_line(config: Path, tmp_path: Path, case: str) -> None:
    old, new, rule = BAD_CONFIG[case]
    message = refused("run", str(edited(config, old, new)), "--out", str(tmp_path / "run"))
    assert rule in message
    assert f"{config} line" in message
    assert not (tmp_path / "run").exists()


def test_missing_config_folder_as_config_and_bad_override_are_one_line(config: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("run", str(tmp_path / "none.yaml"))
    assert "is a folder" in refused("check", str(tmp_path))
    assert "--set" in refused("check", str(config), "--set", "training.lr=-1")


def test_bad_model_folders_are_one_line(config: Path, tmp_path: Path) -> None:
    bare, pickled = tmp_path / "bare", tmp_path / "pickled"
    for folder in (bare, pickled):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
    torch.save({}, pickled / "pytorch_model.bin")
    for folder, rule in ((bare, "has no weights"), (pickled, "only pickled weights"), (tmp_path / "no", "not exist")):
        message = refused("run", str(config), "--set", f"model.source={folder}", "--out", str(tmp_path / "run"))
        assert rule in message
        assert str(folder) in message
        assert not (tmp_path / "run").exists()


def test_scientific_notation_crlf_and_byte_order_mark_run(config: Path, tmp_path: Path) -> None:
    edited(config, "lr: 0.01", "lr: 1e-5")
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    data = tmp_path / "train.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))
    result = runner.invoke(simulations.cli.app, ["run", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "1.0e-05" in (tmp_path / "run" / "config.yaml").read_text()


def test_used_run_folder_is_kept(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "not empty" in refused("run", str(config), "--out", str(out), status=1)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert "no checkpoint" in refused("run", str(config), "--out", str(tmp_path / "none"), "--resume", status=1)


def test_closing_table_names_sites_and_next_command(config: Path, tmp_path: Path) -> None:
    result = runner.invoke(simulations.cli.app, ["run", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for word in ("site 0", "site 2", "worst: ", "before", "Run folder", "Next,"):
        assert word in result.output
    quiet = runner.invoke(simulations.cli.app, ["run", str(config), "--out", str(tmp_path / "two"), "--quiet"])
    assert quiet.stdout == f"{tmp_path / 'two'}\n"


@pytest.mark.parametrize(
    ("overrides", "proposed"),
    [
        (["aggregation.method=flora"], True),
        (["aggregation={weights: examples, max_weight: 0.5}"], False),  # which goes with no privacy
        (["privacy={unit: example, epsilon: 6}", "training.lr=0.02"], True),
        (["privacy={unit: example, noise_multiplier: 1.0}"], True),
    ],
)
def test_next_command_is_of_the_same_run_and_can_be_run(config: Path, overrides: list[str], proposed: bool) -> None:
    line = simulations.cli._next_command(load_run_config(config, overrides), config, overrides)
    assert bool(line) == proposed
    if proposed:
        program, _, path, *settings = shlex.split(line.partition(":  ")[2])
        assert (program, path) == ("fedtune-sim", str(config))
        assert settings[1::2][: len(overrides)] == overrides
        load_run_config(config, settings[1::2])


def test_plan_of_a_method_with_corrections_says_that_more_travels(config: Path) -> None:
    shown = {
        method: runner.invoke(simulations.cli.app, ["check", str(config), "--set", f"aggregation.method={method}"])
        for method in ("fedit", "flora")
    }
    assert {method: "a correction to the base too" in " ".join(r.stdout.split()) for method, r in shown.items()} == {
        "fedit": False, "flora": True,
    }  # fmt: skip


def test_training_that_diverges_names_its_rate(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wild = ["--set", "training.lr=1e6", "--set", "training.head_lr=1e6"]
    result = runner.invoke(simulations.cli.app, ["run", str(config), "--out", str(tmp_path / "run"), *wild])
    assert result.exit_code == 1
    assert "internal" not in result.output + result.stderr
    assert "Lower training.lr" in caplog.text


def test_check_prints_a_plan_and_trains_nothing(config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = ["check", str(config), "--json", "--set", "privacy={unit: example, accountant: rdp}"]
    result = runner.invoke(simulations.cli.app, arguments)
    plan = json.loads(result.stdout)
    assert plan["sites"]["site 0"]["train_rows"] == 12
    assert 7.9 < plan["sites"]["site 0"]["epsilon_after_run"] <= 8.0
    assert sorted(tmp_path.rglob("*")) == before
    assert "steps per round" in runner.invoke(simulations.cli.app, ["check", str(config)]).stdout


def test_check_refuses_dp_where_gradients_would_be_wrong(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = tmp_path / "xlnet.yaml"
    path.write_text(config_text(tmp_path, tiny_models["xlnet"], privacy={"unit": "example"}))
    assert "time before batch" in refused("check", str(path), status=1)


@pytest.mark.parametrize("app", [simulations.cli.app, client.cli.app, server.cli.app])
def test_every_argument_and_option_says_what_it_is(app: typer.Typer) -> None:
    commands = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if not parameter.hidden:
                assert parameter.help, (command.name, parameter.name)


def test_schema_is_json_and_versions_are_printed() -> None:
    assert json.loads(runner.invoke(simulations.cli.app, ["schema"]).stdout)["title"] == "RunConfig"
    for module in (simulations.cli, client.cli, server.cli):
        assert "0.1.0" in runner.invoke(module.app, ["--version"]).stdout
        assert "Usage" in runner.invoke(module.app, ["--help"]).stdout


def _heed_ctrl_c() -> None:
    """Undo what a shell does to jobs in the background, whose children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("processes", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_checkpoint_that_resume_completes(config: Path, tmp_path: Path, engine: str) -> None:
    edited(config, "rounds: 2", "rounds: 40")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simulations.cli", "run", str(config), "--engine", engine, "--out"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=_heed_ctrl_c,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        state = tmp_path / "cut" / "checkpoint" / "state.json"
        while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["round"] >= 2):
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert bool(workers) == (engine == "processes")
    assert not [worker for worker in workers if worker.is_running()]
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert json.loads(state.read_text())["round"] < 40
    for arguments in (["--resume", "--out", str(tmp_path / "cut")], ["--out", str(tmp_path / "whole")]):
        result = runner.invoke(simulations.cli.app, ["run", str(config), *arguments])
        assert result.exit_code == 0, result.output
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
