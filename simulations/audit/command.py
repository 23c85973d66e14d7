"""What ``fedtune-sim audit`` prints: the table, or JSON, and a refusal where a bound exceeds the claim."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config.run import RunConfig
from common.errors import PrivacyError
from server.events import Observer
from simulations.audit.audit import AuditOptions, exceeding, run_audit
from simulations.progress import LiveProgress

LARGEST_EPSILON = 1e6
"""Beyond it an ε is no guarantee and is not printed."""


class _Progress(LiveProgress):
    """The display of a run, without the ε of a run whose noise is off."""

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """Print the line of the round."""
        super().round_ended(record, None if epsilon is None or epsilon > LARGEST_EPSILON else epsilon)


def audit_and_print(config: RunConfig, folder: Path, options: AuditOptions, *, device: str, as_json: bool) -> None:
    """Audit ``config`` and print the outcome.

    Raises:
        PrivacyError: if a measured bound exceeds the claim; the files are written all the same.
        FedtuneError: for whatever keeps it from running.
    """
    console = Console(quiet=as_json)

    def watching() -> AbstractContextManager[Observer]:
        return _Progress(console)

    report = run_audit(config, folder, options, device=device, watching=watching)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console.print(audit_table(report))
    guesses = report["guesses_in"] + report["guesses_out"]
    untested = all(run["membership"] is None for run in report["runs"].values())
    for line in (
        f"{report['canaries']} canaries at {report['site']!r}, {report['canaries_in']} of them in; {guesses} guesses. "
        f"Even if all were right, the bound would be {report['ceiling']:.2f}. A low bound proves nothing.",
        *(["No test rows that are not also training rows: no membership attack on the rows."] if untested else []),
        f"Audit folder: {folder}/ (audit.json, roc.png)",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    found = exceeding(report)
    if found:
        raise PrivacyError(
            f"{'; '.join(found)}; expected at most the claim. One bound in {1 / (1 - report['confidence']):.0f} may "
            "do so by chance: audit again with another --seed, and if it recurs do not trust this set-up."
        )


def audit_table(report: dict[str, Any]) -> Table:
    """Return the table of an audit: a line a run, what it claims beside what was measured."""
    table = Table(
        title=f"{report['name']}: claimed ε at δ = {report['delta']:g}, and what attacks measure", title_justify="left"
    )
    table.add_column("run", no_wrap=True)
    for column in ("claimed ε", "white-box\nε ≥", "black-box\nε ≥", "AUC\n[95 %]", "TPR at\n1 % FPR"):
        table.add_column(column, justify="right", no_wrap=True)
    guesses = report["guesses_in"] + report["guesses_out"]
    for name, run in report["runs"].items():
        claimed = run["claimed_epsilon"]
        bounds = (
            f"{run[attack]['epsilon_at_least']:.2f}\n({run[attack]['correct']}/{guesses})"
            for attack in ("white_box", "black_box")
        )
        rows = run["membership"]
        table.add_row(
            name,
            "none (∞)" if claimed is None else f"{claimed:.2f}",
            *bounds,
            "-" if rows is None else f"{rows['auc']:.3f}\n[{rows['auc_low']:.3f}, {rows['auc_high']:.3f}]",
            "-" if rows is None else f"{100 * rows['tpr_at_1_percent_fpr']:.1f} %",
        )
    return table
