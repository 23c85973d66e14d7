"""Answers of earlier rounds, kept beside the checkpoint so that a resumed run replays the same ones."""

from __future__ import annotations

import struct
from pathlib import Path

from common.atomic import write_atomic
from simulations.faults.attacks import Answer


class OldAnswers:
    """The newest answers of hostile sites that replay.

    Args:
        folder: where to keep them; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, node: int, number: int, answer: Answer) -> None:
        """Keep the answer of a node in a round, and of the older ones only the newest before it."""
        content = struct.pack("<Q", len(answer.header)) + answer.header + answer.payload
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(node, number), content)
        for passed in self._rounds(node, number)[:-1]:
            self._path(node, passed).unlink()

    def before(self, node: int, number: int) -> Answer | None:
        """Return the newest answer of a node from a round before ``number``."""
        rounds = self._rounds(node, number)
        if not rounds:
            return None
        content = self._path(node, rounds[-1]).read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        return Answer(content[8 : 8 + length], content[8 + length :])

    def _rounds(self, node: int, number: int) -> list[int]:
        """The rounds before ``number`` of which an answer is kept, in order."""
        found = (int(path.stem.rsplit("-", 1)[1]) for path in self._folder.glob(f"answer-{node}-*.bin"))
        return sorted(kept for kept in found if kept < number)

    def _path(self, node: int, number: int) -> Path:
        return self._folder / f"answer-{node}-{number:05d}.bin"
