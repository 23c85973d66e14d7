"""A ClientApp as Flower's FlowerTune templates write it: model, data, local steps, the whole adapter back.

Its local steps are those of a run config without DP: the same rows in the same order, each batch padded to its longest
row, a fresh optimizer for every message.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.dp.sampling import shuffled_batches
from client.training.optimizers import make_optimizer
from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.data.batches import Collator, TokenRow
from common.data.federated import load_federated_data
from common.models.adapter import AdaptedModel, adapt
from common.models.base import choose_device, load_base
from common.models.packing import padded
from common.privacy.planning import plain_steps
from common.randomness import torch_generator
from common.tasks.catalog import TASKS

Rows = Sequence[TokenRow]


def client_app(config_yaml: str, cached: bool) -> ClientApp:
    """Return the ClientApp; Ray pickles it, so it holds plain values and finds this module by its name.

    Args:
        config_yaml: the run config.
        cached: whether a process keeps model and rows between messages.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from simulations.benchmarks import flower_client

        return flower_client.answer(message, context, config_yaml, cached)

    return app


def answer(message: Message, context: Context, config_yaml: str, cached: bool) -> Message:
    """Train on a site's rows from the adapter in the message and return the whole adapter."""
    torch.set_num_threads(1)
    if not cached:
        _model.cache_clear()
        _rows.cache_clear()
        load_federated_data.cache_clear()
    partition = int(context.node_config["partition-id"])
    config, model = _config(config_yaml), _model(config_yaml)
    rows = _rows(config_yaml, partition)
    model.load(message.content.array_records["arrays"].to_torch_state_dict())
    round_number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    site = load_federated_data(config.data, config.seed).sites[partition]
    loss = _train(model, rows, config, torch_generator(config.seed, "order", round_number, site))
    content = RecordDict(
        {
            "arrays": ArrayRecord(dict(model.state())),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(rows)}),
        }
    )
    return Message(content, reply_to=message)


def load_model(config: RunConfig) -> AdaptedModel:
    """Load the base model and wrap it, on the CPU."""
    device = choose_device("cpu")
    return adapt(load_base(config.model, config.data, device), config.adapter, config.data, device)


def _train(model: AdaptedModel, rows: Rows, config: RunConfig, order: torch.Generator) -> float:
    """Take the local steps of a round and return their mean loss."""
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    task, size = TASKS[config.data.task], config.training.batch_size
    parameters = model.train_only(frozenset(model.parameters))
    optimizer = make_optimizer(config.training, parameters)
    model.module.train()
    losses = []
    for chosen in shuffled_batches(len(rows), size, plain_steps(config, len(rows)), order):
        batch = collate([rows[index] for index in chosen])
        with padded():  # as such a ClientApp computes, not as we do
            loss = task.loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask), batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return fmean(losses)


@lru_cache(maxsize=1)
def _config(config_yaml: str) -> RunConfig:
    return parse_run_config(config_yaml, "benchmark", None)


@lru_cache(maxsize=1)
def _model(config_yaml: str) -> AdaptedModel:
    return load_model(_config(config_yaml))


@lru_cache(maxsize=4096)
def _rows(config_yaml: str, partition: int) -> Rows:
    config = _config(config_yaml)
    data = load_federated_data(config.data, config.seed)
    tokenizer = _model(config_yaml).base.tokenizer
    return TASKS[config.data.task].tokenise(data.train[data.sites[partition]], tokenizer, config.data)
