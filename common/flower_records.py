"""Header and payload to Flower records and back: the one place that knows how they sit in a message."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import WireError

HEADER = "fedtune.header"
PAYLOAD = "fedtune.payload"
_STYPE = "safetensors"


def to_records(header: bytes, payload: bytes = b"") -> RecordDict:
    """Put a header, and a payload where there is one, into records."""
    records = RecordDict({HEADER: ConfigRecord({"json": header})})
    if payload:
        arrays = ArrayRecord()  # which copies the Array when it is made from one
        arrays[PAYLOAD] = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
        records[PAYLOAD] = arrays
    return records


def from_records(records: RecordDict) -> tuple[bytes, bytes]:
    """Return header and payload of a message; b"" where there is no payload.

    Raises:
        WireError: for records that :func:`to_records` did not make.
    """
    # Not through config_records and array_records, which build a dictionary of all records at every call.
    header, arrays = records.get(HEADER), records.get(PAYLOAD)
    content = header.get("json") if isinstance(header, ConfigRecord) else None
    if not isinstance(content, bytes):
        raise WireError("message has no fedtune header; expected one. Is the other side fedtune?")
    if arrays is None:
        return content, b""
    array = arrays.get(PAYLOAD) if isinstance(arrays, ArrayRecord) else None
    if not isinstance(array, Array) or len(arrays) != 1 or array.stype != _STYPE or array.dtype != "uint8":
        raise WireError("message has a payload of another kind; expected one packed array.")
    return content, array.data
