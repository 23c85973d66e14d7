"""Which ways of running rounds a run config may ask for, beside what."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.round_rules import round_warnings
from common.errors import ConfigError
from common.methods import METHODS
from tests.common.test_method_rules import config_of

LATE: dict[str, dict[str, Any]] = {"carry": {"late": "carry"}, "async": {"mode": "async", "buffer_size": 2}}
SAME_COORDINATES = {"fedit", "ffa_lora", "fedsa_lora", "fed_sb"}


@pytest.mark.parametrize("how", LATE)
@pytest.mark.parametrize("method", METHODS)
def test_late_updates_need_the_same_coordinates_every_round(method: str, how: str) -> None:
    if method in SAME_COORDINATES:
        assert config_of(method, federation=LATE[how]).federation.carries
        return
    with pytest.raises(ConfigError, match=rf"under aggregation.method '{method}' are in other coordinates.*'fedit'"):
        config_of(method, federation=LATE[how])


SITE_LEVEL = [{"unit": "site"}, {"unit": "example", "site_level": {"epsilon": 3.0}}]


@pytest.mark.parametrize("privacy", SITE_LEVEL)
@pytest.mark.parametrize(
    ("federation", "reason"),
    [
        (LATE["carry"], "counts there or never"),
        (LATE["async"], "counts there or never"),
        ({"over_select": 1.5, "sites_per_round": 4}, "who answers first would decide"),
        ({"below_min": "skip"}, "left to chance"),
        ({"below_min": "extend"}, "left to chance"),
    ],
)
def test_site_level_privacy_accounts_for_plain_rounds_alone(
    privacy: dict[str, Any], federation: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_of("fedit", privacy=privacy, federation=federation)


@pytest.mark.parametrize(
    ("federation", "how"),
    [
        (LATE["carry"], "late 'carry'"),
        (LATE["async"], "mode 'async'"),
        ({"over_select": 1.5, "sites_per_round": 4}, "over_select"),
    ],
)
def test_weight_cap_is_refused_where_fewer_sites_count_than_are_asked(federation: dict[str, Any], how: str) -> None:
    capped = {"method": "fedit", "weights": "examples", "max_weight": 0.1}
    with pytest.raises(ConfigError, match=rf"max_weight is set with federation.{how}.*expected weights 'uniform'"):
        config_of("fedit", federation=federation, aggregation=capped)
    config_of("fedit", federation={"sites_per_round": 4}, aggregation=capped)
    config_of("fedit", federation=federation, aggregation={"method": "fedit", "weights": "uniform"})
    config_of("fedit", federation=federation, aggregation={"weights": "examples", "robust": "median"})


@pytest.mark.parametrize("how", LATE)
def test_late_updates_and_adaptive_clipping_do_not_mix(how: str) -> None:
    privacy = {"unit": "example", "clipping": "adaptive"}
    with pytest.raises(ConfigError, match="goes on from the round before"):
        config_of("ffa_lora", privacy=privacy, federation=LATE[how])
    config_of("ffa_lora", privacy={"unit": "example"}, federation=LATE[how])


@pytest.mark.parametrize(
    ("federation", "reason"),
    [
        ({"mode": "async"}, "buffer_size goes with mode 'async'"),
        ({"buffer_size": 3}, "buffer_size goes with mode 'async'"),
        ({"mode": "async", "buffer_size": 3, "sites_per_round": 2}, "above sites_per_round 2"),
        ({"mode": "async", "buffer_size": 2, "min_sites": 3}, "below min_sites 3"),
        ({"mode": "async", "buffer_size": 2, "sites_per_round": 4, "over_select": 2.0}, "waits for no slow site"),
        ({"over_select": 1.3}, "all sites are asked"),
        ({"over_select": 0.5, "sites_per_round": 2}, "over_select"),
        ({"max_staleness": 17}, "max_staleness"),
        ({"below_min": "wait"}, "below_min"),
    ],
)
def test_rounds_that_cannot_close_are_refused(federation: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_of("fedit", federation=federation)


def test_buffer_that_the_sites_there_are_cannot_fill_is_told() -> None:
    config = config_of("fedit", federation={"mode": "async", "buffer_size": 9})
    assert round_warnings(config) == round_warnings(config, 9) == ()
    (warning,) = round_warnings(config, 4)
    assert "ends with 4 updates" in warning


def test_over_selection_under_privacy_at_the_sites_is_allowed_with_a_warning() -> None:
    over = {"over_select": 1.3, "sites_per_round": 4}
    assert round_warnings(config_of("ffa_lora", federation=over)) == ()
    (warning,) = round_warnings(config_of("ffa_lora", federation=over, privacy={"unit": "example"}))
    assert "spends its budget" in warning
