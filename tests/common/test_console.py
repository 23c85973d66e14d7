"""How commands end: one line and a status, whatever went wrong."""

from __future__ import annotations

import pytest
import typer

from common.console import INTERRUPTED, one_line_errors
from common.errors import ConfigError, RunError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted."),
        (ConfigError("seed is 'x'; expected\na number."), 2, "error: seed is 'x'; expected a number."),
        (RunError("no site came."), 1, "error: no site came."),
        (OSError(28, "No space left on device", "/runs"), 1, "error: /runs: No space left on device; expected a place"),
    ],
)
def test_each_end_has_one_line_and_its_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, one_line_errors(debug=False):
        raise error
    said = capsys.readouterr().err
    assert ended.value.exit_code == status
    assert said.startswith(line)
    assert said.count("\n") == 1
