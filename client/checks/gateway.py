"""The way to the coordinator: TLS to the kit's address with the kit's CA, and the two clocks."""

from __future__ import annotations

import email.utils
import socket
import ssl
from datetime import UTC, datetime

from client.checks.finding import Finding
from client.enrolment import enrolled
from client.places import Places
from common.kit import Kit

CONNECT_S = 10.0
LATEST_S, EARLIEST_S = 5.0, 300.0
"""Flower takes a signature whose time is at most this far ahead of the coordinator's clock, or behind it."""
_ANSWER_BYTES = 65536
_REQUEST = "POST /v1/fleet/activate-node HTTP/1.1\r\nContent-Length: 0\r\n"
"""A call without a body, which the SuperLink turns away, with its own clock's Date; the gateway's answers have none."""


def check_kit(places: Places) -> str:
    """Look at the enrolled kit."""
    kit = enrolled(places)
    return f"{kit.federation} at {kit.address}, key {kit.fingerprint()}"


def check_connection(places: Places) -> Finding:
    """Shake hands with the gateway as the SuperNode will, and read its clock off its answer."""
    kit = enrolled(places)
    what = "TLS to the gateway"
    try:
        answer, seconds = _ask(kit)
    except ssl.SSLCertVerificationError as error:
        remedy = f"The gateway's certificate must be signed by the kit's CA and name {kit.host}. Ask the coordinator."
        return Finding(what, "fail", f"{kit.address}: {error.verify_message}", remedy)
    except ssl.SSLError as error:
        return Finding(what, "fail", f"{kit.address}: no TLS ({error.reason})", "Is that the gateway's port?")
    except OSError as error:
        remedy = "Check the address, the network and the firewall: only this one outgoing connection is needed."
        return Finding(what, "fail", f"{kit.address}: {error.strerror or type(error).__name__}", remedy)
    if seconds is None:
        return Finding(what, "note", f"{kit.address} answers {answer} without a Date", "The clocks cannot be compared.")
    if not -EARLIEST_S < seconds < LATEST_S:
        ahead = "ahead of" if seconds > 0 else "behind"
        return Finding(
            what, "fail", f"this clock is {abs(seconds):.0f} s {ahead} the coordinator's",
            "Flower refuses such a signature: set the clock (NTP).",
        )  # fmt: skip
    return Finding(what, "pass", f"{kit.address}, certificate as the kit has it, clocks {seconds:+.0f} s apart")


def _ask(kit: Kit) -> tuple[str, float | None]:
    """Return the gateway's status line, and the seconds that this clock is ahead of its Date."""
    context = ssl.create_default_context(cadata=kit.ca_certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((kit.host, kit.port), timeout=CONNECT_S) as plain,
        context.wrap_socket(plain, server_hostname=kit.host) as secured,
    ):
        secured.sendall(f"{_REQUEST}Host: {kit.address}\r\nConnection: close\r\n\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received and len(received) < _ANSWER_BYTES:
            more = secured.recv(4096)
            if not more:
                break
            received += more
    lines = received.decode("latin-1").split("\r\n")
    dates = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("date:")]
    status = "".join(character for character in lines[0][:40] if character.isprintable())
    return status, _ahead(dates[0]) if dates else None


def _ahead(date: str) -> float | None:
    try:
        told = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    told = told if told.tzinfo is not None else told.replace(tzinfo=UTC)
    return (datetime.now(UTC) - told).total_seconds()
