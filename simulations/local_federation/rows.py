"""A simulated federation's rows as the private files of its sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.data.examples import Example
from common.data.federated import load_federated_data
from common.errors import ConfigError


def write_site_rows(config: RunConfig, sites: int, folder: Path) -> dict[str, Path]:
    """Write the training rows of the first sites of a run config, each to a folder of its own.

    Returns:
        The files by site.

    Raises:
        ConfigError: if the config has fewer sites, or rows that are no classification.
    """
    if config.data.task != "classification":
        raise ConfigError(f"data.task is {config.data.task!r}; expected 'classification' for a local federation.")
    train = load_federated_data(config.data, config.seed).train
    if len(train) < sites:
        raise ConfigError(f"the run config has {len(train)} sites; expected at least {sites}. Ask for fewer.")
    files = {}
    for number, site in enumerate(sorted(train)[:sites], start=1):
        path = folder / f"site-{number}" / "rows.jsonl"
        path.parent.mkdir(parents=True)
        lines = [json.dumps(_row(example, config), ensure_ascii=False) + "\n" for example in train[site]]
        path.write_text("".join(lines), encoding="utf-8")
        files[site] = path
    return files


def write_joint_rows(config: RunConfig, files: dict[str, Path], path: Path) -> None:
    """Write the rows of all sites into one file with a column that names the site, as a simulation reads them."""
    column = config.data.partition.column
    with path.open("w", encoding="utf-8") as file:
        for site, own in files.items():
            for line in own.read_text(encoding="utf-8").splitlines():
                file.write(json.dumps({**json.loads(line), column: site}, ensure_ascii=False) + "\n")


def _row(example: Example, config: RunConfig) -> dict[str, Any]:
    labels = config.data.labels or ()
    return {config.data.text_field: example.prompt, config.data.label_field: labels[example.label]}
