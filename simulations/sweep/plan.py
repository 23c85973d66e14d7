"""The plan of a sweep: a YAML file, or a run config and ranges on the command line.

::

    config: quickstart.yaml
    search:
      training.lr: log:1..100
      aggregation.method: choice:fedit,ffa_lora
    set: [federation.rounds=2]
    sampler: tpe
    trials: 20
    objective: {metric: 1, worst_site: 0.5, megabyte: 0.001}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.load import load_run_config, read_config_text, validate_section
from common.config.run import RunConfig
from common.config.section import Section
from common.config.yaml_text import parse_yaml
from common.errors import ConfigError
from simulations.study.curves import Point
from simulations.sweep.space import Dimension, Value, as_overrides, parse_dimension, parse_space

NO_EPSILON = "objective.epsilon weighs ε, which a trial without privacy does not have; expected a DP run."

Weight = Annotated[float, Field(ge=0, le=1e9)]


class ObjectiveConfig(Section):
    """What a trial is worth: a weighted sum; larger is better. The metric is accuracy, or minus the loss in nats."""

    metric: Weight = 1.0
    """Weight of the metric over all rows."""
    worst_site: Weight = 0.0
    """Weight of the metric of the site where it is worst."""
    megabyte: Weight = 0.0
    """Taken off for each MB (1e6 bytes), up and down, all sites."""
    epsilon: Weight = 0.0
    """Taken off for each unit of ε spent, the most at any site."""

    @model_validator(mode="after")
    def _weighs_something(self) -> ObjectiveConfig:
        if self.metric == 0 and self.worst_site == 0:
            raise ValueError("objective weighs neither metric nor worst_site; expected one of them above 0")
        return self

    def score(self, point: Point, headline: str) -> float:
        """Return what an evaluation is worth.

        Raises:
            ConfigError: where ε is weighed but nothing bounds it.
        """
        if self.epsilon > 0 and point.epsilon is None:
            raise ConfigError(NO_EPSILON)
        score = self.metric * _worth(point.headline, headline) - self.megabyte * point.megabytes
        if self.worst_site > 0:
            score += self.worst_site * _worth(point.headline if point.worst is None else point.worst, headline)
        return score - (self.epsilon * point.epsilon if point.epsilon is not None else 0.0)


class SweepPlan(Section):
    """One sweep."""

    config: Annotated[str, Field(min_length=1)]
    """Run config that is varied; relative to this file."""
    search: dict[str, str]
    """Ranges and choices by dotted key of the run config."""
    set: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Overrides for all trials, as section.key=value."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe learns from the trials so far (Bergstra et al. 2011); random does not; grid takes every combination."""
    trials: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Trials in all, over all starts of the sweep."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Runs of a trial, with seeds from 0; it is worth their mean."""
    prune: bool = True
    """Stop a trial after a round where it is below the median of the others at that round."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of each site's training rows that trials are judged on, in place of the test part, which then has not been
    looked at; 0 judges on the test part."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is best."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the sampler."""

    def base(self) -> RunConfig:
        """Return the run config that is varied, with its test part."""
        return load_run_config(Path(self.config), self.set)

    def dimensions(self) -> list[Dimension]:
        """Return what is searched."""
        return parse_space(self.search)

    def chosen(self, params: dict[str, Value]) -> RunConfig:
        """Return the run config with a trial's parameters, with its test part."""
        return load_run_config(Path(self.config), [*self.set, *as_overrides(params)])

    def trial_config(self, params: dict[str, Value]) -> RunConfig:
        """Return the run config of a trial, judged on held-out training rows where there is a test part to keep."""
        config = self.chosen(params)
        if self.validation == 0 or config.data.test is None:
            return config
        data = config.data.model_copy(update={"test": None, "test_fraction": self.validation, "max_test_rows": None})
        return config.model_copy(update={"data": data})

    def first_config(self) -> RunConfig:
        """Return the run config of a trial with the first value of everything searched, which is always valid."""
        return self.trial_config({dimension.key: _first(dimension) for dimension in self.dimensions()})


def load_plan(path: Path, settings: Sequence[str], given: dict[str, Any]) -> SweepPlan:
    """Read a sweep plan, or make one of a run config.

    Args:
        path: a sweep plan (it has a key ``search``) or a run config.
        settings: ``section.key=value`` strings; a value that is a range or a choice is searched, others are set.
        given: keys of the plan that the command line sets.

    Raises:
        ConfigError: for what cannot be read, or a plan of nothing.
    """
    document = parse_yaml(read_config_text(path, "a run config or a sweep plan"), str(path))
    if "search" in document.values:
        source = document.values.get("config")
        if isinstance(source, str):
            document.values["config"] = str((path.parent / source).resolve())
    else:
        document.values = {"config": str(path.resolve()), "search": {}}
    plan = validate_section(SweepPlan, document)
    search, fixed = dict(plan.search), list(plan.set)
    for setting in settings:
        key, equals, text = setting.partition("=")
        dimension = parse_dimension(key.strip(), text.strip()) if equals else None
        if dimension is None:
            fixed.append(setting)
            search.pop(key.strip(), None)
        else:
            search[dimension.key] = dimension.text
    changed = plan.model_dump() | given | {"search": search, "set": tuple(fixed)}
    try:
        plan = SweepPlan.model_validate(changed)
    except ValueError as error:
        raise ConfigError(f"the sweep is not valid ({str(error).splitlines()[-2].strip()}); expected a plan.") from None
    _expect_sound(plan)
    return plan


def _expect_sound(plan: SweepPlan) -> None:
    for key in ("seed", "data.test", "data.test_fraction", "evaluation.enabled"):
        if key in plan.search:
            raise ConfigError(f"{key} is searched; expected settings, not what they are judged on. Remove it.")
    config = plan.first_config()
    if not config.evaluation.enabled or (config.data.test is None and config.data.test_fraction == 0):
        raise ConfigError("trials are never evaluated; expected evaluation.enabled and a test part or validation.")
    if plan.objective.epsilon > 0 and config.privacy.unit == "none":
        raise ConfigError(NO_EPSILON)
    if plan.sampler == "grid":
        for dimension in plan.dimensions():
            dimension.values()


def _first(dimension: Dimension) -> Value:
    if hasattr(dimension.distribution, "choices"):
        return str(dimension.distribution.choices[0])
    low: float | int = dimension.distribution.low  # type: ignore[attr-defined]
    return low


def _worth(value: float, headline: str) -> float:
    return value if headline == "accuracy" else -math.log(value)
