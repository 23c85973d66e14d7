"""The Flower ServerApp: reads the run config, runs the federation on the Grid it is given."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import FedtuneError
from common.run_folder import RunFolder
from common.run_source import run_config_of
from server.federation import RunSettings, run_federation

logger = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that Flower's run config describes; ``out`` names the run folder."""
    try:
        config = run_config_of(context.run_config)
        out = context.run_config.get("out")
        folder = Path(str(out)) if out else Path("runs") / f"{config.name}-{context.run_id}"
        run_federation(grid, config, RunSettings(RunFolder(folder)))
    except FedtuneError as error:
        logger.error("%s", error)
        raise SystemExit(1) from None
