"""What a site keeps to itself between rounds: factors that a method trains there and never sends (FedSA-LoRA's B).

One file for a run and round, under the site's own folder. The newest two rounds are kept: a round that is asked for
again, after a crash or a resume, starts from what stood before it and ends on the same bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from common.atomic import write_atomic
from common.errors import RunError
from common.tensors import Manifest, Tensors, manifest_of

STATE = "site-state"
"""Key of a simulated node's config: the folder where virtual sites keep what is theirs."""


@dataclass(frozen=True)
class PersonalStore:
    """The folder of one site.

    Attributes:
        folder: made when something is kept first.
    """

    folder: Path

    @classmethod
    def of_virtual_site(cls, folder: Path, site: str) -> PersonalStore:
        """Return the store of a virtual site among others in ``folder``; names may hold what a path may not."""
        return cls(folder / hashlib.sha256(site.encode()).hexdigest()[:32])

    def before(self, run: str, number: int, manifest: Manifest) -> Tensors:
        """Return what the site kept in the last round of the run that it took part in before round ``number``.

        Args:
            run: the run's id.
            number: of the round.
            manifest: the expected shapes by name.

        Returns:
            Nothing where it took part in none.

        Raises:
            RunError: for a file that is damaged or holds something else.
        """
        known = [path for path in (self.folder / run).glob("round-*.safetensors") if _round_of(path) < number]
        if not known:
            return {}
        path = max(known, key=_round_of)
        try:
            kept = load(path.read_bytes())
        except (SafetensorError, OSError):
            raise RunError(f"{path} cannot be read; expected what this site kept of a round. Leave the run.") from None
        if manifest_of(kept) != manifest:
            raise RunError(f"{path} holds other tensors than this run keeps; expected the same. Leave the run.")
        return kept

    def keep(self, run: str, number: int, tensors: Tensors) -> None:
        """Keep tensors of a round durably; rounds after it, and all but one before it, are dropped."""
        folder = self.folder / run
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"round-{number:05d}.safetensors"
        write_atomic(path, save({name: value.contiguous() for name, value in sorted(tensors.items())}))
        others = sorted((other for other in folder.glob("round-*.safetensors") if other != path), key=_round_of)
        earlier = [other for other in others if _round_of(other) < number]
        for other in others:
            if other not in earlier[-1:]:
                other.unlink(missing_ok=True)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
