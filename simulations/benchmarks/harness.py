"""What the federation costs: fedtune-sim against a plain PyTorch loop doing the same local steps.

The plain loop is what one would write without any federation: the model loaded once, PEFT LoRA on it, the same batches
in the same order, each padded to its longest row, AdamW, and an average of the sites' adapters after every round. Both
sides include loading the model and reading and tokenising the data, ours into an empty cache; neither evaluates.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import torch

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.data.batches import Collator, TokenRow
from common.data.federated import load_federated_data
from common.data.tokens import load_federated_tokens
from common.models import resident
from common.models.adapter import adapt, initial_adapter
from common.models.base import choose_device, load_base
from common.randomness import torch_generator
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm, subtract
from server.events import Observer
from simulations.benchmarks.measure import Measurement, in_pairs
from simulations.engines.settings import EngineSettings
from simulations.run import simulate


def benchmark_config(root: Path, rows: int, rounds: int) -> tuple[str, RunConfig]:
    """Return the work: product reviews by product where the data is there, else the embedded clinic messages."""
    reviews = root.parent / "shared" / "data" / "product_reviews"
    name = "product-reviews" if reviews.is_dir() else "quickstart"
    overrides = [
        "privacy={unit: none}", "evaluation.enabled=false", "data.test=null", f"federation.rounds={rounds}",
        f"data.max_rows_per_site={rows}", "aggregation={method: fedit, weights: examples}",
        "training={lr: 2.0e-3, batch_size: 16, local_epochs: 1}",
    ]  # fmt: skip
    return name, load_run_config(root / "configs" / f"{name}.yaml", overrides)


def harness_figures(name: str, config: RunConfig, pairs: int) -> tuple[list[Measurement], float]:
    """Time both sides in pairs; also return how far apart their adapters end, as a share of the norm."""
    ours, plain = _Side(run_fedtune, config), _Side(run_plain_loop, config)
    figures = in_pairs(f"{name}, fedtune-sim against a plain loop", ours, plain, pairs)
    return figures, l2_norm(subtract(ours.adapter, plain.adapter)) / l2_norm(plain.adapter)


class _Side:
    """One side of the comparison; keeps the adapter of its last run."""

    def __init__(self, work: Callable[[RunConfig], Tensors], config: RunConfig) -> None:
        self._work, self._config = work, config
        self.adapter: Tensors = {}

    def __call__(self) -> None:
        self.adapter = self._work(self._config)


class PlainSites:
    """The plain loop's model and rows, loaded once.

    Args:
        config: the run config.
        device: to compute on.
    """

    def __init__(self, config: RunConfig, device: str = "auto") -> None:
        load_federated_data.cache_clear()
        data = load_federated_data(config.data, config.seed).train
        chosen = choose_device(device)
        self._config = config
        self._model = adapt(load_base(config.model, config.data, chosen), config.adapter, config.data, chosen)
        tokenizer = self._model.base.tokenizer
        self.rows = {site: TASKS[config.data.task].tokenise(data[site], tokenizer, config.data) for site in data}
        self._collate = Collator(tokenizer.pad_token_id, self._model.base.family.padding_side)

    def first(self) -> Tensors:
        """Return the adapter that training starts from."""
        return initial_adapter(self._model, self._config.seed)

    def add_round(self, number: int, adapter: Tensors, sites: Iterable[str]) -> Tensors:
        """Train ``sites`` from ``adapter``, one after the other, and return the sum of their weighted adapters."""
        total = sum(map(len, self.rows.values()))
        added = {name: torch.zeros_like(value) for name, value in adapter.items()}
        for site in sites:
            own = self.rows[site]
            self._model.load(adapter)
            order = torch_generator(self._config.seed, "order", number, site)
            parameters = list(self._model.parameters.values())
            _train_epoch(self._model.module, parameters, own, self._collate, self._config, order)
            for name, value in self._model.state().items():
                added[name] += value * (len(own) / total)
        return added


def run_plain_loop(config: RunConfig, device: str = "auto", started: Callable[[], None] | None = None) -> Tensors:
    """Do a run's local steps in one loop and return the averaged adapter, weighted by rows.

    Args:
        config: the run config.
        device: to compute on.
        started: called once model and rows are there.
    """
    sites = PlainSites(config, device)
    adapter = sites.first()
    if started is not None:
        started()
    for number in range(1, config.federation.rounds + 1):
        adapter = sites.add_round(number, adapter, sites.rows)
    return adapter


def _train_epoch(
    module: torch.nn.Module, parameters: list[torch.nn.Parameter], rows: list[TokenRow], collate: Collator,
    config: RunConfig, order: torch.Generator,
) -> None:  # fmt: skip
    module.train()
    optimizer = torch.optim.AdamW(parameters, lr=config.training.lr, weight_decay=config.training.weight_decay)
    shuffled = torch.randperm(len(rows), generator=order).tolist()
    size = config.training.batch_size
    for start in range(0, len(rows), size):
        batch = collate([rows[index] for index in shuffled[start : start + size]]).to(parameters[0].device)
        logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = TASKS[config.data.task].loss_per_sequence(logits.float(), batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_fedtune(
    config: RunConfig, engine: EngineSettings | None = None, device: str = "auto", observer: Observer | None = None
) -> Tensors:
    """Do the same as a federation and return the adapter it exports."""
    from safetensors.torch import load_file

    load_federated_tokens.cache_clear()
    resident.clear()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"FEDTUNE_CACHE": folder}):
        simulate(config, Path(folder) / "run", engine=engine, device=device, observer=observer)
        return load_file(Path(folder) / "run" / "adapter" / "adapter_model.safetensors")
