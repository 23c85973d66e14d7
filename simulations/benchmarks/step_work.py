"""One training step on fixed random rows, in every way that the benchmark compares.

All ways compute the same rows in one micro-batch with the same model, task loss and AdamW; rows are equally long, so
nothing is padded. What differs is what is done with the gradients.
"""

from __future__ import annotations

import torch

from client.dp.capture import Capture
from client.dp.clipping import MovingClip
from client.dp.step import DpStep
from client.training.optimizers import make_optimizer
from client.training.steps import GradientStep, PlainStep
from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from common.data.batches import Batch, Collator, TokenRow
from common.errors import PrivacyError
from common.methods import trained_names
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.randomness import CryptoStream, torch_generator
from common.tasks.catalog import TASKS
from simulations.benchmarks.ghost import GhostStep


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return ``config`` with ``section.key=value`` overrides."""
    return parse_run_config(dump_run_config(config), config.name, None, overrides)


class StepWork:
    """Steps of one adapter on one batch. Each method does ``steps`` steps and returns nothing: it is to be timed.

    Args:
        config: the run config, with ``privacy.noise_multiplier`` set so that nothing has to be calibrated.
        rows: B, rows of a step.
        tokens: T, tokens of each row.
        steps: steps done by one call.

    Raises:
        PrivacyError: for a config without differential privacy.
    """

    def __init__(self, config: RunConfig, rows: int, tokens: int, steps: int = 1) -> None:
        self._config, self._steps, self._rows = config, steps, rows
        self._model = resident_model(config)
        self._task = TASKS[config.data.task]
        self._parameters = self._model.train_only(trained_names(config, self._model.parameters))
        mechanism = plan_mechanism(config, 10 * rows)
        if mechanism is None:
            raise PrivacyError("privacy.unit is 'none'; expected a unit to benchmark. Set it in the config.")
        self._mechanism = mechanism
        self._noise = CryptoStream(bytes(32))
        self._batch = self._random_batch(tokens).to(self._model.device)
        self._model.module.train()

    def plain(self) -> None:
        """Steps without differential privacy, as the trainer does them."""
        self.run(PlainStep(list(self._parameters.values()), self._optimizer(), None))

    def captured(self) -> None:
        """DP steps as the trainer does them."""
        with self._dp_step("layers") as step:
            self.run(step)

    def hooks(self) -> None:
        """DP steps with Opacus' hooks."""
        with self._dp_step("hooks") as step:
            self.run(step)

    def ghost(self) -> None:
        """DP steps with Opacus' ghost clipping."""
        with GhostStep(self._model.module, self._optimizer(), self._mechanism) as step:
            self.run(step)

    def noise(self) -> None:
        """What ``steps`` steps draw from the ChaCha20 stream and add, alone."""
        deviation = self._mechanism.noise_multiplier * self._mechanism.clip_norm
        flat = torch.cat([parameter.detach().flatten() for parameter in self._parameters.values()])
        for _ in range(self._steps):
            noise = self._noise.normal(flat.shape) * deviation
            flat + noise.to(flat.dtype).to(flat.device)

    def run(self, step: GradientStep) -> None:
        """Do the steps with ``step``."""
        for _ in range(self._steps):
            logits = self._model.logits(self._batch.input_ids, self._batch.attention_mask)
            step.micro_batch(self._task.loss_per_sequence(logits, self._batch), self._rows)
            step.apply(self._rows)

    def _random_batch(self, tokens: int) -> Batch:
        generator = torch_generator(0, "benchmark-rows")
        vocabulary, labels = len(self._model.base.tokenizer), len(self._config.data.labels or ())
        rows = []
        for _ in range(self._rows):
            ids = torch.randint(vocabulary // 10, vocabulary, (tokens,), generator=generator)
            label = torch.randint(labels, (), generator=generator) if labels else ids.clone()
            rows.append(TokenRow(ids, label))
        return Collator(self._model.base.tokenizer.pad_token_id, self._model.base.family.padding_side)(rows)

    def _optimizer(self) -> torch.optim.Optimizer:
        self._model.train_only(frozenset(self._parameters))  # whoever had the resident model may have frozen it
        return make_optimizer(self._config.training, self._parameters)

    def _dp_step(self, capture: Capture) -> DpStep:
        family, privacy = self._model.base.family, self._config.privacy
        clip = MovingClip(self._mechanism, privacy.clip_quantile, privacy.clip_lr)
        return DpStep(
            self._model.module, self._parameters, self._optimizer(), self._mechanism, self._noise,
            family.batch_first, capture, clip=clip,
        )  # fmt: skip
