"""The grid behind ``docs/methods.md``: every aggregation method on every federation, without DP and under it.

::

    federation   product_reviews (14 sites), banking77 at Dirichlet 0.1 with 3, 20 and 50 sites
    privacy      none, ε = 6 for each record
    size         full: for who has days, or a GPU; capped: about an hour of one CPU core

What a size caps it caps for all methods alike. Rows a round are the same share of all rows whatever the number of
sites, so that a federation of 50 sites does the work of one of three, each site a smaller part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.methods import METHODS
from simulations.study.runs import PlannedRun

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "results-methods"

PRIVACIES: dict[str, str] = {"no DP": "privacy={unit: none}", "ε = 6": "privacy.epsilon=6"}
"""The override of each privacy."""

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Federation:
    """Data and its sites.

    Attributes:
        config: file in ``configs/``.
        sites: number of sites.
        overrides: that make them.
    """

    config: str
    sites: int
    overrides: Overrides = ()


def _skewed(sites: int) -> Federation:
    partition = f"data.partition={{kind: dirichlet, alpha: 0.1, sites: {sites}}}"
    return Federation("banking77-dp", sites, (partition,))


FEDERATIONS: dict[str, Federation] = {
    "product reviews, 14 sites": Federation("product-reviews-dp", 14),
    **{f"banking77, {sites} sites": _skewed(sites) for sites in (3, 20, 50)},
}


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        common: overrides of every run.
        training: overrides of a config, by privacy: the training section, and under DP the share of rows in a step.
    """

    common: Overrides
    training: Mapping[tuple[str, str], Overrides]


def _size(layers: Sequence[int], rounds: int, work: Mapping[tuple[str, str], tuple[str, float]], *more: str) -> Size:
    """Return a size of rank 4 on query and value of some layers.

    Args:
        layers: of the encoder's six.
        rounds: of every run.
        work: by config and privacy, how long a round is: passes over the rows without DP; under DP steps, and the share
            of rows in one.
        more: further overrides.
    """
    names = ", ".join(f"layer.{layer}.attention.self.{name}" for layer in layers for name in ("query", "value"))
    adapter = f"adapter={{kind: lora, rank: 4, alpha: 16, target_modules: [{names}]}}"
    return Size(
        (adapter, f"federation.rounds={rounds}", *more),
        {key: _training(*key, *length) for key, length in work.items()},
    )


_PLAIN = "optimizer: adamw, lr: 0.004, head_lr: 0.03, batch_size: 16"
_PRIVATE = {
    "product-reviews-dp": "optimizer: adamw, lr: 0.001, head_lr: 0.3",
    "banking77-dp": "optimizer: sgd, lr: 3, head_lr: 300",
}
"""Optimizers under DP, as docs/results.md found them for FedIT and FFA-LoRA."""


def _training(config: str, privacy: str, length: str, share: float) -> Overrides:
    if privacy == "no DP":
        return (f"training={{{_PLAIN}, {length}}}",)
    return (f"training={{{_PRIVATE[config]}, {length}}}", f"privacy.sample_rate={share:g}")


SIZES: dict[str, Size] = {
    "capped": _size(
        [5], 6,
        {
            ("product-reviews-dp", "no DP"): ("local_epochs: 0.2", 1.0),
            ("product-reviews-dp", "ε = 6"): ("local_steps: 2", 0.1),
            ("banking77-dp", "no DP"): ("local_epochs: 0.06", 1.0),
            ("banking77-dp", "ε = 6"): ("local_steps: 2", 0.03),
        },
        "data.max_length=32", "data.max_test_rows=250",
    ),
    "full": _size(
        range(6), 20,
        {
            ("product-reviews-dp", "no DP"): ("local_epochs: 1", 1.0),
            ("product-reviews-dp", "ε = 6"): ("local_steps: 5", 0.2),
            ("banking77-dp", "no DP"): ("local_epochs: 1", 1.0),
            ("banking77-dp", "ε = 6"): ("local_steps: 5", 0.2),
        },
    ),
}  # fmt: skip

ORDER = tuple(sorted(METHODS, key=lambda name: METHODS[name].core))
"""Methods with a core last: they have a model of their own, and the one in memory is used by all others first."""


RATES = (0.33, 0.58, 1.0, 1.73)
"""Powers of the square root of 3: rows of FedSVD's A have length 1, those of an A drawn as FFA-LoRA's is 1 / √3."""

RATED_METHODS = ("ffa_lora", "fedsvd")
RATED_FEDERATIONS = tuple(name for name in FEDERATIONS if name in ("product reviews, 14 sites", "banking77, 3 sites"))
"""Where something is learnt at ε = 6."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid, but for its seed."""

    size: str
    federation: str
    privacy: str
    method: str
    rate: float = 1.0
    """Times the learning rate of its size, the head's apart."""

    @property
    def label(self) -> str:
        """What the run is called."""
        return f"{self.federation}, {self.method}, {self.privacy}" + ("" if self.rate == 1 else f", rate x {self.rate}")

    def config(self, seed: int) -> RunConfig:
        """Return its run config."""
        federation, size = FEDERATIONS[self.federation], SIZES[self.size]
        overrides = [
            f"seed={seed}", PRIVACIES[self.privacy], f"aggregation.method={self.method}", *size.common,
            *size.training[federation.config, self.privacy], *federation.overrides,
        ]  # fmt: skip
        path = ROOT / "configs" / f"{federation.config}.yaml"
        config = load_run_config(path, overrides)
        if self.rate == 1:
            return config
        return load_run_config(path, [*overrides, f"training.lr={self.rate * config.training.lr:g}"])

    def run(self, seed: int, runs: Path) -> PlannedRun:
        """Return the run, in a folder of its own under ``runs``."""
        federation = FEDERATIONS[self.federation]
        protected = "none" if self.privacy == "no DP" else "eps6"
        name = f"{federation.config.removesuffix('-dp')}-{federation.sites}--{self.method}--{protected}--{seed}"
        name += "" if self.rate == 1 else f"--x{self.rate}"
        return PlannedRun(self.label, self.config(seed), runs / self.size / name)


def cells(size: str) -> list[Cell]:
    """Return the cells of a size, those of one federation together; those of :data:`RATES` come last."""
    grid = [
        Cell(size, federation, privacy, method)
        for federation in FEDERATIONS
        for method in ORDER
        for privacy in PRIVACIES
    ]
    return [*grid, *(cell for cell in rated_cells(size) if cell.rate != 1)]


def rated_cells(size: str) -> list[Cell]:
    """Return the cells that compare :data:`RATED_METHODS` at every rate, those of one federation together."""
    return [
        Cell(size, federation, "ε = 6", method, rate)
        for federation in RATED_FEDERATIONS
        for method in RATED_METHODS
        for rate in RATES
    ]
