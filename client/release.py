"""What leaves a site for a round, as one piece: the reply's header and the packed update.

The ledger keeps it so that a request sent again gets the same answer. The header belongs to it, because it may hold
released figures of its own (the noisy loss, the clip norm).
"""

from __future__ import annotations

from common.errors import PrivacyError
from common.wire import Refusal, TrainReply, header_bytes, parse_header

_LENGTH_BYTES = 4


def pack_release(reply: TrainReply, update: bytes) -> bytes:
    """Put header and packed update into one piece of bytes."""
    header = header_bytes(reply)
    return len(header).to_bytes(_LENGTH_BYTES, "big") + header + update


def unpack_release(release: bytes, nonce: str) -> tuple[TrainReply, bytes]:
    """Return header and packed update, the header with the nonce of the request that is answered now.

    Raises:
        PrivacyError: for bytes that :func:`pack_release` did not make.
    """
    end = _LENGTH_BYTES + int.from_bytes(release[:_LENGTH_BYTES], "big")
    reply = parse_header(release[_LENGTH_BYTES:end], TrainReply)
    if isinstance(reply, Refusal):
        raise PrivacyError("the ledger keeps a refusal in place of a release; expected an update. Restore the ledger.")
    return reply.model_copy(update={"nonce": nonce}), release[end:]
