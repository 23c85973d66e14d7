"""The communication section: old configs, what each direction gets, and what top-k does not go with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.codecs.packing import Packing
from common.config.communication import CommunicationConfig
from common.config.run import RunConfig
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "up", "down"),
    [
        ({}, Packing("fp32"), Packing("fp32")),
        ({"codec": "bf16"}, Packing("bf16"), Packing("bf16")),
        ({"codec": "int8", "block": 32}, Packing("int8", 32), Packing("int8", 32)),
        ({"codec": "int4"}, Packing("int4"), Packing("int8")),
        ({"codec": "int4", "down": "int4", "zstd": 3}, Packing("int4", zstd=3), Packing("int4", zstd=3)),
        ({"top_k": 0.1, "down": "bf16"}, Packing("fp32", top_k=0.1), Packing("bf16")),
    ],
)
def test_each_direction_is_packed_as_the_config_says(given: dict[str, Any], up: Packing, down: Packing) -> None:
    section = CommunicationConfig(**given)
    assert (Packing.of_update(section), Packing.of_adapter(section)) == (up, down)


@pytest.mark.parametrize(
    "given", [{"codec": "int2"}, {"top_k": 0.0}, {"top_k": 1.0}, {"block": 4}, {"zstd": 20}, {"zstd": -1}]
)
def test_value_out_of_range_is_refused(make_config: Callable[..., RunConfig], given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="communication"):
        make_config(communication=given)


@pytest.mark.parametrize("unit", ["example", "user", "site"])
def test_top_k_is_refused_under_every_privacy_unit(make_config: Callable[..., RunConfig], unit: str) -> None:
    sections: dict[str, Any] = {"privacy": {"unit": unit, "noise_multiplier": 1.0}}
    if unit == "user":
        sections["data"] = {"person_field": "site"}
    make_config(communication={"codec": "int4", "zstd": 3}, **sections)
    with pytest.raises(ConfigError, match="the accounting of that round does not cover"):
        make_config(communication={"top_k": 0.1}, **sections)


@pytest.mark.parametrize(
    ("aggregation", "reason"),
    [
        ({"method": "flora"}, "needs the same coordinates every round"),
        ({"method": "rolora"}, "needs the same coordinates every round"),
        ({"robust": "median"}, "leaves most entries of an update zero"),
        ({"robust": "trimmed_mean"}, "leaves most entries of an update zero"),
    ],
)
def test_top_k_is_refused_where_it_makes_no_sense(
    make_config: Callable[..., RunConfig], aggregation: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(communication={"top_k": 0.1}, aggregation=aggregation)
    make_config(communication={"codec": "int4"}, aggregation=aggregation)
