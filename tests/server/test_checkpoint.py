from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.atomic import write_atomic
from common.errors import RunError
from common.run_folder import RunFolder
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(number, {"a": torch.full((2, 2), float(number))}, "c" * 64, "b" * 64, "d" * 32)


def test_newest_checkpoint_comes_back_whole_and_older_ones_go(tmp_path: Path) -> None:
    for number in range(3):
        save_checkpoint(tmp_path, checkpoint(number))
    again = load_checkpoint(tmp_path)
    assert again.round == 2
    assert torch.equal(again.adapter["a"], checkpoint(2).adapter["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00002.safetensors", "state.json"]


def test_crash_before_the_rename_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    calls = []

    def crash(path: Path, content: bytes) -> None:
        calls.append(path.name)
        if path.name == "state.json":
            raise KeyboardInterrupt
        write_atomic(path, content)

    monkeypatch.setattr("server.checkpoint.write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, checkpoint(2))
    assert calls == ["round-00002.safetensors", "state.json"]
    assert load_checkpoint(tmp_path).round == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state", "escape"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    weights, state = tmp_path / "round-00001.safetensors", tmp_path / "state.json"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[:20])
    elif damage == "remove":
        weights.unlink()
    elif damage == "state":
        state.write_text("{")
    else:
        state.write_text(json.dumps(json.loads(state.read_text()) | {"file": "../../etc/passwd"}))
    with pytest.raises(RunError, match="checkpoint"):
        load_checkpoint(tmp_path)


def test_atomic_write_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_log_rewinds_to_a_round_and_drops_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for number in range(4):
        folder.log({"kind": "round", "round": number})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "rou')
    folder.rewind(2)
    assert [record["round"] for record in folder.records()] == [0, 1, 2]


def test_used_folder_and_file_are_refused_as_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="--out"):
            RunFolder(path).create()
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run").create()
