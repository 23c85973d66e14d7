"""What stands in the tables of ``docs/results.md``: which config, changed how."""

from __future__ import annotations

from dataclasses import dataclass, field

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One line of a table, or one cell of a grid.

    Attributes:
        label: what it is called.
        config: file in ``configs/``.
        overrides: ``section.key=value`` strings.
    """

    label: str
    config: str
    overrides: Overrides = ()


@dataclass(frozen=True)
class Grid:
    """A table of methods by ε.

    Attributes:
        config: file in ``configs/``.
        methods: overrides of each method, by its label.
        epsilons: ε of the columns; None is without privacy.
        plain: overrides of a method where there is no noise, by its label; in place of those in ``methods``.
        tuned: further overrides of single cells, by method and ε.
    """

    config: str
    methods: dict[str, Overrides]
    epsilons: tuple[float | None, ...]
    plain: dict[str, Overrides]
    tuned: dict[tuple[str, float], Overrides] = field(default_factory=dict)

    def cell(self, method: str, epsilon: float | None) -> Line:
        """Return the line behind a cell."""
        if epsilon is None:
            return Line(f"{method}, no DP", self.config, ("privacy={unit: none}", *self.plain[method]))
        own = self.tuned.get((method, epsilon), ())
        overrides = (f"privacy.epsilon={epsilon:g}", *self.methods[method], *own)
        return Line(f"{method}, ε = {epsilon:g}", self.config, overrides)

    def cells(self) -> list[Line]:
        """Return the lines of all cells, cheapest method first."""
        return [self.cell(method, epsilon) for epsilon in self.epsilons for method in self.methods]


_TOP = ", ".join(f"layer.{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value"))
_LORA = f"adapter={{kind: lora, rank: 4, alpha: 16, target_modules: [{_TOP}]}}"
"""Factors on the two upper layers: fewer parameters to bury in noise, and half the time."""
_ADAM = "training={optimizer: adamw, lr: 0.001, head_lr: 0.3, local_epochs: 1}"
_SGD = "training={optimizer: sgd, lr: 3, head_lr: 300, local_epochs: 1}"
_SLOWER = "training={optimizer: sgd, lr: 1, head_lr: 100, local_epochs: 1}"
_FEDIT, _FFA = "aggregation={method: fedit}", "aggregation={method: ffa_lora}"
_TEST = ("data.max_test_rows=1500",)
_FEWER = ("federation.rounds=2", *_TEST)


def _methods(lora: Overrides, head: Overrides, more: Overrides = ()) -> dict[str, Overrides]:
    return {
        "head only": head,
        "FFA-LoRA": (*lora, _FFA, *more),
        "FedIT": (*lora, _FEDIT, *more),
    }


GRIDS: dict[str, Grid] = {
    "product-reviews-privacy": Grid(
        "product-reviews-dp",
        methods=_methods((_LORA, _ADAM), ()),
        plain=_methods(
            ("adapter={kind: lora, rank: 8, alpha: 16}", "training={optimizer: adamw, lr: 2.0e-3, batch_size: 16}"),
            ("training.lr=0.03",),
        ),
        epsilons=(None, 8.0, 3.0, 1.0),
    ),
    "banking77-privacy": Grid(
        "banking77-dp",
        methods=_methods((_LORA, _SGD, *_TEST), _TEST),
        plain=_methods(
            (_LORA, "training={optimizer: adamw, lr: 0.004, head_lr: 0.03, batch_size: 16}"),
            ("training={optimizer: adamw, lr: 0.03}", *_TEST),
            _FEWER,
        ),
        epsilons=(None, 8.0, 3.0, 1.0),
        tuned={
            ("head only", 1.0): ("training.lr=100",),
            ("FFA-LoRA", 3.0): _FEWER,
            ("FedIT", 3.0): _FEWER,
            ("FFA-LoRA", 1.0): (_SLOWER, *_FEWER),
            ("FedIT", 1.0): (_SLOWER, *_FEWER),
        },
    ),
}

_BERT, _HEAD = ("model.pooling=family",), "training.lr=0.03"

TABLES: dict[str, tuple[Line, ...]] = {
    "product-reviews": (Line("FedIT, no DP", "product-reviews"),),
    "pooling": (
        Line("head only on BERT's own pooling, no DP", "product-reviews-dp", (*_BERT, "privacy={unit: none}", _HEAD)),
        Line("head only on BERT's own pooling, ε = 8", "product-reviews-dp", _BERT),
        Line("head only on the mean, ε = 8", "product-reviews-dp"),
    ),
    "medquad-tiny": (Line("FedIT, no DP", "medquad-tiny"),),
}
