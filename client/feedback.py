"""A site's update on its way out: packed, and what top-k leaves out added to the next one (error feedback).

Under differential privacy the update is released the moment its noise is added: packing works on the released value and
on public settings alone (post-processing), its rounding follows from the run's seed and need not be secret. The length
of a compressed payload tells of the released update and of nothing else.

Error feedback (Stich et al. 1809.07599; Karimireddy et al. 1901.09847): with the residual e_t, e_1 = 0,

    sent_t = C(u_t + e_t),    e_{t+1} = u_t + e_t - sent_t,

so that what C loses is sent later and not never. The residual is the site's and stays there, by round, so that a round
that is asked for again, or a resumed run, sends the same bits. It is refused under every privacy unit: an update would
hold parts of earlier ones, which the accounting of its round does not cover. An update that the coordinator rejects,
that comes too late, or whose round is skipped is lost all the same.
"""

from __future__ import annotations

from client.site import Site
from common.codecs.codec import decode, encode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.randomness import torch_generator
from common.tensors import Tensors, add, is_finite, manifest_of, subtract
from common.wire import TrainRequest

RESIDUAL = "residual"
"""Name of the state that holds it."""


def packed_update(update: Tensors, request: TrainRequest, site: Site, config: RunConfig) -> bytes:
    """Return a round's update as it travels, and keep what it leaves out.

    Args:
        update: what the site sends, as released.
        request: that asked for it.
        site: who sends it.
        config: the run config.

    Raises:
        ConfigError: for top-k at a site that has no place for its residual.
        RunError: if what it kept belongs to another run.
    """
    packing = Packing.of_update(config.communication)
    draw = torch_generator(config.seed, "codec", request.round, site.name)
    if packing.top_k is None:
        return encode(update, packing, draw)
    if site.personal is None:
        raise ConfigError(
            "communication.top_k keeps what it leaves out at each site, and this virtual site has no place for it; "
            "expected fedtune-sim, or a real site."
        )
    states, manifest = site.personal.states, manifest_of(update)
    owed = states.before(request.run, site.name, RESIDUAL, request.round) or {}
    if owed and manifest_of(owed) != manifest:
        raise RunError("a site's residual holds other tensors than this run sends; expected the same. Leave the run.")
    whole = add(update, owed)
    payload = encode(whole, packing, draw)
    if is_finite(whole):  # else the coordinator rejects it, and the residual stays what it was
        owed = subtract(whole, decode(payload, manifest, packing))
    if owed:
        states.write(request.run, site.name, request.round, {RESIDUAL: owed})
    return payload
