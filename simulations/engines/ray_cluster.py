"""The Ray cluster an engine uses: one of its own on this machine, or an existing one. Imported only when chosen."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import ConfigError, RunError

LOOPBACK = "127.0.0.1"
_ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_OPEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is "0", Ray listens on the loopback address alone. It is read once, when Ray is imported."""


def import_ray(*, alone: bool) -> ModuleType:
    """Import Ray.

    Args:
        alone: for a cluster of this machine alone, which nobody else must reach: Ray asks callers for no credentials.

    Raises:
        ConfigError: naming the extra that brings it.
        RunError: if Ray was imported already, in a way that would let it listen on all interfaces.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if alone and os.environ.get(_OPEN) != "0":
        if "ray" in sys.modules:
            raise RunError(f"Ray was imported before {_OPEN} was 0; expected it unset or 0. Set it before the start.")
        os.environ[_OPEN] = "0"
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "engine 'ray' needs the package 'ray'; expected it installed. Run: pip install -e '.[flower-simulation]'."
        ) from None


class RayCluster:
    """A connection to a cluster.

    Args:
        address: of an existing cluster; None starts one here, on the loopback address, that ends with :meth:`close`.
        workers: actors that must fit.
        threads: CPU threads of each.

    Raises:
        ConfigError: without Ray, or for a cluster that cannot be reached or has too few cores.
        RunError: if this process uses Ray already, or Ray would listen on all interfaces.
    """

    def __init__(self, address: str | None, workers: int, threads: int) -> None:
        self.ray: Any = import_ray(alone=address is None)
        if self.ray.is_initialized():
            raise RunError("this process uses Ray already; expected one engine at a time. Close the other first.")
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-", ignore_cleanup_errors=True)
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        common: dict[str, Any] = {
            "runtime_env": {"env_vars": environment}, "logging_level": logging.ERROR, "log_to_driver": False,
        }  # fmt: skip
        own = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": LOOPBACK}
        try:
            if address is None:
                self.ray.init(address="local", _temp_dir=self._folder.name, **own, **common)
            else:
                self.ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            self._folder.cleanup()
            where = f"--address {address!r} cannot be used" if address else "Ray does not start"
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{where} ({first[:160]}); expected a running cluster, or no --address. "
                "Start one with: ray start --head."
            ) from None
        resources = self.ray.cluster_resources()
        if resources.get("CPU", 0) < workers:
            self.close()
            raise ConfigError(
                f"--workers is {workers} but the Ray cluster has {resources.get('CPU', 0):g} cores; expected one each."
            )
        self.gpus_each = min(1.0, resources.get("GPU", 0) / workers)

    def close(self) -> None:
        """Disconnect; end a cluster of our own, and remove its files."""
        self.ray.shutdown()
        self._folder.cleanup()
