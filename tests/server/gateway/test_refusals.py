"""The gateway's log stays short whatever outsiders do, and loses no count."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway import refusals as module
from server.gateway.forward import TRY_AGAIN
from server.gateway.refusals import FOREIGN_LOGGERS, MOST_PAIRS, Refusals, Sample
from tests.server.gateway.running import Running, running

TIMES = 12
FLEET = b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def gateway(lines: pytest.LogCaptureFixture) -> Iterator[Running]:
    with running(header_timeout_s=0.5) as made:
        lines.clear()
        yield made


def telling(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """The logged lines with a text in them."""
    return [message for message in caplog.messages if text in message]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"])), max_size=60))
def test_sample_tells_the_first_of_each_and_counts_the_rest(events: list[tuple[str, str]]) -> None:
    sample, seen = Sample(), Counter[tuple[str, str]]()
    for who, kind in events:
        assert sample.is_first(who, kind) == (not seen[who, kind])
        seen[who, kind] += 1
    assert sorted(sample.counts()) == sorted(f"{who}: {kind}: {n - 1} more" for (who, kind), n in seen.items() if n > 1)
    assert sample.counts() == []
    assert sample.is_first("a", "x")


def test_sample_is_bounded_in_lines_and_memory_however_many_addresses_there_are() -> None:
    sample = Sample()
    told = [sample.is_first(str(number % 5000), "over the rate") for number in range(20_000)]
    assert sum(told) == len(sample._more) == MOST_PAIRS
    counts = sample.counts()
    assert len(counts) <= MOST_PAIRS + 1
    assert sum(told) + sum(int(re.findall(r"(\d+) more", line)[0]) for line in counts) == 20_000


def test_counts_are_told_each_minute_and_at_the_end(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    refusals = Refusals()

    async def refuse() -> None:
        async with refusals.told():
            for _ in range(3):
                refusals.note("10.0.0.1", "over the rate")
            while not telling(lines, "2 more"):
                await asyncio.sleep(0.01)
            monkeypatch.setattr(module, "EVERY_S", 3600.0)
            await asyncio.sleep(0.05)
            lines.clear()
            for _ in range(4):
                refusals.note("10.0.0.1", "over the rate")

    asyncio.run(refuse())
    assert lines.messages == ["10.0.0.1: over the rate", "10.0.0.1: over the rate: 3 more"]
    assert not any(logging.getLogger(name).filters for name in FOREIGN_LOGGERS)


def test_what_a_peer_sent_is_logged_escaped_and_cut(lines: pytest.LogCaptureFixture) -> None:
    Refusals().note("10.0.0.1", "not found", b"/\n\x1b[2J" + b"x" * 1000)
    assert lines.messages[0].startswith("10.0.0.1: not found: b'/\\n\\x1b[2Jxx")
    assert len(lines.messages[0]) < 120


def test_errors_of_libraries_are_told_once_of_each_kind(lines: pytest.LogCaptureFixture) -> None:
    refusals, foreign = Refusals(), logging.getLogger("asyncio")
    foreign.addFilter(refusals.lets_through)
    try:
        for number in range(TIMES):
            foreign.error("socket.accept() out of system resource\nsocket: <socket %d>" % number)  # noqa: UP031
            foreign.info("said in any case")
    finally:
        foreign.removeFilter(refusals.lets_through)
    assert len(telling(lines, "out of system resource")) == 1
    assert len(telling(lines, "said in any case")) == TIMES
    refusals.tell_counts()
    assert telling(lines, f"out of system resource: {TIMES - 1} more")


REFUSED = {
    "not found": (b"POST /v1/control/%d HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404 not found", 404),
    "too long": (FLEET + b"content-length: 9999999999%d\r\n\r\n", "413 declared body over the limit", 413),
    "no HTTP": (b"%d\r\n\r\n", "Invalid HTTP request received.", 400),
    "upgrade": (
        FLEET.replace(b"close", b"close, upgrade") + b"upgrade: h%d\r\ncontent-length: 0\r\n\r\n",
        "Unsupported upgrade request.",
        200,
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_of_a_kind_are_told_once_and_counted(lines: pytest.LogCaptureFixture, kind: str) -> None:
    request, said, status = REFUSED[kind]
    with running() as made:
        for number in range(TIMES):
            assert int(made.raw(request % number).split(b" ")[1]) == status
        assert len(telling(lines, said)) == 1
    assert telling(lines, f"{said}: {TIMES - 1} more")


def test_late_headers_are_told_once(gateway: Running, lines: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert gateway.raw(b"POST") == b""
    assert len(telling(lines, "no header in time")) == 1


def test_connections_over_the_limit_are_told_once(lines: pytest.LogCaptureFixture) -> None:
    with running(connections_per_peer=1) as made, made.connection():
        for _ in range(TIMES):
            with pytest.raises(OSError), made.connection():  # noqa: PT011 - reset, or ended in the handshake
                pass
        assert len(telling(lines, "too many connections")) == 1


def test_rate_holds_for_what_is_not_found_too(lines: pytest.LogCaptureFixture) -> None:
    with running(requests_per_s=0.01, burst=3, queue_timeout_s=1.0) as made, made.client() as client:
        codes = [client.post("/v1/control/list-runs").status_code for _ in range(TIMES)]
        assert len(telling(lines, "404 not found")) == 1
        assert len(telling(lines, f"{TRY_AGAIN} over the rate")) == 1
    assert codes == [404, 404, 404] + [TRY_AGAIN] * (TIMES - 3)
