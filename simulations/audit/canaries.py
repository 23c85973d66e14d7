"""Canaries: rows that nothing else resembles, put into one virtual site's training rows by the toss of a coin.

A canary is a text of random tokens of the vocabulary, with a random label (or, for a causal LM, a random completion
of a random prompt), in the format of the site's own rows. Such a row is learnt from nothing but itself: no other row
teaches it, so that what the adapter knows of it comes from its presence; its loss is high, so that its gradient is cut
to the clip norm, the most that one record may move; and it is nobody's data. Words, labels and coins come from three
streams of the audit's seed that share nothing with those of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.config.run import RunConfig
from common.data.examples import Example
from common.data.federated import FederatedData
from common.errors import ModelError
from common.randomness import numpy_generator

WORDS_PER_CANARY = 8
"""Tokens of a text, prompt or completion; few, so that no two canaries average out to the same features."""

TRAIN, TEST = "train.jsonl", "test.jsonl"
SITE, TEXT, LABEL, PERSON = "site", "text", "label", "person"
_DRAWS = 200


@dataclass(frozen=True)
class Canaries:
    """The canaries of an audit.

    Attributes:
        site: the site whose rows they join.
        examples: all m of them.
        included: [m] coins: whether each is in the site's training rows.
    """

    site: str
    examples: tuple[Example, ...]
    included: tuple[bool, ...]

    @property
    def inserted(self) -> tuple[Example, ...]:
        """Those that are in."""
        return tuple(row for row, is_in in zip(self.examples, self.included, strict=True) if is_in)


def make_canaries(count: int, config: RunConfig, rows: Sequence[Example], site: str, tokenizer: Any) -> Canaries:
    """Draw ``count`` canaries in the format of ``rows``, and their coins, from ``config.seed``.

    Args:
        count: m.
        config: the run config, for task, labels, length and seed.
        rows: the site's own rows; only whether they are chats is looked at.
        site: the site.
        tokenizer: whose vocabulary the words come from.

    Raises:
        ModelError: for a vocabulary without words.
    """
    words = numpy_generator(config.seed, "audit-words")
    labels = numpy_generator(config.seed, "audit-labels")
    length = max(1, min(WORDS_PER_CANARY, (config.data.max_length - 2) // 2))
    classes, chat = len(config.data.labels or ()), bool(rows and rows[0].messages)

    def text() -> str:
        return _random_text(tokenizer, length, words)

    examples = []
    for number in range(count):
        if classes:
            row = Example(text(), label=int(labels.integers(classes)))
        elif chat:
            row = Example("", messages=(("user", text()), ("assistant", text())))
        else:
            row = Example(text(), completion=text())
        examples.append(replace(row, site=site, person=f"canary {number}"))
    coins = numpy_generator(config.seed, "audit-coins").random(count) < 0.5
    return Canaries(site, tuple(examples), tuple(bool(coin) for coin in coins))


def _random_text(tokenizer: Any, length: int, words: np.random.Generator) -> str:
    special = set(tokenizer.all_special_ids)
    chosen: list[str] = []
    for _ in range(_DRAWS * length):
        token = int(words.integers(len(tokenizer)))
        word = "" if token in special else str(tokenizer.decode([token])).strip()
        if word.isalnum():
            chosen.append(word)
        if len(chosen) == length:
            return " ".join(chosen)
    raise ModelError("the tokenizer has hardly any words of letters or digits; expected a vocabulary to draw from.")


def audited_config(config: RunConfig, data: FederatedData, site: str, canaries: int, folder: Path) -> RunConfig:
    """Return the config of the audited run: that of the run, on the rows which :func:`write_rows` puts into ``folder``.

    The site is a column of those files, so that the run needs nothing but this config. Noise is planned for the rows
    that are there, canaries included. Where the sample rate would follow from their number, it is fixed at what follows
    from the expected number, so that steps, rate and noise do not depend on the coins.

    Args:
        config: of the run to be audited.
        data: its rows by site.
        site: the site that gets the canaries.
        canaries: m, of whom half are expected to be in.
        folder: where the files will be.
    """
    values = config.model_dump()
    values["data"] |= {
        "train": str(folder / TRAIN),
        "test": str(folder / TEST) if data.test else None,
        "test_fraction": 0.0,
        "revision": None,
        "text_field": TEXT,
        "label_field": LABEL,
        "max_rows_per_site": None,
        "max_test_rows": None,
        "partition": {"kind": "column", "column": SITE},
    }
    if config.data.person_field is not None:
        values["data"]["person_field"] = PERSON
    if config.privacy.is_local and config.privacy.sample_rate is None:
        own = {row.person for row in data.train[site]} if config.privacy.unit == "user" else data.train[site]
        values["privacy"]["sample_rate"] = min(1.0, config.training.batch_size / (len(own) + canaries / 2))
    return RunConfig.model_validate(values)


def write_rows(data: FederatedData, canaries: Canaries, config: RunConfig, folder: Path) -> None:
    """Write the rows of every site as JSONL, those canaries among them that are in.

    Args:
        data: rows by site.
        canaries: all canaries.
        config: the run config, for its labels.
        folder: an existing folder; gets ``train.jsonl`` and, where there are test rows, ``test.jsonl``.
    """
    train = {**data.train, canaries.site: (*data.train[canaries.site], *canaries.inserted)}
    _write(folder / TRAIN, train, config)
    if data.test:
        _write(folder / TEST, data.test, config)


def _write(path: Path, sites: Mapping[str, Iterable[Example]], config: RunConfig) -> None:
    labels = config.data.labels
    with path.open("w", encoding="utf-8") as file:
        for site, rows in sites.items():
            for row in rows:
                fields: dict[str, Any] = {SITE: site}
                if labels is not None:
                    fields |= {TEXT: row.prompt, LABEL: labels[row.label]}
                elif row.messages:
                    fields["messages"] = [{"role": role, "content": content} for role, content in row.messages]
                else:
                    fields |= {"prompt": row.prompt, "completion": row.completion}
                if row.person is not None:
                    fields[PERSON] = row.person
                file.write(json.dumps(fields) + "\n")
