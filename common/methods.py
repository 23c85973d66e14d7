"""What each aggregation method asks of a site: what it trains, sends, receives and keeps, round by round.

How the coordinator combines updates is in ``server/aggregation``. A tensor that is not on the wire has the value that
every process derives from the run's seed; what a site keeps to itself (``personal``) never leaves it.

==========  ===============================  ======================  ====================  ======================
method      trains                           sends                   receives              at the coordinator
==========  ===============================  ======================  ====================  ======================
fedit       A and B                          A and B                 A and B               Σ w A, Σ w B
ffa_lora    B                                B                       B                     Σ w B
rolora      B in odd rounds, A in even ones  what it trained         A and B               Σ w of it
fedsa_lora  A and B, B kept at the site      A                       A                     Σ w A
flora       A and B, afresh every round      A and B                 the correction        correction += Σ w BA
flexlora    A and B                          A and B                 A and B               SVD_r(Σ w BA)
hetlora     A and B                          A and B                 A and B               Σ p A, Σ p B, p ~ w ‖BA‖
fedex_lora  A and B                          A and B                 both, and correction  as fedit; correction +=
                                                                                           Σ w BA - B̄Ā
lora_fair   A and B                          A and B                 A and B               Σ w A, Σ w B + ΔB
fedsvd      B                                B                       A and B               SVD of (Σ w B) A
fed_sb      R of BRA                         R                       R                     Σ w R
==========  ===============================  ======================  ====================  ======================

Everything else that is trained, the classification head as a rule, is trained, sent, averaged and received by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.factor_names import A, B, R, is_factor, is_fixed

if TYPE_CHECKING:
    from torch import Tensor

    from common.config.run import RunConfig
    from common.tensors import Tensors

Rule = Callable[[str, int], bool]
"""Whether a tensor, by name, is meant in a round."""

LAST = 10**9
"""A round so late that whatever a method changes has been changed."""


def is_head(name: str) -> bool:
    """Whether a parameter, by its saved name, is of the classification head and not of a factor or prompt."""
    return not is_factor(name) and "prompt_embeddings" not in name


def _all(name: str, number: int) -> bool:
    return not name.endswith(R)


def _not_a(name: str, number: int) -> bool:
    return not name.endswith(A)


def _not_b(name: str, number: int) -> bool:
    return not name.endswith(B)


def _no_factors(name: str, number: int) -> bool:
    return not is_factor(name)


def _alternating(name: str, number: int) -> bool:
    return not name.endswith(A if number % 2 else B)


def _a_from_round(first: int) -> Rule:
    """All, but A only from a round on: before, it stands at its initial value."""
    return lambda name, number: number >= first or not name.endswith(A)


def _core(name: str, number: int) -> bool:
    return not name.endswith((A, B))


@dataclass(frozen=True)
class Method:
    """The site's side of an aggregation method.

    Attributes:
        trains: what a site trains.
        sends: what of it is in the update.
        receives: what is in the request, besides a correction; what is in neither has its initial value.
        mixed_ranks: whether sites may have factors of different rank.
        linear: whether the aggregate is a weighted sum of updates: it streams, and suits site-level privacy.
        optimizable: whether a server optimizer may act on the aggregated update.
        corrects: whether a correction to the base is kept and sent.
        fresh: whether factors start afresh every round.
        core: whether a core R stands between the factors, which are fixed.
    """

    trains: Rule
    sends: Rule
    receives: Rule
    mixed_ranks: bool = False
    linear: bool = False
    optimizable: bool = False
    corrects: bool = False
    fresh: bool = False
    core: bool = False

    @property
    def personal(self) -> bool:
        """Whether a site keeps factors that it trains to itself."""
        return any(self.trains(name, 1) and not self.sends(name, 1) for name in (f"layer{A}", f"layer{B}"))


METHODS: dict[str, Method] = {
    "fedit": Method(_all, _all, _all, linear=True, optimizable=True),
    "ffa_lora": Method(_not_a, _not_a, _not_a, linear=True, optimizable=True),
    "rolora": Method(_alternating, _alternating, _a_from_round(3), linear=True),
    "fedsa_lora": Method(_all, _not_b, _not_b, linear=True, optimizable=True),
    "flora": Method(_all, _all, _no_factors, mixed_ranks=True, corrects=True, fresh=True),
    "flexlora": Method(_all, _all, _all, mixed_ranks=True),
    "hetlora": Method(_all, _all, _all, mixed_ranks=True),
    "fedex_lora": Method(_all, _all, _all, corrects=True),
    "lora_fair": Method(_all, _all, _all),
    "fedsvd": Method(_not_a, _not_a, _a_from_round(2), linear=True),
    "fed_sb": Method(_core, _core, _core, linear=True, optimizable=True, core=True),
}


def method_of(config: RunConfig) -> Method:
    """Return the method of a run."""
    return METHODS[config.aggregation.method]


def trained_names(config: RunConfig, names: Iterable[str], number: int = 1) -> frozenset[str]:
    """Return the names that a site trains in a round, for the run's method and kind of adapter."""
    return _named(config, names, method_of(config).trains, number)


def sent_names(config: RunConfig, names: Iterable[str], number: int = 1) -> frozenset[str]:
    """Return the names that are in a site's update."""
    return _named(config, names, method_of(config).sends, number)


def received_names(config: RunConfig, names: Iterable[str], number: int = 1) -> frozenset[str]:
    """Return the names that a site is sent at the start of a round, besides a correction."""
    return _named(config, names, method_of(config).receives, number)


def kept_names(config: RunConfig, names: Iterable[str]) -> frozenset[str]:
    """Return the names whose values the coordinator keeps from round to round, besides a correction."""
    return _named(config, names, method_of(config).receives, LAST)


def kept_tensors(config: RunConfig, adapter: Mapping[str, Tensor]) -> Tensors:
    """Return what the coordinator keeps of a whole adapter from round to round, a correction included."""
    fixed = {name for name in adapter if is_fixed(name)}
    return {name: adapter[name] for name in sorted(kept_names(config, adapter.keys() - fixed) | fixed)}


def personal_names(config: RunConfig, names: Iterable[str]) -> frozenset[str]:
    """Return the names that a site trains and keeps to itself."""
    known = frozenset(names)
    rounds = (1, 2)
    trained = frozenset[str]().union(*(trained_names(config, known, number) for number in rounds))
    sent = frozenset[str]().union(*(sent_names(config, known, number) for number in rounds))
    return trained - sent


def expect_rank(config: RunConfig, max_rank: int | None, site: str) -> int:
    """Return the rank of a site's factors.

    Args:
        config: the run config.
        max_rank: the largest that the site can hold; None for any.
        site: name of the site, for the error.

    Raises:
        ConfigError: if the site cannot hold the run's rank and the method needs all sites at one.
    """
    rank = config.adapter.rank
    if max_rank is None or max_rank >= rank or config.adapter.kind != "lora":
        return rank
    if not method_of(config).mixed_ranks:
        able = ", ".join(name for name, method in METHODS.items() if method.mixed_ranks)
        raise ConfigError(
            f"site {site!r} holds factors up to rank {max_rank} but the run has {rank}, and "
            f"{config.aggregation.method} needs one rank; expected at most {max_rank}, or a method "
            f"for mixed ranks ({able})."
        )
    return max_rank


def _named(config: RunConfig, names: Iterable[str], rule: Rule, number: int) -> frozenset[str]:
    if config.adapter.kind == "head_only":
        return frozenset(name for name in names if is_head(name))
    return frozenset(name for name in names if rule(name, number))
