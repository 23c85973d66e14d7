"""``plan``, ``ledger``, ``new-ledger``: what a run would spend, and what was spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.options import DEFAULT_SITE, AsJson, Debug, SiteConfigPath, say, show
from common.console import one_line_errors
from common.errors import ConfigError
from common.quiet import quiet_dependencies

if TYPE_CHECKING:
    from common.config.run import RunConfig


def plan(
    config: Annotated[Path, typer.Argument(help="Run config in YAML, as the coordinator sent it.")],
    site: Annotated[Path | None, typer.Option(help="Site config in YAML: counts its rows, reads its ledger.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="In place of --site: how many records or persons.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a run would spend at this site, and how many of its rounds the budget holds."""
    with one_line_errors(debug):
        quiet_dependencies()
        from client.tables import plan_tables
        from common.config.load import load_run_config

        if (site is None) == (rows is None):
            raise ConfigError("plan needs a site; expected either --site site.yaml or --rows N.")
        planned = _plan(load_run_config(config), site, rows or 0)
        show(planned, plan_tables(planned), as_json)


def _plan(config: RunConfig, site: Path | None, rows: int) -> dict[str, Any]:
    from client.plan import plan_run

    if site is None:
        return plan_run(config, rows)
    from client.site import read_site_rows
    from client.site_config import load_site_config
    from common.methods import expect_rank

    own = load_site_config(site)
    expect_rank(config, own.max_rank, own.name)
    read = read_site_rows(config, own)
    read.ledger.expect_delta()
    spent = read.ledger.ledger.charges(read.ledger.dataset)
    return plan_run(config, read.num_units(config.privacy.unit), spent, read.ledger.budget)


def ledger(
    source: Annotated[
        Path, typer.Argument(metavar="LEDGER_OR_SITE_CONFIG", help="A ledger, or a site config (.yaml).")
    ] = DEFAULT_SITE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Verify a ledger and say what was spent, by dataset and run. Writes nothing."""
    with one_line_errors(debug):
        quiet_dependencies()
        from client.ledger.ledger import Ledger
        from client.ledger.report import report_ledger
        from client.site_config import Budget, load_site_config
        from client.tables import ledger_tables

        own = load_site_config(source) if source.suffix.lower() in {".yaml", ".yml"} else None
        path = source if own is None else Path(own.ledger)
        budget = Budget(epsilon=1.0) if own is None else own.budget
        report = report_ledger(Ledger(path), budget, capped=own is not None)
        show(report, ledger_tables(report), as_json)


def new_ledger(site: SiteConfigPath = DEFAULT_SITE, debug: Debug = False) -> None:
    """Make a site's ledger, once, before its first run. Refuses where a file stands."""
    with one_line_errors(debug):
        from client.ledger.ledger import Ledger
        from client.site_config import load_site_config

        path = Path(load_site_config(site).ledger)
        Ledger(path).create()
        say(
            f"made {path}: from now on it says that nothing was spent of these data. If they ever had a ledger, delete "
            "this one and restore that."
        )
