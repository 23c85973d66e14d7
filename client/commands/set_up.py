"""``init``, ``enroll``, ``check``, ``systemd``: what is done before a site runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.options import DEFAULT_SITE, AsJson, Debug, SiteConfigPath, say, show
from common.console import one_line_errors
from common.errors import ConfigError
from common.quiet import quiet_dependencies

Site = Annotated[Path, typer.Option("--site", help="Site config in YAML.")]


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the site; made if it does not exist.")] = Path("."),
    name: Annotated[str | None, typer.Option(help="Name of the site in the federation.")] = None,
    data: Annotated[Path | None, typer.Option(help="The training rows: a JSONL or CSV file.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal_lm.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels of a classification, in the run's order: a,b,c.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or package:NAME/folder.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="ε that no record is taken beyond, over all runs.")] = None,
    delta: Annotated[float, typer.Option(help="δ, well below one over the number of records.")] = 1e-5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    max_rank: Annotated[int | None, typer.Option(help="Largest rank that fits the device.")] = None,
    person_field: Annotated[str | None, typer.Option(help="Field that names the person of a row.")] = None,
    largest_rank: Annotated[int, typer.Option(help="Largest rank that a run may have.")] = 256,
    debug: Debug = False,
) -> None:
    """Write site.yaml, make the site's key and its ledger, and say what to send to the coordinator.

    What no flag gives is asked for.
    """
    with one_line_errors(debug):
        quiet_dependencies()
        from client.init import Answers, write_site

        asked = Answers(
            name=name or typer.prompt("Name of the site in the federation"),
            data=data or Path(typer.prompt("File of the training rows (JSONL or CSV)")),
            task=(chosen := task or typer.prompt("Task (classification or causal_lm)")),
            labels=labels or (typer.prompt("Labels, in the run's order (a,b)") if chosen == "classification" else None),
            model=model or typer.prompt("Base model (a folder or package:NAME/folder)"),
            epsilon=epsilon if epsilon is not None else typer.prompt("ε that no record is taken beyond", type=float),
            delta=delta, device=device, max_rank=max_rank, person_field=person_field,
            largest_rank=largest_rank,
        )  # fmt: skip
        for line in write_site(folder, asked):
            say(line)


def enroll(
    kit: Annotated[Path, typer.Argument(help="The kit that the coordinator sent.")],
    site: Site = DEFAULT_SITE,
    fingerprint: Annotated[
        str | None, typer.Option(help="Fingerprint of the coordinator's key, as told by telephone.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Take in the coordinator's kit, once its fingerprint was compared."""
    with one_line_errors(debug):
        from client.enrolment import check_kit, keep_kit
        from client.places import Places
        from client.site_config import load_site_config

        checked = check_kit(kit, load_site_config(site), fingerprint)
        say(f"federation   {checked.federation}\nsite         {checked.site}\ngateway      {checked.address}")
        say(f"fingerprint  {checked.fingerprint()}")
        if fingerprint is None and not typer.confirm("Does the coordinator read out the same fingerprint?"):
            raise ConfigError("the fingerprint was not confirmed; expected the coordinator's. Nothing was taken in.")
        places = Places.beside(site)
        keep_kit(checked, places)
        say(f"kept as {places.kit}. Next: fedtune-client check {site}")


def check(
    site: SiteConfigPath = DEFAULT_SITE,
    run: Annotated[Path | None, typer.Option(help="Try this run config, policy included.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check data, model, device, privacy and the way to the coordinator; exit status 1 if anything fails."""
    with one_line_errors(debug):
        quiet_dependencies()
        from client.checks.site import check_site
        from client.places import Places
        from client.site_config import load_site_config
        from client.site_tables import findings_table
        from common.config.load import load_run_config

        own = load_site_config(site)
        config = None if run is None else load_run_config(run)
        found = list(check_site(Places.beside(site), own, config))
        show([finding.values() for finding in found], [findings_table(found)], as_json)
        if any(finding.outcome == "fail" for finding in found):
            raise typer.Exit(1)


def systemd(
    site: SiteConfigPath = DEFAULT_SITE,
    out: Annotated[Path, typer.Option(help="Folder for the unit files.")] = Path("units"),
    name: Annotated[str, typer.Option(help="Short name of the site in units: letters, digits, dash.")] = "site",
    debug: Debug = False,
) -> None:
    """Write systemd units that run agent, SuperNode and executor as three users, and say how to install them."""
    with one_line_errors(debug):
        from client.enrolment import enrolled
        from client.places import Places
        from client.site_config import load_site_config
        from client.supervise.systemd import make_secret, units_of

        if not name.replace("-", "").isalnum() or not name.isascii():
            raise ConfigError(f"--name is {name!r}; expected letters, digits and dashes.")
        places, own = Places.beside(site), load_site_config(site)
        units = units_of(places, own, enrolled(places), name)
        out.mkdir(parents=True, exist_ok=True)
        for file, text in units.files.items():
            (out / file).write_text(text, encoding="utf-8")
        make_secret(places, enrolled(places))
        say(f"wrote {', '.join(units.files)} to {out}. As root, in that folder:\n")
        for command in units.commands:
            say(f"  {command}")
