"""A site's self-test before it trains: silently corrupt LoRA training looks normal from its loss and its ε.

On random token rows, never on the site's data, with the real model and the real DP step:

1. the clipped sum of per-example gradients, packed as in training, equals one record, one backward pass, one clip at a
   time, without packing;
2. no record moves the sum by more than the clip norm;
3. a noisy step moves every trained parameter and nothing else, and noise alone has its standard deviation;
4. the adapter, packed and unpacked as the run's messages are, is within the codec's error, and where that is exact
   gives the same logits.

(Flower leaves ``*_test.py`` out of an app bundle, hence the name of this module.)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from common.codecs.codec import decode, encode, largest_errors
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.data.batches import Batch, Collator, Limit, TokenRow
from common.errors import PrivacyError
from common.methods import trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.frozen import FROZEN_BYTES, frozen_states
from common.models.packing import Start, padded
from common.models.weak_cache import weak_cache
from common.privacy.planning import Mechanism
from common.randomness import CryptoStream, torch_generator
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm, manifest_of, subtract

logger = logging.getLogger(__name__)

ERROR_FP32, ERROR_OTHER = 1e-4, 0.05
"""Largest accepted relative error of the clipped sum, on a float32 base and on a bf16 or quantised one."""

ERROR_CLIP = 1e-3
"""Largest accepted excess over the clip norm, which does not depend on what the base is held in."""

NOISE_ERRORS = 6.0
"""Standard errors that the measured deviation of the noise may be off."""

_LENGTHS = ((9, 4, 6), (5, 5, 12))


@weak_cache(4)
def self_test(model: AdaptedModel, config: RunConfig) -> float:
    """Test the training path of a model and config once in a process.

    Args:
        model: the resident model; its adapter is left as it was.
        config: the run config; tested is what it trains.

    Returns:
        Seconds it took.

    Raises:
        PrivacyError: naming the check that failed. The site must not train then.
    """
    started = time.perf_counter()
    kept = model.state()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            # Not from what an earlier run left: a head that is sure of itself has gradients that are all rounding.
            start = initial_adapter(model, config.seed)
            model.load({name: value + 0.02 * torch.randn_like(value) for name, value in start.items()})
            for names in dict.fromkeys(trained_names(config, model.parameters, number) for number in (1, 2)):
                _check_gradients(model, config, names)
                _check_step(model, config, names)
            _check_packing(model, config)
        finally:
            model.load(kept)
            model.train_only(frozenset())
    seconds = time.perf_counter() - started
    logger.info("self-test passed in %.2f s", seconds)
    return seconds


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise PrivacyError(f"self-test: {what}. Nothing was trained or released; do not use this set-up.")


def _rows(model: AdaptedModel, config: RunConfig, lengths: Sequence[int]) -> list[TokenRow]:
    vocabulary = len(model.base.tokenizer)
    rows = []
    for length in lengths:
        ids = torch.randint(vocabulary // 10, vocabulary, (length,))
        labels = len(config.data.labels or ())
        rows.append(TokenRow(ids, torch.randint(labels, ()) if labels else ids.clone()))
    return rows


def _losses(model: AdaptedModel, config: RunConfig, rows: Sequence[TokenRow], start: Start | None = None) -> Tensor:
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    batch: Batch = collate(rows).to(model.device)
    return TASKS[config.data.task].loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask, start), batch)


def _one_by_one(
    model: AdaptedModel, config: RunConfig, names: frozenset[str], rows: Sequence[TokenRow]
) -> list[Tensors]:
    """Each row's gradient by a backward pass of its own, not packed."""
    parameters = model.train_only(names)
    gradients = []
    for row in rows:
        with padded():
            _losses(model, config, [row]).sum().backward()  # type: ignore[no-untyped-call]
        own = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        gradients.append({name: value.detach().cpu().clone() for name, value in own.items()})
        for parameter in parameters.values():
            parameter.grad = None
    return gradients


def _start(model: AdaptedModel, config: RunConfig, rows: Sequence[TokenRow]) -> Start | None:
    """Where training starts on these rows, once the blocks below the lowest adapter have been run."""
    head_only = config.adapter.kind == "head_only"
    states = frozen_states(model, rows, Limit(), head_only=head_only, room_bytes=FROZEN_BYTES)
    return None if states is None else states.start(range(len(rows)))


