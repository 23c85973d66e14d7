"""A slow and lossy network link for a site on this machine: packets, in a network namespace, through two TUN devices.

The kernel's own emulation (``tc netem``) is a module that many machines lack. Here a thread carries the packets between
a device of the machine and one in a namespace of its own, in which the site's processes run: real TCP on both sides
meets the rate, the delay and the loss. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import RunError

TUN = "/dev/net/tun"
_SET_INTERFACE, _PLAIN_PACKETS = 0x400454CA, 0x1001  # TUNSETIFF; IFF_TUN | IFF_NO_PI
_LARGEST_PACKET = 65536
HERE, THERE = "198.18.77.1", "198.18.77.2"
"""Addresses of both ends, of a net that is for measuring networks alone (RFC 2544)."""


@dataclass(frozen=True)
class Quality:
    """What a link does to packets, in each direction.

    Attributes:
        bits_per_s: its rate.
        delay_s: seconds that a packet is under way, half of a round trip.
        loss: fraction of the packets that get lost, independently.
        queue_bytes: what may wait to be sent; more is dropped.
    """

    bits_per_s: float = 1e6
    delay_s: float = 0.15
    loss: float = 0.02
    queue_bytes: int = 100_000


@dataclass
class Direction:
    """One way of a link, from a device to another.

    Attributes:
        source: file descriptor to read packets from.
        target: file descriptor to write them to.
        carried: bytes of the packets that arrived.
    """

    source: int
    target: int
    carried: int = 0
    free_s: float = 0.0
    under_way: list[tuple[float, int, bytes]] = field(default_factory=list)


class BadLink:
    """Carries packets until it is closed; see :func:`bad_link`.

    Args:
        here: descriptor of this machine's device.
        there: of the namespace's.
        quality: of the link.
        seed: of the losses.
    """

    def __init__(self, here: int, there: int, quality: Quality, seed: int = 0) -> None:
        self.up, self.down = Direction(there, here), Direction(here, there)
        self.quality = quality
        self._broken = threading.Event()
        self._closed = threading.Event()
        self._random = random.Random(seed)  # noqa: S311 - which packets get lost
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Lose every packet for as long as the context lasts."""
        self._broken.set()
        try:
            yield
        finally:
            self._broken.clear()

    def close(self) -> None:
        """Carry no more."""
        self._closed.set()
        self._thread.join()

    def _carry(self) -> None:
        directions = {way.source: way for way in (self.up, self.down)}
        while not self._closed.is_set():
            now = time.monotonic()
            due = min((way.under_way[0][0] for way in directions.values() if way.under_way), default=now + 0.1)
            ready, _, _ = select.select(list(directions), [], [], max(0.0, min(0.1, due - now)))
            for source in ready:
                self._take(directions[source], os.read(source, _LARGEST_PACKET))
            for way in directions.values():
                self._deliver(way)

    def _take(self, way: Direction, packet: bytes) -> None:
        now = time.monotonic()
        waiting_bytes = max(0.0, way.free_s - now) * self.quality.bits_per_s / 8
        if self._broken.is_set() or waiting_bytes + len(packet) > self.quality.queue_bytes:
            return
        way.free_s = max(now, way.free_s) + 8 * len(packet) / self.quality.bits_per_s
        if self._random.random() >= self.quality.loss:
            heapq.heappush(way.under_way, (way.free_s + self.quality.delay_s, next(self._order), packet))

    def _deliver(self, way: Direction) -> None:
        while way.under_way and way.under_way[0][0] <= time.monotonic():
            _, _, packet = heapq.heappop(way.under_way)
            if self._broken.is_set():
                continue
            way.carried += len(packet)
            with contextlib.suppress(OSError):  # a device that is not up (any more) takes nothing
                os.write(way.target, packet)


def why_not() -> str | None:
    """Return why this machine cannot have such a link; None if it can."""
    if os.geteuid() != 0:
        return "needs root, for a network namespace"
    try:
        os.close(os.open(TUN, os.O_RDWR))
        _ip("netns", "list")
    except (OSError, RunError) as error:
        return f"needs {TUN} and ip: {error}"
    return None


@contextlib.contextmanager
def bad_link(name: str, quality: Quality) -> Iterator[BadLink]:
    """Make a namespace that a link of this quality leads to; ``ip netns exec NAME`` runs a command in it.

    Args:
        name: of the namespace, at most 12 characters; its devices are named after it.
        quality: of the link.

    Raises:
        RunError: if the machine does not let us; see :func:`why_not`.
    """
    with contextlib.ExitStack() as ends:
        _ip("netns", "add", name)
        ends.callback(_ip, "netns", "delete", name)
        here, there = (ends.enter_context(_device(f"{name}{number}")) for number in (0, 1))
        _ip("link", "set", f"{name}1", "netns", name)
        for device, address, inside in ((f"{name}0", HERE, ()), (f"{name}1", THERE, ("-n", name))):
            _ip(*inside, "address", "add", f"{address}/30", "dev", device)
            _ip(*inside, "link", "set", device, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        link = BadLink(here, there, quality)
        ends.callback(link.close)
        yield link


@contextlib.contextmanager
def _device(name: str) -> Iterator[int]:
    """Make a device that is there for as long as the context lasts, and return its descriptor."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _PLAIN_PACKETS))
        yield descriptor
    finally:
        os.close(descriptor)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError("ip is missing; expected it on PATH. Install iproute2.") from None
    except subprocess.CalledProcessError as error:
        raise RunError(f"ip {' '.join(arguments)} failed ({error.stderr.strip()}); expected success.") from None
