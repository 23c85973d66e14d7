"""What a sweep searches: keys of a run config as ranges or choices.

==========================  =====================================================================
written                     searched
==========================  =====================================================================
``1e-4..1e-1``              numbers between both, ends included
``4..64``                   whole numbers, since both ends are
``0.1..0.9/0.1``            in steps
``log:1e-4..1e-1``          evenly in the logarithm
``choice:fedit,ffa_lora``   one of the values, each read as YAML; ``|`` parts those that hold commas
==========================  =====================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from common.config.yaml_text import parse_value
from common.errors import ConfigError

Value = float | int | str
_RANGE = re.compile(r"^(?P<log>log:)?(?P<low>[^\s]+?)\.\.(?P<high>[^\s/]+)(?:/(?P<step>[^\s/]+))?$")


@dataclass(frozen=True)
class Dimension:
    """One key that is searched.

    Attributes:
        key: dotted key of the run config.
        text: as it was written.
        distribution: Optuna's.
    """

    key: str
    text: str
    distribution: BaseDistribution

    @property
    def log(self) -> bool:
        """Whether it is searched in the logarithm."""
        return bool(getattr(self.distribution, "log", False))

    def values(self) -> list[Value]:
        """Return all values, for a grid.

        Raises:
            ConfigError: for a range without steps.
        """
        match self.distribution:
            case CategoricalDistribution():
                return [str(value) for value in self.distribution.choices]
            case IntDistribution(log=False):
                return list(range(self.distribution.low, self.distribution.high + 1, self.distribution.step))
            case FloatDistribution(step=float() as step):
                count = math.floor((self.distribution.high - self.distribution.low) / step + 1e-9)
                return [self.distribution.low + index * step for index in range(count + 1)]
            case _:
                raise ConfigError(
                    f"{self.key}={self.text} has no end of values; expected steps or a choice for sampler grid. Write "
                    "LOW..HIGH/STEP or choice:A,B,C."
                )


def parse_dimension(key: str, text: str) -> Dimension | None:
    """Read a range or a choice; None for a text that is a plain value.

    Args:
        key: dotted key of the run config.
        text: see the module's table.

    Raises:
        ConfigError: for a range or choice that is none.
    """
    if text.startswith("choice:"):
        return Dimension(key, text, CategoricalDistribution(_choices(key, text)))
    found = _RANGE.match(text)
    if found is None:
        if text.startswith("log:"):
            raise _refused(key, text, "log:LOW..HIGH")
        return None
    parts = {name: parse_value(part) for name, part in found.groupdict().items() if part is not None and name != "log"}
    if any(isinstance(part, bool) or not isinstance(part, int | float) for part in parts.values()):
        if found["log"]:
            raise _refused(key, text, "numbers around '..'")
        return None
    low, high, step, log = parts["low"], parts["high"], parts.get("step"), found["log"] is not None
    if not low < high or (log and low <= 0) or (step is not None and (step <= 0 or step > high - low)):
        raise _refused(key, text, "LOW below HIGH, both above 0 for log, and a step that fits")
    if log and step is not None:
        raise _refused(key, text, "no step beside log")
    if all(isinstance(part, int) for part in parts.values()):
        return Dimension(key, text, IntDistribution(low, high, log=log, step=1 if step is None else step))
    return Dimension(key, text, FloatDistribution(float(low), float(high), log=log, step=step))


def parse_space(search: Mapping[str, str]) -> list[Dimension]:
    """Read all dimensions of a sweep.

    Raises:
        ConfigError: for none, or a text that is no range or choice.
    """
    dimensions = []
    for key, text in search.items():
        dimension = parse_dimension(key, text)
        if dimension is None:
            raise _refused(key, text, "a range or a choice (LOW..HIGH, log:LOW..HIGH, choice:A,B)")
        dimensions.append(dimension)
    if not dimensions:
        raise ConfigError("nothing is searched; expected a range or a choice. Add --set training.lr=log:1e-4..1e-1.")
    return dimensions


def grid_points(dimensions: list[Dimension]) -> list[dict[str, Value]]:
    """Return every combination of the dimensions' values."""
    keys = [dimension.key for dimension in dimensions]
    return [dict(zip(keys, point, strict=True)) for point in product(*(d.values() for d in dimensions))]


def as_overrides(params: Mapping[str, Value]) -> list[str]:
    """Return the parameters of a trial as ``section.key=value``."""
    return [f"{key}={value}" for key, value in params.items()]


def _choices(key: str, text: str) -> list[str]:
    inside = text.removeprefix("choice:")
    values = [value.strip() for value in inside.split("|" if "|" in inside else ",")]
    if len(values) < 2 or not all(values) or len(set(values)) < len(values):
        raise _refused(key, text, "two or more different values: choice:A,B")
    return values


def _refused(key: str, text: str, rule: str) -> ConfigError:
    return ConfigError(f"--set {key}={text} cannot be searched; expected {rule}. Correct it.")
