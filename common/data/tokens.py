"""The data of a simulated federation as tokens: every virtual site's rows without a text in memory.

Files are read and tokenised row by row into a :class:`~common.data.token_table.TokenTable`, which does not depend on
the partition or the seed: the deal is numbers of rows. With a cache folder a table is made once and then mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from common.config.data import DataConfig
from common.data.dealing import ColumnsBuilder, Dealt, deal
from common.data.examples import Example
from common.data.readers import iterate_examples
from common.data.token_cache import TokenCache, TokenWriter, table_of, write_manifest
from common.data.token_table import TokenRows, TokenTable
from common.models.base import load_tokenizer
from common.sources import is_hub, local_path
from common.tasks.catalog import TASKS

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 512
"""Rows that are text at any time while a table is made."""

_SHAPING = ("task", "labels", "text_field", "label_field", "person_field", "prompt_template", "max_length", "revision")
"""Keys of the data section that shape tokens and columns; the site column does where rows are dealt by it."""

_CODE = ("common/tasks", "common/data/examples.py", "common/data/readers.py", "common/data/tokens.py")
"""What rows become tokens by: another version of it makes another fingerprint."""


class SiteTokens(Mapping[str, TokenRows]):
    """Rows of each site, one object a site for as long as anybody holds it; sites in the order of their names."""

    def __init__(self, table: TokenTable, dealt: Dealt) -> None:
        self._table, self._dealt = table, dealt
        self._held: WeakValueDictionary[str, TokenRows] = WeakValueDictionary()

    def __getitem__(self, site: str) -> TokenRows:
        return self._held.setdefault(site, TokenRows(self._table, self._dealt[site]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._dealt)

    def __len__(self) -> int:
        return len(self._dealt)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return self._dealt.names

    @cached_property
    def tokens_before(self) -> dict[str, int]:
        """By site, the tokens of all sites before it; the same in every process, whichever sites that one has seen."""
        rows, offsets = self._dealt.rows, self._table.offsets
        ends = np.concatenate([[0], np.cumsum(offsets[rows + 1] - offsets[rows])])
        return dict(zip(self.names, ends[self._dealt.bounds[:-1]].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class FederatedTokens:
    """Rows by site, as :class:`common.data.federated.FederatedData` has them, tokenised.

    Attributes:
        train: training rows of each site.
        test: test rows of each site.
        shared_with_test: number of test rows that also stand in a training part, word for word.
    """

    train: SiteTokens
    test: SiteTokens
    shared_with_test: int

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that train, sorted."""
        return self.train.names


@lru_cache(maxsize=2)
def load_federated_tokens(data: DataConfig, seed: int, model: Path, cache_folder: Path | None) -> FederatedTokens:
    """Deal a simulation's rows to its sites, as tokens.

    Args:
        data: the config section.
        seed: of the run.
        model: folder of the base model, whose tokenizer is used.
        cache_folder: where token tables are kept; None keeps them in memory.

    Raises:
        DataError: as the readers and the deal do.
    """
    train = token_table(data.train, data, "data.train", model, cache_folder)
    test = None if data.test is None else token_table(data.test, data, "data.test", model, cache_folder)
    sources = {"train": data.train, "test": data.test or ""}
    dealt = deal(
        train.columns, None if test is None else test.columns, data, seed,
        lambda part: [example.text for example in iterate_examples(sources[part], data, f"data.{part}")],
    )  # fmt: skip
    return FederatedTokens(
        SiteTokens(train, dealt.train), SiteTokens(train if test is None else test, dealt.test), dealt.shared_with_test
    )


def token_table(source: str, data: DataConfig, key: str, model: Path, cache_folder: Path | None) -> TokenTable:
    """Return the token table of a source: from the cache, or made and put there.

    A cache that cannot be used is said in a warning; the table is then kept in memory.
    """
    fingerprint = table_fingerprint(source, data, key, model) if cache_folder is not None else None
    if fingerprint is None or cache_folder is None:
        return _made(source, data, key, model, None)
    kept = TokenCache(cache_folder)
    try:
        found = kept.find(fingerprint)
        if found is not None:
            return found
        with kept.writing(fingerprint) as folder:
            made = _made(source, data, key, model, folder)
        return kept.find(fingerprint) or made
    except OSError as error:
        logger.warning(
            "token cache %s cannot be used (%s); expected a writable folder. Tokens stay in memory; set FEDTUNE_CACHE.",
            cache_folder, error.strerror or type(error).__name__,
        )  # fmt: skip
        return _made(source, data, key, model, None)


def _made(source: str, data: DataConfig, key: str, model: Path, folder: Path | None) -> TokenTable:
    tokenizer, task = load_tokenizer(model), TASKS[data.task]
    writer, columns = TokenWriter(folder), ColumnsBuilder()
    end, tokenwise = 0, False
    writer.append("offsets", np.zeros(1))
    examples = iterate_examples(source, data, key)
    while chunk := list(islice(examples, ROWS_AT_ONCE)):
        rows = task.tokenise(chunk, tokenizer, data)
        ends = end + np.cumsum([len(row) for row in rows])
        writer.append("input_ids", np.concatenate([row.input_ids.numpy() for row in rows]))
        writer.append("targets", np.concatenate([np.atleast_1d(row.targets.numpy()) for row in rows]))
        writer.append("offsets", ends)
        end, tokenwise = int(ends[-1]), rows[0].targets.dim() == 1
        _take(columns, chunk)
    known = columns.columns()
    for name in ("labels", "sites", "persons", "digests"):
        writer.append(name, getattr(known, name))
    arrays = writer.finish()
    if folder is not None:
        write_manifest(folder, known.site_names, tokenwise=tokenwise)
    return table_of(arrays, known.site_names, tokenwise=tokenwise)


def _take(columns: ColumnsBuilder, examples: list[Example]) -> None:
    for example in examples:
        columns.add(example)


def table_fingerprint(source: str, data: DataConfig, key: str, model: Path) -> str | None:
    """Return the SHA-256 of all that shapes a table: contents, config keys, tokenizer files, our code, libraries.

    None for a hub data set without a pinned revision, whose contents no name stands for.
    """
    if is_hub(source):
        if data.revision is None:
            return None
        content = source
    else:
        path = local_path(source, key)
        if not path.is_file():
            return None
        content = path.suffix.lower() + _file_digest(path)
    shaping = {name: value for name, value in data.model_dump(mode="json").items() if name in _SHAPING}
    if data.partition.kind == "column":
        shaping["column"] = data.partition.column
    parts = {
        "content": content,
        "keys": shaping,
        "tokenizer": {path.name: _file_digest(path) for path in _tokenizer_files(model)},
        "code": _code_digest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "numpy")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_files(model: Path) -> list[Path]:
    """All files of a model folder but its weights."""
    return sorted(p for p in model.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".model", ".jinja"))


@cache
def _code_digest() -> str:
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for place in _CODE:
        path = root / place
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
