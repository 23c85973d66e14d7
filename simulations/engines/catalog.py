"""The engines by name, and how one is made for a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from client.personal import what_sites_keep
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from simulations.cohort.size import cohort_cut, cohort_size
from simulations.engines.engine import Engine
from simulations.engines.inprocess import InProcessEngine
from simulations.engines.processes import ProcessEngine
from simulations.engines.settings import EngineSettings, WorkerSettings, device_of
from simulations.engines.sharing import Cut
from simulations.engines.site_handler import site_handler


def open_engine(
    settings: EngineSettings, config: RunConfig, nodes: int, device: str = "auto",
    node: Mapping[str, str] | None = None, rows: Sequence[int] = (),
) -> Engine:  # fmt: skip
    """Return an engine for the virtual sites of a run; whoever takes it closes it.

    Workers load their model while the caller goes on.

    Args:
        settings: which, and how large.
        config: the run config.
        nodes: number of virtual sites.
        device: to compute on.
        node: further entries of every node's config, such as a folder.
        rows: of each virtual site, so that work is shared out evenly; empty where they are not known.

    Raises:
        ConfigError: for an unknown engine, one that cannot be had, or one whose workers may be on other machines where
            sites keep something in a file of this one.
    """
    try:
        make = ENGINES[settings.name]
    except KeyError:
        raise ConfigError(f"--engine is {settings.name!r}; expected one of {', '.join(ENGINES)}.") from None
    kept = what_sites_keep(config)
    if settings.address is not None and kept is not None:
        raise ConfigError(
            f"--address is given and {kept} has sites keep state between rounds, in a file of this machine, which "
            "workers on others do not have; expected workers of this machine alone. Leave --address out."
        )
    most = cohort_size(settings.cohort, config, device)
    site = WorkerSettings(dump_run_config(config), nodes, device, node=dict(node or {}), cohort=most)
    return make(settings, site, cohort_cut(most, config, device, rows))


def _in_process(settings: EngineSettings, site: WorkerSettings, cut: Cut) -> Engine:
    return InProcessEngine(site_handler(site.config_yaml, site.nodes, site.device, site.node, site.cohort), cut)


def _processes(settings: EngineSettings, site: WorkerSettings, cut: Cut) -> Engine:
    return ProcessEngine(settings.size, _worker_settings(settings, site), cut)


def _ray(settings: EngineSettings, site: WorkerSettings, cut: Cut) -> Engine:
    from simulations.engines.ray_engine import RayEngine

    each = _worker_settings(settings, site)
    # Ray shows every actor its own GPU alone, so that each finds it as the first.
    own = (lambda _: each(0)) if site.device == "auto" else each
    return RayEngine(settings.size, own, settings.threads_each, settings.address, cut)


def _worker_settings(settings: EngineSettings, site: WorkerSettings) -> Callable[[int], WorkerSettings]:
    level = logging.getLogger().getEffectiveLevel()

    def of(number: int) -> WorkerSettings:
        device = device_of(site.device, number)
        return replace(site, device=device, threads=settings.threads_each, log_level=level)

    return of


ENGINES: dict[str, Callable[[EngineSettings, WorkerSettings, Cut], Engine]] = {
    "inprocess": _in_process,
    "processes": _processes,
    "ray": _ray,
}
