"""``fedtune-server``: the command of the coordinator."""

from __future__ import annotations

from common.console import new_app
from server.commands import runs, service, setup, steer

app = new_app(
    "fedtune-server",
    "Coordinate a federation: enrol sites, start runs, watch and steer rounds, export the adapter.",
)

for command in (
    setup.init, setup.renew,
    service.up, service.down, service.status, service.systemd,
    runs.run, runs.runs, runs.rounds, runs.export, runs.logs,
    steer.watch, steer.pause, steer.resume, steer.stop,
):  # fmt: skip
    app.command()(command)
app.command("set")(steer.set_)
app.add_typer(setup.sites, name="sites")


def main() -> None:
    """Entry point of ``fedtune-server``."""
    app()


if __name__ == "__main__":
    main()
