"""``python -m simulations.local_federation [CONFIG]`` (``make federation``): a coordinator and sites on this machine.

Everything is a process of its own, as at several organisations: SuperLink, executor, gateway, caretaker; and for each
site an agent, a SuperNode and an executor, with TLS, node keys and private folders. Two runs:

1. With differential privacy, at real sites: policy, ledger, agent. It ends with a ledger for each site.
2. Without, by AdamW, at nodes whose sites are virtual, since real ones refuse it: its adapter is compared with the one
   that ``fedtune-sim`` trains from the same config and seed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from common.console import one_line_errors
from common.errors import RunError
from common.quiet import quiet_dependencies
from simulations.local_federation.commands import ROOT, json_of, short_folder
from simulations.local_federation.federation import (
    LocalFederation,
    Say,
    local_coordinator,
    real_sites,
    virtual_nodes,
)
from simulations.local_federation.rows import write_joint_rows, write_site_rows

TOLERANCE = 1e-5
"""Largest difference of a number of both adapters: sums of floats in another order."""
WITHOUT_DP = ("privacy={unit: none}", "name=plain", "training.optimizer=adamw", "training.lr=2.0e-3")
"""Overrides of the run without privacy: steps that were chosen for clipped gradients would be far too long."""
SLACK = 1.01
"""A site's budget over the ε that the run plans, which is rounded."""


def federate(config: RunConfig, sites: int, folder: Path, say: Say) -> dict[str, Any]:
    """Run a federation with differential privacy at real sites.

    Returns:
        The run's line, the folder of its export, and the ε that each site's ledger has.
    """
    files = write_site_rows(config, sites, folder)
    wanted = folder / "run.yaml"
    wanted.write_text(dump_run_config(config), encoding="utf-8")
    target = config.privacy.target_epsilon or 8.0
    with (
        local_coordinator(folder, "local", say) as federation,
        real_sites(federation, config, files, target * SLACK),
    ):
        line, exported = _run(federation, wanted, sites)
    ledgers = {site: json_of("client", "ledger", rows.parent / "site.yaml") for site, rows in files.items()}
    return {"run": line, "exported": exported, "ledgers": ledgers}


def compare(config: RunConfig, sites: int, folder: Path, say: Say) -> float:
    """Run a federation without privacy, and a simulation of it, and return the adapters' largest difference."""
    from safetensors.torch import load_file

    from simulations.run import simulate

    files = write_site_rows(config, sites, folder)
    joint = folder / "rows.jsonl"
    write_joint_rows(config, files, joint)
    plain = config.model_copy(update={"data": config.data.model_copy(update={"train": str(joint)})})
    wanted = folder / "run.yaml"
    wanted.write_text(dump_run_config(plain), encoding="utf-8")
    with local_coordinator(folder, "local", say) as federation, virtual_nodes(federation, files):
        _, exported = _run(federation, wanted, sites)
    simulate(load_run_config(wanted, [f"federation.min_sites={sites}"]), folder / "simulated", device="cpu")
    one, other = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (exported, folder / "simulated")
    )
    if one.keys() != other.keys():
        raise RunError("both adapters have other tensors; expected the same.")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _run(federation: LocalFederation, wanted: Path, sites: int) -> tuple[dict[str, Any], Path]:
    run = federation.submit(wanted, f"federation.min_sites={sites}")
    line = federation.wait_until_over(run)
    return line, federation.export(run)


def main(
    config: Annotated[Path, typer.Argument(help="Run config of a classification.")] = ROOT / "configs/quickstart.yaml",
    sites: Annotated[int, typer.Option(min=1, help="How many of its sites.")] = 3,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
    plain: Annotated[
        bool, typer.Option("--plain/--no-plain", help="Also compare with fedtune-sim, without DP.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="New folder to keep logs, ledgers and adapters in.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a coordinator and its sites on this machine as real processes, with and without differential privacy."""
    with one_line_errors(debug):
        quiet_dependencies()
        if out is not None and out.exists():
            raise RunError(f"{out} exists; expected a new folder. Choose another.")
        chosen = overrides or []
        with short_folder(out, "private") as folder:
            done = federate(load_run_config(config, chosen), sites, folder, _say)
            for site, ledger in done["ledgers"].items():
                _say(f"{site}: its ledger has ε {spent(ledger):.2f}")
            _say(f"with privacy: {done['run']['completed_rounds']} rounds are done, and {sites} ledgers tell of them")
        if plain:
            wanted = load_run_config(config, [*chosen, *WITHOUT_DP])
            with short_folder(out, "plain") as folder:
                difference = compare(wanted, sites, folder, _say)
            _say(f"without privacy: largest difference from fedtune-sim's adapter {difference:.1e}")
            if difference > TOLERANCE:
                raise RunError(f"the adapters differ by {difference:.1e}; expected at most {TOLERANCE:g}.")


def spent(report: dict[str, Any]) -> float:
    """Return ε that a ledger's report has for its dataset."""
    figures: Sequence[dict[str, Any]] = report["datasets"]
    return max((float(each["epsilon_spent"]) for each in figures), default=0.0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
