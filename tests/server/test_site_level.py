"""Site-level privacy at the coordinator: clip on arrival, noise on the sum, division by the expected number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from common.config.run import RunConfig
from common.errors import PrivacyError, RunError
from common.privacy.accounting import Segment, epsilon_spent
from common.privacy.claim import privacy_claim
from common.privacy.planning import plan_mechanism, plan_site_level
from common.randomness import KeyedRandomness, SystemRandomness
from common.tensors import l2_norm
from server.admission import Admission
from server.cohort import Member
from server.events import Observer
from server.rounds import Round
from server.site_level import SiteLevel, site_level_of
from simulations.run import simulate
from tests.mechanisms import mechanism_of
from tests.server.test_rounds import ADAPTER, BASE, RUN, description

SITE = {"unit": "site", "noise_multiplier": 1.0, "clip_norm": 0.05, "delta": 1e-2}
NAMES = ["a", "b", "c", "d"]


def site_level(noise: float = 1e-12, **rule: Any) -> SiteLevel:
    return SiteLevel(mechanism_of(noise=noise, unit="site", **rule), KeyedRandomness(0, "coordinator"))


def test_update_is_clipped_to_the_norm_and_shorter_ones_are_kept() -> None:
    private = site_level(clip=0.5)
    long, short = {"x": torch.full((4, 4), 3.0), "y": torch.ones(2)}, {"x": torch.full((4, 4), 1e-3)}
    assert l2_norm(private.clip(long)) == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(private.clip(long)["x"][0, 0] / private.clip(long)["y"][0], torch.tensor(3.0))
    assert private.clip(short) is short


def test_sum_is_divided_by_the_expected_number_of_sites() -> None:
    private = site_level(expected=4.0)
    mean, none = {"x": torch.tensor([2.0, 0.0, -2.0])}, {"x": torch.zeros(3)}
    torch.testing.assert_close(private.noised(mean, 2, 1)["x"], torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(private.noised(none, 0, 1)["x"], none["x"])


def test_noise_has_its_deviation_and_differs_by_round() -> None:
    private = site_level(noise=1.5, clip=0.2, expected=3.0)
    zero = {"x": torch.zeros(1000, 1000)}
    first, second = (private.noised(zero, 0, number)["x"].double().flatten() for number in (1, 2))
    assert float(first.std()) == pytest.approx(1.5 * 0.2 / 3.0, rel=0.005)
    assert stats.kstest((first / 0.1).numpy(), "norm").pvalue > 1e-6
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 6e-3


def test_each_site_is_in_a_round_at_the_accounted_rate() -> None:
    private = site_level(rate=0.3)
    cohorts = [private.cohort(NAMES, number) for number in range(2000)]
    for name in NAMES:
        count = sum(name in cohort for cohort in cohorts)
        assert stats.binomtest(count, 2000, 0.3).pvalue > 1e-6
    assert [] in cohorts
    assert all(cohort == sorted(cohort) for cohort in cohorts)
    assert site_level(rate=1.0).cohort(NAMES, 1) == NAMES


def test_plan_samples_sites_and_composes_over_rounds(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy=SITE, federation={"rounds": 5, "sites_per_round": 2})
    rule = plan_site_level(config, 8)
    assert rule is not None
    assert (rule.sample_rate, rule.expected_batch_size, rule.steps_per_round) == (0.25, 2.0, 1)
    assert rule.epsilon_after(5) == epsilon_spent([Segment(1.0, 0.25, 5)], 1e-2)
    assert plan_mechanism(config, 40) is None
    assert plan_site_level(make_config(), 8) is None
    with pytest.raises(PrivacyError, match=r"site-level delta 0\.4 is not below one over the 8 sites"):
        plan_site_level(make_config(privacy={**SITE, "delta": 0.4}), 8)


def test_real_coordinator_takes_noise_from_the_system(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy=SITE)
    real, virtual = (site_level_of(config, 3, seeded=seeded) for seeded in (False, True))
    assert real is not None
    assert virtual is not None
    assert isinstance(real.randomness, SystemRandomness)
    assert virtual.randomness.repeatable
    assert site_level_of(make_config(), 3, seeded=True) is None


class StopAfterOne(Observer):
    """Interrupts a run after its first round."""

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """Stop."""
        raise KeyboardInterrupt


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_run_accounts_withholds_and_resumes_to_the_same_bits(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(privacy=SITE, federation={"rounds": 3, "sites_per_round": 2})
    summary = simulate(config, tmp_path / "whole")
    assert summary["epsilon"] == {}
    assert summary["site_level"]["epsilon"] == pytest.approx(epsilon_spent([Segment(1.0, 2 / 3, 3)], 1e-2))
    assert "Site-level" in summary["privacy_claim"]
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for outcome in record["sites"].values() if record["kind"] == "round" else ():
            assert outcome["update_norm"] is None
            assert outcome["train_loss"] is None
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfterOne())
    simulate(config, tmp_path / "cut", resume=True)
    whole, cut = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resume_with_another_number_of_sites_is_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=SITE, federation={"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=StopAfterOne())
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"sites": ["site 0", "site 1", "site 2"]', '"sites": ["site 0", "site 1"]'))
    with pytest.raises(RunError, match="3 sites are connected but site-level privacy was planned for 2"):
        simulate(config, tmp_path / "run", resume=True)


def test_round_without_sites_steps_on_noise_alone(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=SITE, federation={"rounds": 6, "sites_per_round": 1, "min_sites": 1})
    simulate(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    asked = [len(record["sites"]) for record in records if record["kind"] == "round"]
    assert len(asked) == 6
    assert 0 in asked


@pytest.mark.parametrize(("header", "goes_on"), [(b"junk", True), (None, False)])
def test_bad_site_that_is_drawn_alone_ends_no_run_and_an_outage_does(
    make_config: Callable[..., RunConfig], header: bytes | None, goes_on: bool
) -> None:
    config = make_config(privacy=SITE, federation={"rounds": 6, "sites_per_round": 1, "min_sites": 1})
    alone = {"one": Member(1, description("one"))}
    private = site_level_of(config, 3, seeded=True)
    current = Round(1, alone, ADAPTER, config, Admission.of(config), BASE, RUN, site_level=private)
    if header is not None:
        assert current.take("one", header, b"").status == "rejected"
    if goes_on:
        assert current.finish().keys() == ADAPTER.keys()
    else:
        with pytest.raises(RunError, match="0 usable updates"):
            current.finish()


def test_two_units_make_two_claims_that_are_not_added(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    both = {"unit": "example", "noise_multiplier": 1.0, "site_level": {"noise_multiplier": 2.0, "delta": 0.01}}
    config = make_config(privacy=both)
    summary = simulate(config, tmp_path / "run")
    assert set(summary["epsilon"]) == {"site 0", "site 1", "site 2"}
    assert summary["site_level"]["epsilon"] == pytest.approx(epsilon_spent([Segment(2.0, 1.0, 2)], 0.01))
    claim = privacy_claim(config, repeatable_noise=False)
    for words in ("Example-level", "Site-level", "do not add up", "trusts the coordinator", "needs trust in none"):
        assert words in claim
