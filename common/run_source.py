"""The run config as it reaches a Flower app: Flower's own run config holds scalars only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from common.config.load import load_run_config, parse_run_config
from common.config.run import RunConfig
from common.errors import ConfigError

CONFIG_YAML = "config-yaml"
"""Key of Flower's run config that holds a whole run config as YAML text."""
CONFIG_FILE = "config-file"
"""Key that names a run config file, absolute or inside the app, used where the text is empty."""
RUN_NAME, RUN_FENCE = "run-name", "run-fence"
"""Keys that tell a ServerApp which run of its coordinator's it works on, and which submission of it this is."""
DEVICE = "device"
"""Key of Flower's node config that names the device of a site."""

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
