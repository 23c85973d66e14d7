"""How many tokens a virtual site trained on in a round, from the batches it draws.

The number never crosses the wire: under DP it would tell on the sampling. The harness holds the virtual sites' rows and
seeds, so it draws the same batches again.
"""

from __future__ import annotations

from collections.abc import Sequence

from client.site import virtual_site
from client.training.site_round import local_batches
from common.config.run import RunConfig
from common.models.adapter import AdaptedModel
from common.privacy.planning import plan_mechanism
from simulations.cache import virtual_node


class TokensDone:
    """Counts the tokens of a site and round.

    Args:
        config: the run config.
        model: the resident model, for its tokenizer.
        sites: names of the sites in the order of the data.
    """

    def __init__(self, config: RunConfig, model: AdaptedModel, sites: Sequence[str]) -> None:
        self._config, self._model = config, model
        self._place = {site: place for place, site in enumerate(sites)}

    def __call__(self, site: str, number: int, steps: int) -> int:
        """Return the tokens, without padding, in ``steps`` steps of a site in a round."""
        rows = virtual_site(self._config, virtual_node(self._place[site], len(self._place)), self._model)
        mechanism = plan_mechanism(self._config, rows.num_units(self._config.privacy.unit))
        batches = local_batches(rows, self._config, number, steps, mechanism)
        return sum(rows.lengths[index] for batch in batches for index in batch)
