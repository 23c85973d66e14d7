"""What leaves a site for a round, as one piece: the reply's header and the packed update.

The ledger keeps it so that a request sent again gets the same answer. The header belongs to it, because it may hold
released figures of its own (the noisy loss, the clip norm). Where training failed, a refusal stands in its place, the
same for every failure.
"""

from __future__ import annotations

from client.refusals import RoundFailedError
from common.wire import Refusal, TrainReply, header_bytes, parse_header

_LENGTH_BYTES = 4


def pack_release(reply: TrainReply, update: bytes) -> bytes:
    """Put header and packed update into one piece of bytes."""
    return _pack(reply, update)


def failed_release() -> bytes:
    """Return what is released for a round that failed: the refusal that every failure gives."""
    return _pack(Refusal(code=RoundFailedError.code, place=""), b"")


def _pack(reply: TrainReply | Refusal, update: bytes) -> bytes:
    header = header_bytes(reply)
    return len(header).to_bytes(_LENGTH_BYTES, "big") + header + update


def unpack_release(release: bytes, nonce: str) -> tuple[TrainReply, bytes]:
    """Return header and packed update, the header with the nonce of the request that is answered now.

    Raises:
        RoundFailedError: for what :func:`failed_release` made.
        WireError: for bytes that neither made.
    """
    end = _LENGTH_BYTES + int.from_bytes(release[:_LENGTH_BYTES], "big")
    reply = parse_header(release[_LENGTH_BYTES:end], TrainReply)
    if isinstance(reply, Refusal):
        raise RoundFailedError(
            "the round failed when it was trained; expected an update. It stays charged and is never trained again: go "
            "on with the next round."
        )
    return reply.model_copy(update={"nonce": nonce}), release[end:]
