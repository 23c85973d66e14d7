"""Settings of an engine: where and with how much of the machine a run computes.

They cannot change its results; ``cohort`` changes their last bits, as matrix products of other sizes round otherwise.
"""

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
        workers: processes or actors; None for one a GPU where there are any, else one a core, at most 8.
        threads: CPU threads of each worker; None for the cores shared out.
        address: of an existing Ray cluster; None for one on this machine that ends with the run.
        cohort: most virtual sites that are trained in one pass; None for what is fastest, see
            :func:`simulations.cohort.size.cohort_size`.
    """

    name: str = ONE_PROCESS
    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    cohort: int | None = None

    def __post_init__(self) -> None:
        if self.name == ONE_PROCESS and self.workers not in (None, 1):
            raise ConfigError(
                f"--workers is {self.workers} with engine {self.name!r}; expected 1. Choose --engine processes."
            )
        if self.address is not None and self.name != "ray":
            raise ConfigError(f"--address is given with engine {self.name!r}; expected engine 'ray'. Set --engine ray.")
        for flag, value in (("--workers", self.workers), ("--threads", self.threads), ("--cohort", self.cohort)):
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
        name = self.name if self.name == ONE_PROCESS else f"{self.name}, {self.size} workers"
        return f"{name}, cohorts of {self.cohort}" if self.cohort is not None and self.cohort > 1 else name


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
        cohort: most virtual sites that are trained in one pass.
    """

    config_yaml: str
    nodes: int
    device: str
    threads: int = 1
    log_level: int = logging.WARNING
    node: dict[str, str] = field(default_factory=dict)
    cohort: int = 1

    def pack(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, data: bytes) -> WorkerSettings:
        """Read what :meth:`pack` wrote."""
        return cls(**json.loads(data))


def asked_cohort(text: str) -> int | None:
    """Read ``--cohort``: a number, or None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--cohort is {text!r}; expected a number of sites from 1, or auto.")
    return int(text)


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
