"""The folder of a run and the files in it.

::

    config.yaml     the resolved run config
    metrics.jsonl   one record a line: starts, rounds, evaluations; everything shown to people is drawn from it
    checkpoint/     the newest complete round, from which --resume goes on
    adapter/        the trained adapter as a PEFT folder
    summary.json    the closing figures
    MODEL_CARD.md   what the adapter is and what is claimed of it, to go with it
    partition.png   sites and labels, of a simulation where matplotlib is installed
    sites.db        what virtual sites keep to themselves, with methods that let them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.atomic import write_atomic
from common.errors import RunError


class RunFolder:
    """Paths of a run and its metrics log.

    Args:
        path: the folder; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.model_card = path / "MODEL_CARD.md"
        self.adapter = path / "adapter"
        self.checkpoint = path / "checkpoint"
        self.sites = path / "sites.db"

    def expect_free(self) -> None:
        """Check that nothing stands where the folder will be made.

        Raises:
            RunError: if something does.
        """
        try:
            taken = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        except (OSError, ValueError):
            raise RunError(f"{str(self.path)[:200]!r} cannot be used; expected a writable place for --out.") from None
        if taken:
            raise RunError(
                f"{self.path} exists and is not empty; expected a new folder. "
                "Choose another --out, or go on with --resume."
            )

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunError: if it holds a run already, or cannot be made.
        """
        self.expect_free()
        try:
            self.checkpoint.mkdir(parents=True)
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or "no usable path"
            raise RunError(f"{self.path} cannot be made ({what}); expected a writable place.") from None

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics log, durably."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the metrics log; a last line cut short by a crash is left out."""
        return list(self.iterate_records())

    def iterate_records(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """Yield the records of the metrics log one by one: all, or those of some kinds.

        An evaluation of thousands of sites is megabytes; who needs the rounds alone holds them alone.
        """
        if not self.metrics.exists():
            return
        with self.metrics.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                if not kinds or record["kind"] in kinds:
                    yield record

    def rewind(self, last_round: int) -> None:
        """Drop the records of rounds after ``last_round``: they happened after the checkpoint and will again."""
        kept = (record for record in self.iterate_records() if record.get("round", 0) <= last_round)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomic(self.metrics, text.encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomic(self.summary, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
