"""A run config as a report shows it: where files lie on a machine is nobody's business."""

from __future__ import annotations

from typing import Any

import yaml

from common.sources import is_hub

_SOURCES = (("model", "source"), ("data", "train"), ("data", "test"))


def config_listing(text: str) -> str:
    """Return a run config's YAML with the folders of its files left out.

    Args:
        text: the resolved config.
    """
    values: dict[str, Any] = yaml.safe_load(text)
    for section, key in _SOURCES:
        source = values.get(section, {}).get(key)
        if isinstance(source, str) and not is_hub(source) and not source.startswith("package:"):
            values[section][key] = f".../{source.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
