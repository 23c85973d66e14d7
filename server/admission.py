"""Admission: what is checked before an update may touch the average."""

from __future__ import annotations

from dataclasses import dataclass

from common.codecs.codec import decode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import AdmissionError, WireError
from common.tensors import Manifest, Tensors, is_finite, l2_norm
from common.variates import parted
from common.wire import CHANGED, Refusal, TrainReply, TrainRequest, parse_header
from server.cohort import Member


@dataclass(frozen=True)
class Admission:
    """The checks of a run.

    Attributes:
        packing: of updates.
        takes_loss: whether replies may tell a training loss.
        takes_clip_norm: whether they tell where adaptive clipping ended.
        max_norm: largest L2 norm of an update; None for any.
    """

    packing: Packing
    takes_loss: bool = True
    takes_clip_norm: bool = False
    max_norm: float | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Admission:
        """Return the checks that a run config asks for."""
        privacy = config.privacy
        return cls(
            Packing.of_update(config.communication),
            takes_loss=privacy.unit == "none" or privacy.release_loss,
            takes_clip_norm=privacy.clipping == "adaptive",
            max_norm=config.aggregation.max_update_norm,
        )

    def admit(
        self, header: bytes, payload: bytes, request: TrainRequest, member: Member, manifest: Manifest
    ) -> tuple[TrainReply, Tensors]:
        """Return the reply and its update if everything about it is as it must be.

        Args:
            header: of the reply.
            payload: of the reply.
            request: what it must answer.
            member: the site.
            manifest: the shape of every tensor of the update, by name.

        Raises:
            AdmissionError: with a reason: refused, changed, header, site, round, nonce, base, mechanism, loss,
                clip_norm, or, for the payload, oversized, malformed, codec, keys, shape, dtype, non_finite, norm,
                scale, code, places.
        """
        try:
            reply = parse_header(header, TrainReply)
        except WireError as error:
            raise AdmissionError("header", str(error)) from None
        if isinstance(reply, Refusal):
            reason = CHANGED if reply.code == CHANGED else "refused"
            raise AdmissionError(reason, f"the site refused with {reply.code!r} at {reply.place or 'unknown'}")
        _expect("site", reply.site, member.name)
        _expect("round", reply.round, request.round)
        _expect("nonce", reply.nonce, request.nonce)
        _expect("base", reply.base_fingerprint, request.base_fingerprint)
        _expect("mechanism", reply.mechanism, member.description.mechanism)
        if reply.train_loss is not None and not self.takes_loss:
            raise AdmissionError("loss", "a loss was sent under differential privacy; expected none")
        if (reply.clip_norm is not None) != self.takes_clip_norm:
            raise AdmissionError("clip_norm", "a clip norm comes with adaptive clipping and not without it")
        update = decode(payload, manifest, self.packing, AdmissionError)
        if not is_finite(update):
            raise AdmissionError("non_finite", "the update holds NaN or infinity; expected finite numbers")
        if self.max_norm is not None and (norm := l2_norm(parted(update)[0])) > self.max_norm:
            raise AdmissionError(
                "norm",
                f"the update has norm {norm:.3g}; expected at most {self.max_norm:g} (aggregation.max_update_norm)",
            )
        return reply, update


def _expect(reason: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise AdmissionError(reason, f"the reply is for another {reason}; expected the one of the request")
