"""Requests and answers as bytes, for the border between processes: what is pickled nowhere.

A frame is a prefix of fixed size (kind, ticket, node, size of header and payload, little-endian), header and payload.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from simulations.engines.engine import Answer, Request

_PREFIX = struct.Struct("<BQIIQ")

SETTINGS, READY, BATCH, QUERY, TRAIN, ANSWER, FAILURE = range(7)
"""Kinds of frames. SETTINGS: what the worker is for. READY: it has loaded its model. BATCH: that many requests follow.
QUERY, TRAIN: a request. ANSWER: of a ticket. FAILURE: why there is none; of ticket 0, why the worker cannot start."""

KINDS = {"query": QUERY, "train": TRAIN}
_NAMES = {number: name for name, number in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, taken apart."""

    kind: int
    ticket: int = 0
    node: int = 0
    header: bytes = b""
    payload: bytes = b""

    @classmethod
    def of(cls, what: Request | Answer) -> Frame:
        """Return the frame of a request or an answer."""
        if isinstance(what, Request):
            return cls(KINDS[what.kind], what.ticket, what.node, what.header, what.payload)
        if what.failure is not None:
            return cls(FAILURE, what.ticket, header=what.failure.encode())
        return cls(ANSWER, what.ticket, header=what.header, payload=what.payload)

    def request(self) -> Request:
        """Return the request in the frame."""
        return Request(self.ticket, self.node, _NAMES[self.kind], self.header, self.payload)

    def answer(self) -> Answer:
        """Return the answer or the failure in the frame."""
        if self.kind == FAILURE:
            return Answer(self.ticket, failure=self.header.decode())
        return Answer(self.ticket, self.header, self.payload)

    def parts(self) -> tuple[bytes, bytes]:
        """Return prefix with header, and the payload, which is not copied."""
        return self._prefix() + self.header, self.payload

    def pack(self) -> bytes:
        """Return the frame as one piece."""
        return b"".join(self.parts())

    def _prefix(self) -> bytes:
        return _PREFIX.pack(self.kind, self.ticket, self.node, len(self.header), len(self.payload))


def unpack(data: bytes) -> Frame:
    """Take a packed frame apart."""
    kind, ticket, node, header, _ = _PREFIX.unpack_from(data)
    start = _PREFIX.size + header
    return Frame(kind, ticket, node, data[_PREFIX.size : start], data[start:])


def batch_frames(requests: Iterable[Request]) -> Iterator[Frame]:
    """Yield the frames of a batch."""
    batch = list(requests)
    yield Frame(BATCH, ticket=len(batch))
    yield from map(Frame.of, batch)


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send a frame.

    Raises:
        OSError: if the other side is gone.
    """
    for part in frame.parts():
        if part:
            connection.sendall(part)


def receive_frame(connection: socket.socket) -> Frame:
    """Receive a frame.

    Raises:
        EOFError: if the other side closed, or ended in the middle.
        OSError: if the connection broke.
    """
    kind, ticket, node, header, payload = _PREFIX.unpack(_receive(connection, _PREFIX.size))
    return Frame(kind, ticket, node, _receive(connection, header), _receive(connection, payload))


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = connection.recv_into(view[done:])
        if not got:
            raise EOFError
        done += got
    return bytes(data)
