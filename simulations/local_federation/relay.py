"""A slow link that breaks, for a site on any machine: a TCP relay before the gateway.

It limits the rate of each direction and cuts connections. What it cannot do is lose packets; see
``simulations.local_federation.bad_link``, which needs root.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

from simulations.local_federation.commands import LOOPBACK

_PIECE_BYTES = 4096
_LOOK_S = 0.1


class Pace:
    """Lets bytes through at a rate, all connections together.

    Args:
        bits_per_s: the rate.
    """

    def __init__(self, bits_per_s: float) -> None:
        self.carried = 0
        self._bits_per_s, self._free_s = bits_per_s, 0.0
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Wait until so many bytes are through."""
        with self._lock:
            self._free_s = max(time.monotonic(), self._free_s) + 8 * count / self._bits_per_s
            due = self._free_s
            self.carried += count
        time.sleep(max(0.0, due - time.monotonic()))


class Relay:
    """Relays connections to a port of this machine until it is closed.

    Args:
        target: host and port.
        bits_per_s: of each direction.
    """

    def __init__(self, target: tuple[str, int], bits_per_s: float) -> None:
        self.up, self.down = Pace(bits_per_s), Pace(bits_per_s)
        self._target = target
        self._broken, self._closed = threading.Event(), threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Cut all connections, and each new one, for as long as the context lasts."""
        self._broken.set()
        try:
            yield
        finally:
            self._broken.clear()

    def close(self) -> None:
        """Relay no more."""
        self._closed.set()
        self._broken.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        self._listener.settimeout(_LOOK_S)
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                near, _ = self._listener.accept()
                thread = threading.Thread(target=self._relay, args=(near,))
                self._threads.append(thread)
                thread.start()

    def _relay(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(self._target) as far:
            over = threading.Event()
            back = threading.Thread(target=self._pump, args=(far, near, self.down, over))
            back.start()
            self._pump(near, far, self.up, over)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, pace: Pace, over: threading.Event) -> None:
        """Carry what one end sends to the other until either ends, or the link breaks."""
        with contextlib.suppress(OSError):
            while not over.is_set() and not self._broken.is_set():
                if not select.select([source], [], [], _LOOK_S)[0]:
                    continue
                piece = source.recv(_PIECE_BYTES)
                if not piece:
                    break
                pace.wait(len(piece))
                target.sendall(piece)
        over.set()


@contextlib.contextmanager
def relayed(target: tuple[str, int], bits_per_s: float) -> Iterator[Relay]:
    """Relay for as long as the context lasts."""
    relay = Relay(target, bits_per_s)
    try:
        yield relay
    finally:
        relay.close()
