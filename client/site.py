"""One site: its name, its tokenised rows and its randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from client.agreement import agreed_config
from client.ledger.dataset import identify
from client.ledger.ledger import Ledger
from client.ledger.site_ledger import SiteLedger
from client.personal import STATE, PersonalStore
from client.policy.section import Policy
from client.refusals import own_rows
from client.site_config import SiteConfig
from client.state import SiteStates
from common.config.run import RunConfig
from common.data.batches import TokenRow
from common.data.examples import Example, example_from_row
from common.data.readers import read_rows
from common.data.token_table import lengths_of
from common.data.tokens import FederatedTokens, load_federated_tokens
from common.errors import ConfigError, DataError
from common.models.adapter import AdaptedModel
from common.randomness import KeyedRandomness, PrivateRandomness, SystemRandomness
from common.tasks.catalog import TASKS

TOKEN_CACHE = "token-cache"  # noqa: S105 - tokens of text
"""Key of a simulated node's config: the folder of the simulation's token tables."""

SITES_HELD = 1024
"""Virtual sites whose row lengths (and head-only features) stay in memory, so that this does not grow with their
number."""


@dataclass(frozen=True, eq=False)
class Site:
    """A data holder.

    Attributes:
        name: unique in the federation.
        rows: training rows, tokenised once; of a virtual site read from a table when they are asked for.
        lengths: tokens of each row.
        randomness: where noise and sampling come from.
        persons: the person of each row, numbered from 0; None where rows name no person.
        ledger: what was spent and what may be; None for a virtual site, which protects nothing real.
        max_rank: the largest rank of factors it can hold; None for any.
        personal: where it keeps what it never sends; None where it has no place for it.
        policy: its own rules; None for a virtual site.
        tokens_before: tokens of the virtual sites that stand before it in order of name; 0 for a real site.
    """

    name: str
    rows: Sequence[TokenRow]
    lengths: tuple[int, ...]
    randomness: PrivateRandomness
    persons: tuple[int, ...] | None = None
    ledger: SiteLedger | None = None
    max_rank: int | None = None
    personal: PersonalStore | None = None
    policy: Policy | None = None
    tokens_before: int = 0

    def num_units(self, unit: str) -> int:
        """Return the number of what a privacy unit protects here: persons for "user", else rows."""
        return len(self._rows_by_person) if unit == "user" else len(self.rows)

    def rows_of_persons(self, persons: Sequence[int]) -> list[int]:
        """Return the rows of some persons."""
        return [row for person in persons for row in self._rows_by_person[person]]

    @cached_property
    def _rows_by_person(self) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in set(self.persons or ())]
        for row, person in enumerate(self.persons or ()):
            rows[person].append(row)
        return rows


def virtual_site(config: RunConfig, node_config: Mapping[str, object], model: AdaptedModel) -> Site:
    """Return the virtual site that a simulated node stands for.

    Args:
        config: the run config, whose data section describes all virtual sites.
        node_config: Flower's node config, with ``partition-id`` and ``num-partitions``; ``token-cache`` may name the
            folder where a simulation keeps tokens, ``site-state`` the file where virtual sites keep what is theirs.
        model: the resident model, for its tokenizer.

    Raises:
        ConfigError: for a node that is no simulated one, or for more or fewer nodes than sites.
    """
    number, count = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(number, int) or not isinstance(count, int):
        raise ConfigError(
            "this node has no partition-id, so it is not simulated; expected Flower's simulation or fedtune-sim."
        )
    cache = node_config.get(TOKEN_CACHE)
    tokens = load_federated_tokens(
        config.data, config.seed, model.base.folder, Path(cache) if isinstance(cache, str) else None
    )
    sites = tokens.sites
    if count != len(sites) or not 0 <= number < count:
        raise ConfigError(
            f"the simulation has {count} nodes but the data has {len(sites)} sites; expected as many. "
            f"Set the number of supernodes to {len(sites)}."
        )
    state = node_config.get(STATE)
    return _virtual(config, sites[number], tokens, state if isinstance(state, str) else None)


@dataclass(frozen=True)
class SiteRows:
    """A real site's rows before they are tokenised.

    Attributes:
        examples: one a row of the site's file.
        persons: the person of each, numbered from 0; None where rows name no person.
        ledger: the site's ledger, for these rows.
    """

    examples: tuple[Example, ...]
    persons: tuple[int, ...] | None
    ledger: SiteLedger

    def num_units(self, unit: str) -> int:
        """Return the number of what a privacy unit protects here: persons for "user", else rows."""
        return len(set(self.persons or ())) if unit == "user" else len(self.examples)


def read_site_rows(config: RunConfig, site_config: SiteConfig) -> SiteRows:
    """Read a real site's own file for a run that asks for rows as the site config has them.

    All rows of the file are trained on: partition, test part and row limits of the run config describe simulated sites.

    Raises:
        PrivacyError: if the run asks for rows of another kind; then none was read.
        DataError: naming file and line: for the site's own eyes, see :func:`real_site`.
    """
    return _read(agreed_config(config, site_config), site_config)


def real_site(config: RunConfig, site_config: SiteConfig, model: AdaptedModel) -> Site:
    """Return a real site: rows of its own file, randomness of the operating system, and its ledger.

    Args:
        config: the run config.
        site_config: the site's own, which says what a row is.
        model: the resident model, for its tokenizer.

    Raises:
        PrivacyError: if the run asks for rows of another kind; then none was read.
        SiteDataError: whatever is wrong with the rows.
    """
    agreed = agreed_config(config, site_config)
    with own_rows():
        read = _read(agreed, site_config)
        rows = TASKS[agreed.data.task].tokenise(read.examples, model.base.tokenizer, agreed.data)
    personal = PersonalStore(SiteStates(Path(site_config.ledger + "-personal")), site_config.name)
    return Site(
        site_config.name, tuple(rows), lengths_of(rows), SystemRandomness(), read.persons, read.ledger,
        site_config.max_rank, personal, site_config.policy,
    )  # fmt: skip


def _read(agreed: RunConfig, site_config: SiteConfig) -> SiteRows:
    name = Path(site_config.data).name
    rows = list(read_rows(site_config.data, agreed.data, "data"))
    examples = tuple(example_from_row(row, agreed.data, f"{name} line {number}") for number, row in rows)
    if not examples:
        raise DataError(f"data: {site_config.data} has no rows; expected at least one. Check the file.")
    dataset = identify(site_config.data, (row for _, row in rows), examples)
    ledger = SiteLedger(Ledger(Path(site_config.ledger)), dataset, site_config.budget)
    return SiteRows(examples, _persons(examples), ledger)


def forget_virtual_sites() -> None:
    """Forget the virtual sites that this process holds, and what was computed of them."""
    _virtual.cache_clear()
    load_federated_tokens.cache_clear()


@lru_cache(maxsize=SITES_HELD)
def _virtual(config: RunConfig, name: str, tokens: FederatedTokens, state: str | None) -> Site:
    rows = tokens.train[name]
    ranks = config.federation.virtual_ranks
    max_rank = ranks[tokens.sites.index(name) % len(ranks)] if ranks else None
    personal = None if state is None else PersonalStore.of_virtual_site(Path(state), name)
    randomness = KeyedRandomness(config.seed, name)
    return Site(
        name, rows, rows.lengths, randomness, rows.persons, max_rank=max_rank, personal=personal,
        tokens_before=tokens.train.tokens_before[name],
    )  # fmt: skip


def _persons(examples: Sequence[Example]) -> tuple[int, ...] | None:
    """Number the persons in order of their first row; None where rows name no person."""
    if any(example.person is None for example in examples):
        return None
    numbers: dict[str | None, int] = {}
    return tuple(numbers.setdefault(example.person, len(numbers)) for example in examples)
