"""What a site remembers of its own SuperNode; that a dead one is signed off is tried with real processes elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.supervise.sign_off import remember, remembered


def test_node_is_remembered_by_the_machine_that_connected_it(tmp_path: Path) -> None:
    known = tmp_path / "flwr" / "node-id"
    assert remembered(known, "this") is None
    remember(known, "this", 2**63 + 1)
    assert remembered(known, "this") == 2**63 + 1


def test_node_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    known = tmp_path / "node-id"
    remember(known, "that", 7)
    assert remembered(known, "this") is None
    remember(known, "", 7)
    assert remembered(known, "") is None  # a machine without a name signs nothing off


@pytest.mark.parametrize("text", ["", "7", "this seven", "this 7 8"])
def test_file_that_says_something_else_is_no_node(tmp_path: Path, text: str) -> None:
    known = tmp_path / "node-id"
    known.write_text(text)
    assert remembered(known, "this") is None