def _step(
    model: AdaptedModel, config: RunConfig, names: frozenset[str], rows: Sequence[TokenRow], clip: float, noise: float
) -> Tensors:
    """Return what one DP step of SGD with rate 1 subtracts from the adapter, and undo it."""
    before = model.state()
    parameters = model.train_only(names)
    from client.dp.step import DpStep  # brings Opacus, which sites without DP need not load

    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    mechanism = Mechanism(
        noise_multiplier=noise, clip_norm=clip, sample_rate=1.0, expected_batch_size=1.0, steps_per_round=1,
        delta=1e-5, accountant="rdp",
    )  # fmt: skip
    stream = CryptoStream(bytes(32))
    with DpStep(model.module, parameters, optimizer, mechanism, stream, model.base.family.batch_first) as step:
        if rows:
            step.micro_batch(_losses(model, config, rows, _start(model, config, rows)), len(rows))
        step.apply(len(rows))
    moved = subtract(before, model.state())
    model.load(before)
    return moved


def _check_gradients(model: AdaptedModel, config: RunConfig, names: frozenset[str]) -> None:
    held = next(p.dtype for p in model.base.module.parameters() if not p.requires_grad)
    accepted = ERROR_FP32 if held == torch.float32 else ERROR_OTHER
    dropout = [m for m in model.module.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    model.module.train()
    for layer in dropout:
        layer.eval()
    for lengths in _LENGTHS:
        rows = _rows(model, config, lengths)
        gradients = _one_by_one(model, config, names, rows)
        norms = [l2_norm(gradient) for gradient in gradients]
        _expect(min(norms) > 0, "a record has no gradient")
        clip = sorted(norms)[1]
        expected = {
            name: sum(
                (min(1.0, clip / norm) * g[name] for g, norm in zip(gradients, norms, strict=True)), torch.tensor(0.0)
            )
            for name in names
        }
        moved = {name: value for name, value in _step(model, config, names, rows, clip, 1e-12).items() if name in names}
        error = l2_norm(subtract(moved, expected)) / l2_norm(expected)
        _expect(error < accepted, f"per-example gradients are off by {error:.1e} of their sum")
        alone = l2_norm(_step(model, config, names, rows[:1], 0.5 * norms[0], 1e-12))
        _expect(alone <= 0.5 * norms[0] * (1 + ERROR_CLIP), "a clipped gradient is longer than the clip norm")


def _check_step(model: AdaptedModel, config: RunConfig, names: frozenset[str]) -> None:
    before = _frozen_sums(model)
    moved = _step(model, config, names, _rows(model, config, (7, 7)), 0.1, 1.0)
    for name, value in moved.items():
        _expect(bool(value.any()) == (name in names), f"{name} {'did not move' if name in names else 'moved'}")
    for name, total in _frozen_sums(model).items():
        _expect(total == before[name], f"frozen {name} moved")
    noise = _step(model, config, names, [], 0.1, 2.0)
    alone = torch.cat([value.flatten() for name, value in noise.items() if name in names])
    deviation, slack = float(alone.double().std()) / 0.2, NOISE_ERRORS / math.sqrt(2 * len(alone))
    _expect(abs(deviation - 1.0) < slack, f"the noise has {deviation:.3f} times its deviation")


def _frozen_sums(model: AdaptedModel) -> dict[str, float]:
    adapter = {id(parameter) for parameter in model.parameters.values()}
    frozen = {name: p for name, p in model.module.named_parameters() if id(p) not in adapter}
    return {name: float(parameter.detach().abs().sum(dtype=torch.float64)) for name, parameter in frozen.items()}


def _check_packing(model: AdaptedModel, config: RunConfig) -> None:
    state = model.state()
    ids = torch.randint(len(model.base.tokenizer), (1, 6), device=model.device)
    model.module.eval()
    for make in (Packing.of_update, Packing.of_adapter):
        packing = make(config.communication)
        draw = torch_generator(config.seed, "codec test")
        unpacked = decode(encode(state, packing, draw), manifest_of(state), packing)
        allowed = largest_errors(state, packing)
        for name, value in state.items():
            _expect(bool(((unpacked[name] - value).abs() <= allowed[name]).all()), f"{name} is packed wrongly")
        if any(bool(bound.any()) for bound in allowed.values()):
            continue
        with torch.no_grad():
            before = model.logits(ids, torch.ones_like(ids))
            model.load({name: torch.zeros_like(value) for name, value in state.items()})
            model.load(unpacked)
            after = model.logits(ids, torch.ones_like(ids))
        _expect(bool(torch.equal(before, after)), "a packed adapter gives other logits")
