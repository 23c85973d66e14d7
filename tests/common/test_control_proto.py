"""The generated code of the control protocol is the one of its .proto file."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.control.generate import ROOT, generate


@pytest.mark.parametrize("name", ["control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py"])
def test_generated_code_is_in_step(name: str, tmp_path: Path) -> None:
    generate(tmp_path)
    made = (tmp_path / "common" / "control" / name).read_text(encoding="utf-8")
    assert made == (ROOT / "common" / "control" / name).read_text(encoding="utf-8")
