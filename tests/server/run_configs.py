"""Run configs for tests that need no model and no data."""

from __future__ import annotations

from typing import Any

import yaml

from common.config.load import parse_run_config
from common.config.run import RunConfig


def run_config(**sections: Any) -> RunConfig:
    """A run config on files that need not be there; keyword arguments replace whole sections' keys."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "/nowhere/model"},
        "data": {"task": "classification", "train": "/nowhere/train.jsonl", "labels": ["a", "b"]},
        "privacy": {"unit": "none"},
        "federation": {"rounds": 3},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return parse_run_config(yaml.safe_dump(values), "test", None)
