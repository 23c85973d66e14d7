"""The handler that a worker calls: the ClientApp of virtual sites, one or several at once, on one base model."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

import client.virtual_app
from common.flower_keys import CONFIG_YAML
from common.quiet import quiet_dependencies
from common.run_source import run_config_of
from simulations.cohort.handler import CohortHandler
from simulations.engines.app_handler import AppHandler
from simulations.engines.engine import Handler
from simulations.engines.settings import WorkerSettings


def site_handler(
    config_yaml: str, nodes: int, device: str, node: Mapping[str, str] | None = None, cohort: int = 1
) -> Handler:
    """Return the handler of a run's virtual sites.

    Every engine makes its handler here, in the process that computes.

    Args:
        config_yaml: the run config.
        nodes: number of virtual sites.
        device: to compute on.
        node: further entries of every node's config.
        cohort: most sites that are trained in one pass.
    """
    alone = AppHandler(client.virtual_app.app, nodes, {CONFIG_YAML: config_yaml}, device, node)
    if cohort == 1:
        return alone
    return CohortHandler(alone, run_config_of({CONFIG_YAML: config_yaml}), nodes, device, cohort, node)


def worker_handler(settings: WorkerSettings) -> Handler:
    """Set a worker process up and return its handler, with the base model loaded.

    Raises:
        FedtuneError: for a config or model that this process cannot load.
    """
    from common.models.resident import resident_model

    quiet_dependencies()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    torch.set_num_threads(settings.threads)
    resident_model(run_config_of({CONFIG_YAML: settings.config_yaml}), settings.device)
    return site_handler(settings.config_yaml, settings.nodes, settings.device, settings.node, settings.cohort)
