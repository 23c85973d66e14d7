"""Rates and counts of peers, against a slow obvious reference."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.gateway.rate import MOST_PEERS, Connections, Rate


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(1, 5), st.sampled_from([0.5, 1.0, 8.0]))
def test_rate_admits_no_more_than_burst_and_rate_in_any_stretch(gaps: list[float], burst: int, per_s: float) -> None:
    rate, now, served = Rate(per_s, burst), 0.0, []
    for gap in gaps:
        now += gap
        delay = rate.delay_s("peer", now, 2.0)
        if delay is not None:
            served.append(now + delay)
    for first in range(len(served)):
        for last in range(first, len(served)):
            within = last - first + 1
            assert within <= burst + (served[last] - served[first]) * per_s + 1 + 1e-6


def test_quiet_peer_waits_for_nothing_and_a_busy_one_does_not_hold_up_another() -> None:
    rate = Rate(1.0, 2)
    assert [rate.delay_s("busy", 0.0, 10.0) for _ in range(4)] == [0.0, 0.0, 1.0, 2.0]
    assert rate.delay_s("quiet", 0.0, 10.0) == 0.0
    assert rate.delay_s("busy", 100.0, 10.0) == 0.0


def test_refused_request_takes_nothing() -> None:
    rate = Rate(1.0, 1)
    assert rate.delay_s("peer", 0.0, 0.5) == 0.0
    assert [rate.delay_s("peer", 0.0, 0.5) for _ in range(100)] == [None] * 100
    assert rate.delay_s("peer", 1.0, 0.5) == 0.0


def test_number_of_remembered_peers_is_bounded() -> None:
    rate = Rate(10.0, 10)
    for number in range(3 * MOST_PEERS):
        rate.delay_s(str(number), number * 0.01, 1.0)
    assert len(rate._buckets) <= MOST_PEERS + 1


def test_connections_are_counted_by_peer_and_forgotten() -> None:
    connections = Connections(2, 3)
    assert [connections.enter("a") for _ in range(3)] == [True, True, False]
    assert connections.enter("b")
    assert not connections.enter("c")  # too many in all
    connections.leave("b")
    assert connections.enter("c")
    connections.leave("a")
    assert [connections.enter("a") for _ in range(2)] == [True, False]
    for peer in "aac":
        connections.leave(peer)
    assert not connections._open
