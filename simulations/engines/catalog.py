"""The engines by name, and how one is made for a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from simulations.cohort.size import cohort_size
from simulations.engines.engine import Engine
from simulations.engines.inprocess import InProcessEngine
from simulations.engines.processes import ProcessEngine
from simulations.engines.settings import EngineSettings, WorkerSettings, device_of
from simulations.engines.site_handler import site_handler


def open_engine(
    settings: EngineSettings, config: RunConfig, nodes: int, device: str = "auto", node: Mapping[str, str] | None = None
) -> Engine:
    """Return an engine for the virtual sites of a run; whoever takes it closes it.

    Workers load their model while the caller goes on.

    Args:
        settings: which, and how large.
        config: the run config.
        nodes: number of virtual sites.
        device: to compute on.
        node: further entries of every node's config, such as a folder.

    Raises:
        ConfigError: for an unknown engine, or one that cannot be had.
    """
    try:
        make = ENGINES[settings.name]
    except KeyError:
        raise ConfigError(f"--engine is {settings.name!r}; expected one of {', '.join(ENGINES)}.") from None
    sized = replace(settings, cohort=cohort_size(settings.cohort, config, device))
    return make(sized, WorkerSettings(dump_run_config(config), nodes, device, node=dict(node or {})))


def _in_process(settings: EngineSettings, site: WorkerSettings) -> Engine:
    return InProcessEngine(site_handler(site.config_yaml, site.nodes, site.device, site.node, settings.cohort or 1))


def _processes(settings: EngineSettings, site: WorkerSettings) -> Engine:
    return ProcessEngine(settings.size, _worker_settings(settings, site), settings.cohort or 1)


def _ray(settings: EngineSettings, site: WorkerSettings) -> Engine:
    from simulations.engines.ray_engine import RayEngine

    each = _worker_settings(settings, site)
    # Ray shows every actor its own GPU alone, so that each finds it as the first.
    own = (lambda _: each(0)) if site.device == "auto" else each
    return RayEngine(settings.size, own, settings.threads_each, settings.address, settings.cohort or 1)


def _worker_settings(settings: EngineSettings, site: WorkerSettings) -> Callable[[int], WorkerSettings]:
    level = logging.getLogger().getEffectiveLevel()

    def of(number: int) -> WorkerSettings:
        device = device_of(site.device, number)
        return replace(
            site, device=device, threads=settings.threads_each, log_level=level, cohort=settings.cohort or 1
        )  # fmt: skip

    return of


ENGINES: dict[str, Callable[[EngineSettings, WorkerSettings], Engine]] = {
    "inprocess": _in_process,
    "processes": _processes,
    "ray": _ray,
}
