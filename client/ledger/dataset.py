"""What identifies a site's rows: a fingerprint of all of them, and handles of every record and person.

A dataset with one row changed has another fingerprint, yet the same people. So every row also has *handles*, and two
datasets that have a handle in common are taken to hold the same record:

- ``row``: all fields of the row as the file gives them. It depends on nothing in any config, so that a site that
  corrects its own ``rows`` or ``person_field`` meets the same records.
- ``text``: the text that is learnt from, without label, case, spacing or form of Unicode. It survives a corrected
  label, a new column, or JSONL instead of CSV.
- ``person``: whom the row is of, where the site config says which field names them. It survives any edit of the row
  but one of that field.

A handle in common by chance (two people who wrote the same words) counts too much, never too little. A row whose text
was edited, of a site that names no persons, is a new record to the ledger: nothing in the file says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.examples import Example


@dataclass(frozen=True)
class Dataset:
    """A site's training rows, as the ledger knows them.

    Attributes:
        source: where they were read from.
        fingerprint: SHA-256 over the rows, whatever their order.
        num_rows: how many there are.
        num_persons: how many persons they are of; None where a row names none.
        handles: SHA-256 digests of what identifies each record and person.
    """

    source: str
    fingerprint: str
    num_rows: int
    num_persons: int | None
    handles: frozenset[bytes]


def identify(source: str, rows: Iterable[Mapping[str, Any]], examples: Sequence[Example]) -> Dataset:
    """Return the dataset of rows.

    Args:
        source: where they were read from.
        rows: the fields of every row, as the file gives them.
        examples: what was made of each row, in the same order.
    """
    digests, handles = [], set()
    for row, example in zip(rows, examples, strict=True):
        whole = _digest("row", {name: row[name] for name in row})
        digests.append(whole)
        handles |= {whole, _digest("text", _words(example))}
        if example.person is not None:
            handles.add(_digest("person", example.person))
    fingerprint = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    persons = {example.person for example in examples}
    return Dataset(source, fingerprint, len(digests), None if None in persons else len(persons), frozenset(handles))


def _words(example: Example) -> list[str]:
    texts = [example.prompt, example.completion, *(content for _, content in example.messages)]
    return [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]


def _digest(kind: str, value: object) -> bytes:
    text = json.dumps([kind, value], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()
