"""What a run config allows that is rarely meant: settings without effect, and what is rarely wise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.config.method_rules import method_warnings
from common.config.round_rules import round_warnings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config.run import RunConfig


def config_warnings(config: RunConfig, members: int | None = None) -> tuple[str, ...]:
    """Return sentences on a run config; empty where there is nothing to say.

    Args:
        config: the run config.
        members: sites that can take part, where that is known.
    """
    return (*method_warnings(config), *round_warnings(config, members), *_unused(config))


def _unused(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each setting that is not at its default and changes nothing."""
    aggregation, adapter, rounds, privacy = config.aggregation, config.adapter, config.federation, config.privacy
    optimizer, lora = aggregation.server_optimizer, adapter.kind == "lora"
    coded = {config.communication.codec, config.communication.down_codec} & {"int8", "int4"}
    planned, moving = privacy.unit != "none", privacy.clipping == "adaptive"
    alike = aggregation.robust in ("median", "trimmed_mean", "krum")
    decaying = optimizer in ("fedadam", "fedyogi")
    for section, keys, used, needs in (
        ("aggregation", ("server_lr", "server_beta1"), optimizer != "none", "a server_optimizer"),
        ("aggregation", ("server_beta2",), decaying, "server_optimizer 'fedadam' or 'fedyogi'"),
        ("aggregation", ("server_tau",), optimizer not in ("none", "fedavgm"), "an adaptive server_optimizer"),
        ("aggregation", ("residual_penalty",), aggregation.method == "lora_fair", "method 'lora_fair'"),
        ("aggregation", ("weights",), not alike, "a rule that weighs sites (median, trimmed_mean and krum do not)"),
        ("aggregation", ("robust_sites",), aggregation.robust != "none", "a robust rule"),
        ("federation", ("max_staleness", "staleness_exponent"), rounds.carries, "late 'carry' or mode 'async'"),
        ("federation", ("extension_s",), rounds.below_min == "extend", "below_min 'extend'"),
        ("federation", ("virtual_ranks",), lora, "adapter.kind 'lora'"),
        ("communication", ("block",), bool(coded), "codec int8 or int4"),
        ("adapter", ("virtual_tokens",), adapter.kind == "prompt", "kind 'prompt'"),
        ("adapter", ("target_modules", "dropout"), lora, "kind 'lora'"),
        ("training", ("head_lr",), config.data.task == "classification", "a classification head"),
        ("privacy", ("epsilon", "noise_multiplier", "clip_norm", "delta", "accountant"), planned, "a privacy.unit"),
        ("privacy", ("clip_quantile", "clip_lr", "quantile_share"), moving, "clipping 'adaptive'"),
        ("privacy", ("loss_bound", "loss_share"), privacy.release_loss, "release_loss"),
    ):  # fmt: skip
        settings = getattr(config, section)
        for key in keys:
            if getattr(settings, key) != type(settings).model_fields[key].get_default() and not used:
                yield f"{section}.{key} has no effect without {needs}."
