"""The handler that a worker calls: fedtune's ClientApp on the base model that the worker loads once."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

import client.app
from common.quiet import quiet_dependencies
from common.run_source import CONFIG_YAML, run_config_of
from simulations.engines.app_handler import AppHandler
from simulations.engines.engine import Handler
from simulations.engines.settings import WorkerSettings


def site_handler(config_yaml: str, nodes: int, device: str, node: Mapping[str, str] | None = None) -> Handler:
    """Return the handler of a run's virtual sites.

    Every engine makes its handler here, in the process that computes: a handler that trains several sites at once
    takes this one's place and works behind all engines.
    """
    return AppHandler(client.app.app, nodes, {CONFIG_YAML: config_yaml}, device, node)


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
    return site_handler(settings.config_yaml, settings.nodes, settings.device, settings.node)
