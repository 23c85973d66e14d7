"""The run config as it reaches a Flower app: Flower's own run config holds scalars only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from common.config.load import load_run_config, parse_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.flower_keys import CONFIG_FILE, CONFIG_YAML

APP_ROOT = Path(__file__).resolve().parent.parent


def run_config_of(flower_config: Mapping[str, object]) -> RunConfig:
    """Return the run config that Flower's run config carries.

    Raises:
        ConfigError: if it carries none, or a broken one.
    """
    text = flower_config.get(CONFIG_YAML)
    if isinstance(text, str) and text.strip():
        return _parse(text)
    name = flower_config.get(CONFIG_FILE)
    if isinstance(name, str) and name:
        return _load(str(APP_ROOT / name))
    raise ConfigError(f"Flower's run config has neither {CONFIG_YAML} nor {CONFIG_FILE}; expected one of them.")


@lru_cache(maxsize=8)
def _parse(text: str) -> RunConfig:
    return parse_run_config(text, CONFIG_YAML, None)


@lru_cache(maxsize=8)
def _load(path: str) -> RunConfig:
    return load_run_config(Path(path))
