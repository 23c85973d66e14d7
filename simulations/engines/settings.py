"""Settings of an engine: where and with how much of the machine a run computes. They cannot change its results."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field

from common.errors import ConfigError

ONE_PROCESS = "inprocess"


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, and how large.

    Attributes:
        name: a key of ``simulations.engines.catalog.ENGINES``.
        workers: processes or actors; None for one a GPU where there are several, else one a core, at most 8.
        threads: CPU threads of each worker; None for the cores shared out.
        address: of an existing Ray cluster; None for one on this machine that ends with the run.
    """

    name: str = ONE_PROCESS
    workers: int | None = None
    threads: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name == ONE_PROCESS and self.workers not in (None, 1):
            raise ConfigError(
                f"--workers is {self.workers} with engine {self.name!r}; expected 1. Choose --engine processes."
            )
        if self.address is not None and self.name != "ray":
            raise ConfigError(f"--address is given with engine {self.name!r}; expected engine 'ray'. Set --engine ray.")
        for flag, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} is {value}; expected at least 1.")

    @property
    def size(self) -> int:
        """Number of workers."""
        if self.name == ONE_PROCESS:
            return 1
        return self.workers or gpus() or min(8, cores())

    @property
    def threads_each(self) -> int:
        """Threads of each worker: workers times threads are at most the cores, unless asked for otherwise."""
        return self.threads or max(1, cores() // self.size)

    def label(self) -> str:
        """Return what the summary calls the engine."""
        return self.name if self.name == ONE_PROCESS else f"{self.name}, {self.size} workers"


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker must know before its first request; plain values, which travel as JSON.

    Attributes:
        config_yaml: the run config.
        nodes: number of virtual sites.
        device: to compute on.
        threads: CPU threads.
        log_level: of Python's logging.
        node: further entries of every node's config.
    """

    config_yaml: str
    nodes: int
    device: str
    threads: int = 1
    log_level: int = logging.WARNING
    node: dict[str, str] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, data: bytes) -> WorkerSettings:
        """Read what :meth:`pack` wrote."""
        return cls(**json.loads(data))


def device_of(device: str, worker: int) -> str:
    """Return the device of a worker, numbered from 0: with several GPUs "auto" deals them out in turn."""
    count = gpus()
    return f"cuda:{worker % count}" if device == "auto" and count > 1 else device


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """Return the number of CUDA devices."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
