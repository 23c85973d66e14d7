"""What the sites of a round are sent: a request with a nonce of its own, and the adapter at the rank of each."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.factors import fixed_ranks, is_fixed, with_rank
from common.methods import received_names
from common.randomness import torch_generator
from common.tensors import Manifest, Tensors, manifest_of
from common.variates import with_variates
from common.wire import TrainRequest, header_bytes
from server.cohort import Member
from server.late import Asked
from server.site_level import COORDINATOR
from server.variates import ControlRound


class Invitations:
    """Makes the requests of one round; what sites of one rank are sent is packed once.

    Args:
        number: of the round.
        adapter: that the round starts from.
        sent: names of the tensors of an update.
        config: the run config.
        run: the run's id.
        base: fingerprint of the base model.
        clip_norm: where adaptive clipping stands.
        control: control variates, if the run has any.
    """

    def __init__(
        self, number: int, adapter: Tensors, sent: Sequence[str], config: RunConfig, run: str, base: str,
        clip_norm: float | None, control: ControlRound | None,
    ) -> None:  # fmt: skip
        self._number, self._adapter, self._sent = number, adapter, sent
        self._config, self._control = config, control
        self._payloads: dict[int, bytes] = {}
        self._manifests: dict[int, Manifest] = {}
        self._request = TrainRequest(
            config_digest=config.digest(),
            run=run,
            clip_norm=clip_norm,
            round=number,
            nonce=secrets.token_hex(16),
            base_fingerprint=base,
            fixed_ranks=fixed_ranks(adapter),
        )

    def to(self, member: Member) -> Asked:
        """Return a fresh request to a member."""
        rank = member.rank(self._config)
        if rank not in self._payloads:
            self._payloads[rank] = self._packed(rank)
            start = with_rank(self._adapter, rank)
            manifest = manifest_of({name: start[name] for name in self._sent})
            self._manifests[rank] = manifest if self._control is None else with_variates(manifest)
        taken = None if self._control is None else self._control.taken(member.name)
        own = {
            "nonce": secrets.token_hex(16), "variates_taken": taken, "mechanism": member.description.mechanism,
            "rank": rank,
        }  # fmt: skip
        request = self._request.model_copy(update=own)
        down = len(header_bytes(request)) + len(self._payloads[rank])
        return Asked(member, request, self._manifests[rank], down)

    def parts(self, asked: Asked) -> tuple[bytes, bytes]:
        """Return header and payload of a request: factors at the site's rank, and a correction whole."""
        return header_bytes(asked.request), self._payloads[asked.member.rank(self._config)]

    def _packed(self, rank: int) -> bytes:
        """Return what a site of ``rank`` is sent; the adapter itself keeps its bits, whatever the codec rounds."""
        fixed = {name for name in self._adapter if is_fixed(name)}
        names = received_names(self._config, self._adapter.keys() - fixed, self._number) | fixed
        sent = with_rank({name: self._adapter[name] for name in names}, rank)
        if self._control is not None:
            sent |= self._control.payload()
        draw = torch_generator(self._config.seed, "codec", self._number, COORDINATOR, rank)
        return encode(sent, Packing.of_adapter(self._config.communication), draw)
