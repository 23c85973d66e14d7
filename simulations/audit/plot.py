"""The picture of an audit: ROC curves on logarithmic axes, where a few records given away with certainty show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.atomic import write_atomic
from simulations.audit.audited_run import AuditedRun
from simulations.audit.membership import roc

COLOURS = ("#0b5cad", "#c4470c")
_GREY = "#6b7280"


def draw_roc(
    path: Path, name: str, included: Sequence[bool], runs: Mapping[str, AuditedRun], report: Mapping[str, Any]
) -> None:
    """Draw the ROC curves of an audit as PNG: the white-box guesses about canaries, and the attack on the rows.

    Args:
        path: the file.
        name: of the run config.
        included: [m], whether each canary was in.
        runs: the audited runs by name.
        report: the measured figures, for the legends.
    """
    panels = 2 if all(len(run.others) for run in runs.values()) else 1
    figure = Figure(figsize=(6.4 * panels, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    truth = np.asarray(included, dtype=bool)
    curves = {run: roc(seen.white_box[truth], seen.white_box[~truth]) for run, seen in runs.items()}
    title = f"Canaries, attacked with every update of {report['site']!r}"
    _panel(axes[0], title, curves, {run: _claim_and_bound(report["runs"][run]) for run in runs}, len(truth) // 2)
    _draw_limits(axes[0], report)
    if panels == 2:
        curves = {run: roc(seen.members, seen.others) for run, seen in runs.items()}
        smallest = min(min(len(run.members), len(run.others)) for run in runs.values())
        labels = {run: _area(report["runs"][run]["membership"]) for run in runs}
        _panel(axes[1], "Training rows against test rows, attacked with the final adapter", curves, labels, smallest)
    for panel in axes:
        panel.legend(loc="lower right", fontsize=8.5, framealpha=0.95)
    figure.suptitle(f"{name}: can an attacker tell what was trained on?", fontsize=13, fontweight="bold")
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _panel(
    axes: Axes,
    title: str,
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    labels: Mapping[str, str],
    rows: int,
) -> None:
    floor = 0.5 / max(rows, 1)
    for (run, (false_rate, true_rate)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(
            np.maximum(false_rate, floor), np.maximum(true_rate, floor),
            drawstyle="steps-post", color=colour, linewidth=2, label=f"{run}: {labels[run]}",
        )  # fmt: skip
    axes.plot([floor, 1], [floor, 1], color=_GREY, linestyle="--", linewidth=1, label="chance")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.08), title=title)
    axes.set_xlabel("false positive rate: others taken for members")
    axes.set_ylabel("true positive rate: members found")
    axes.title.set_fontsize(10.5)
    axes.grid(visible=True, which="major", color="#e5e7eb")
    axes.grid(visible=True, which="minor", color="#f3f4f6")
    axes.set_axisbelow(True)


def _draw_limits(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draw what (ε, δ) allows: TPR ≤ e^ε FPR + δ and 1 - FPR ≤ e^ε (1 - TPR) + δ.

    No attack on a run with the claimed (ε, δ) lies above, on average over runs (Kairouz et al. 1311.0776, theorem 2.1).
    """
    for run, colour in zip(report["runs"].values(), COLOURS, strict=False):
        claimed = run["claimed_epsilon"]
        if claimed is None:
            continue
        rates = np.geomspace(axes.get_xlim()[0], 1.0, 200)
        factor = math.exp(min(claimed, 700.0))
        most = np.minimum(factor * rates + report["delta"], 1.0 - (1.0 - rates - report["delta"]) / factor)
        axes.plot(
            rates,
            np.minimum(most, 1.0),
            color=colour,
            linestyle=":",
            linewidth=1.4,
            label=f"most that ε = {claimed:.2f} allows",
        )


def _claim_and_bound(run: Mapping[str, Any]) -> str:
    claimed = "no claim" if run["claimed_epsilon"] is None else f"claimed ε ≤ {run['claimed_epsilon']:.2f}"
    return f"{claimed}, measured ε ≥ {run['white_box']['epsilon_at_least']:.2f}"


def _area(membership: Mapping[str, Any]) -> str:
    return f"AUC {membership['auc']:.3f} [{membership['auc_low']:.3f}, {membership['auc_high']:.3f}]"
