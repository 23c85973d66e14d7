"""The Flower ServerApp: reads the run config, runs the federation on the Grid it is given."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConfigError
from common.flower_keys import RUN_FENCE, RUN_NAME
from common.quiet import quiet_dependencies
from common.run_folder import RunFolder
from common.run_source import run_config_of
from server.downloads import downloading
from server.federation import RunSettings, run_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that Flower's run config describes.

    A coordinator's run is named by ``run-name`` and kept in the coordinator's state folder; for any other, ``out``
    names the run folder.

    Raises:
        FedtuneError: for whatever keeps it from running. Flower logs it and ends the run as failed, which it does for
            an Exception only: after SystemExit the run would count as completed.
    """
    quiet_dependencies()
    config = run_config_of(context.run_config)
    if config.simulation is not None:
        raise ConfigError("simulation is set; expected no such section outside fedtune-sim. Remove it from the config.")
    name = context.run_config.get(RUN_NAME)
    with downloading(grid) as apart:
        if name:
            from server.coordinated import run_coordinated

            run_coordinated(apart, config, str(name), int(str(context.run_config.get(RUN_FENCE, 0))))
            return
        out = context.run_config.get("out")
        folder = Path(str(out)) if out else Path("runs") / f"{config.name}-{context.run_id}"
        run_federation(apart, config, RunSettings(RunFolder(folder)))
