"""What a site keeps to itself between rounds: factors that a method trains there and never sends (FedSA-LoRA's B).

A round that is asked for again, after a crash or a resume, starts from what stood before it and ends on the same bits;
see :mod:`client.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.state import SiteStates
from common.config.run import RunConfig
from common.errors import RunError
from common.factor_names import A, B, R
from common.methods import personal_names
from common.tensors import Manifest, Tensors, manifest_of

STATE = "site-state"
"""Key of a simulated node's config: the file where virtual sites keep what is theirs, by a path that holds in whatever
folder a worker stands."""
_NAME = "personal"


def what_sites_keep(config: RunConfig) -> str | None:
    """Return the key of a run config by which sites keep something from round to round; None where they do not.

    Whatever a site keeps is in one file of one machine: see :mod:`client.state`.
    """
    if personal_names(config, [f"layer{end}" for end in (A, B, R)]):
        return f"aggregation.method {config.aggregation.method!r}"
    if config.training.control_variates:
        return "training.control_variates"
    if config.communication.top_k is not None:
        return f"communication.top_k {config.communication.top_k:g}"
    return None


@dataclass(frozen=True)
class PersonalStore:
    """What one site keeps.

    Attributes:
        states: the file, of this site or of all virtual sites.
        site: the site's name.
    """

    states: SiteStates
    site: str

    @classmethod
    def of_virtual_site(cls, path: Path, site: str) -> PersonalStore:
        """Return the store of a virtual site among others in the file ``path``."""
        return cls(virtual_states(path), site)

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
        kept = self.states.before(run, self.site, _NAME, number)
        if kept is None:
            return {}
        if manifest_of(kept) != manifest:
            raise RunError("a site's state holds other tensors than this run keeps; expected the same. Leave the run.")
        return kept

    def keep(self, run: str, number: int, tensors: Tensors) -> None:
        """Keep tensors of a round; those of rounds after it, and all but one before it, are dropped."""
        self.states.write(run, self.site, number, {_NAME: tensors})


@lru_cache(maxsize=4)
def virtual_states(path: Path) -> SiteStates:
    """Return the file of all virtual sites of a run; whoever keeps rounds brings it to disk with ``sync``."""
    return SiteStates(path, together=True)
