"""The sides of the table's comparisons: each does a whole run of a config and says what it took."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.models.base import compute_dtype
from common.models.resident import resident_model
from common.privacy.planning import plain_steps
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm, subtract
from simulations.benchmarks.flower_ray import flower_seconds
from simulations.benchmarks.harness import run_fedtune, run_plain_loop
from simulations.benchmarks.limit import arithmetic_of, matrix_rate
from simulations.benchmarks.measure import Seconds, seconds_of
from simulations.benchmarks.plain_processes import run_plain_processes
from simulations.engines.settings import EngineSettings


class Sides:
    """Whole runs of one config, each a method without arguments; keeps the adapters they end with.

    Args:
        config: the run config.
        workers: processes, where there are several.
    """

    def __init__(self, config: RunConfig, workers: int) -> None:
        self._config, self._workers = config, workers
        self.adapters: dict[str, Tensors] = {}

    def ours(self) -> Seconds:
        """Ours in this process."""
        return self._kept("ours", lambda: run_fedtune(self._config))

    def bare(self) -> Seconds:
        """The bare loop in this process."""
        return self._kept("bare", lambda: run_plain_loop(self._config))

    def ours_shared(self) -> Seconds:
        """Ours with worker processes of one thread."""
        engine = EngineSettings("processes", self._workers, threads=1)
        return self._kept("ours_shared", lambda: run_fedtune(self._config, engine))

    def bare_shared(self) -> Seconds:
        """The bare loop with its sites shared out over processes of one thread."""
        return self._kept("bare_shared", lambda: run_plain_processes(self._config, self._workers))

    def flower(self) -> Seconds:
        """Flower's simulation; the ClientApp loads model and data for every message."""
        return self._flower(cached=False)

    def flower_cached(self) -> Seconds:
        """Flower's simulation; a process keeps model and data."""
        return self._flower(cached=True)

    def distance(self, ours: str, baseline: str) -> float:
        """How far two sides' adapters are apart, as a share of the norm."""
        return l2_norm(subtract(self.adapters[ours], self.adapters[baseline])) / l2_norm(self.adapters[baseline])

    def _flower(self, *, cached: bool) -> Seconds:
        run = flower_seconds(self._config, cached=cached, workers=self._workers)
        return Seconds(run.wall_s, run.cpu_s)

    def _kept(self, name: str, work: Callable[[], Tensors]) -> Seconds:
        def keep() -> None:
            self.adapters[name] = work()

        return seconds_of(keep)


class Limit:
    """The arithmetic limit of a run without DP; see :mod:`simulations.benchmarks.limit`.

    Args:
        config: the run config.
        device: to compute on.

    Attributes:
        tokens: that are trained on in the run.
        operations: of the run.
    """

    def __init__(self, config: RunConfig, device: str = "auto") -> None:
        model = resident_model(config, device)
        data = load_federated_data(config.data, config.seed).train
        task, size = TASKS[config.data.task], config.training.batch_size
        self.tokens, self.operations = 0, 0.0
        self._arithmetic = arithmetic_of(model)
        self._device, self._dtype = model.device, compute_dtype(config.model, model.device)
        lengths = []
        for examples in data.values():
            own = [len(row) for row in task.tokenise(examples, model.base.tokenizer, config.data)]
            passes = plain_steps(config, len(own)) / -(-len(own) // size) * config.federation.rounds
            self.tokens += round(passes * sum(own))
            self.operations += passes * self._arithmetic.operations(own)
            lengths += own
        self._rows = size
        self._batch_tokens = round(size * fmean(lengths))

    def rate(self) -> float:
        """Operations a second of the same products, measured now."""
        return matrix_rate(self._arithmetic, self._batch_tokens, self._rows, self._device, self._dtype)

    def seconds(self) -> Seconds:
        """The limit with the rate measured now, as CPU and as wall seconds of one process."""
        needed = self.operations / self.rate()
        return Seconds(needed, needed)
