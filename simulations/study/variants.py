"""What is compared: a run config, perhaps with overrides, and what it is called.

A variant is written ``[LABEL=]CONFIG[@KEY=VALUE]...``: ``configs/quickstart.yaml@aggregation.method=fedit``, or
``FedIT=configs/quickstart.yaml@aggregation.method=fedit@training.lr=10``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
        label: what it is called in tables and pictures; unique in a comparison.
        config: the run config; its seed is replaced by each of the comparison's.
    """

    label: str
    config: RunConfig

    def seeded(self, seed: int) -> RunConfig:
        """Return the config with a seed."""
        return self.config.model_copy(update={"seed": seed})


def parse_variants(texts: Sequence[str], overrides: Iterable[str] = ()) -> list[Variant]:
    """Read variants as a person writes them.

    Args:
        texts: ``[LABEL=]CONFIG[@KEY=VALUE]...``.
        overrides: ``section.key=value`` for all of them; a variant's own come after.

    Raises:
        ConfigError: for a config that cannot be read, or two variants that are the same or have the same label.
    """
    common = tuple(overrides)
    variants: list[Variant] = []
    for text in texts:
        variant = _parse(text, common)
        for other in variants:
            if other.label == variant.label:
                raise ConfigError(
                    f"two variants are called {variant.label!r}; expected each once. Write LABEL=CONFIG@KEY=VALUE."
                )
            if _same_work(other.config, variant.config):
                raise ConfigError(
                    f"variants {other.label!r} and {variant.label!r} are the same config; expected different ones. "
                    "Remove one."
                )
        variants.append(variant)
    return variants


def slug(label: str) -> str:
    """Return a label as a part of a file name: lower-case ASCII letters, digits and dashes; perhaps empty."""
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in label).split()).lower()


def _parse(text: str, common: tuple[str, ...]) -> Variant:
    head, *own = text.split("@")
    label, equals, path = head.rpartition("=")
    config = load_run_config(Path(path), (*common, *own))
    if equals and not label.strip():
        raise ConfigError(f"variant {text!r} has an empty label; expected [LABEL=]CONFIG[@KEY=VALUE].")
    return Variant(label.strip() if equals else ", ".join([config.name, *map(_short, own)]), config)


def _short(override: str) -> str:
    """``aggregation.method=fedit`` as ``method=fedit``."""
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


def _same_work(first: RunConfig, second: RunConfig) -> bool:
    neutral = {"name": "run", "seed": 0}
    return first.model_copy(update=neutral) == second.model_copy(update=neutral)
