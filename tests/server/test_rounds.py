"""Admission and the round: everything that arrives is hostile until checked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.tensors import Tensors
from common.wire import MechanismReport, Refusal, SiteDescription, TrainReply, TrainRequest, header_bytes, parse_header
from server.admission import Admission
from server.cohort import Member, admit_members, expect_members, sample_cohort
from server.rounds import Round

BASE, OTHER = "a" * 64, "b" * 64
ADAPTER: Tensors = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.zeros(3, 2)}
RUN, ADMISSION = "0" * 32, Admission(Packing("fp32"))
MECHANISM = MechanismReport(noise_multiplier=1.0, sample_rate=0.1, steps=5)


def description(name: str, /, **changes: Any) -> SiteDescription:
    known: dict[str, Any] = {
        "site": name, "base_fingerprint": BASE, "initial_fingerprint": OTHER, "num_examples": 10, "mechanism": None,
        "seeded": True,
    }  # fmt: skip
    return SiteDescription(**{**known, **changes})


def make_round(config: RunConfig, sites: tuple[str, ...] = ("one", "two"), **changes: Any) -> Round:
    cohort = {site: Member(number, description(site, **changes)) for number, site in enumerate(sites)}
    return Round(1, cohort, ADAPTER, config, Admission.of(config), BASE, RUN)


def reply_to(current: Round, name: str, /, **changes: Any) -> bytes:
    request = parse_header(current.request(name)[0], TrainRequest)
    assert isinstance(request, TrainRequest)
    known: dict[str, Any] = {
        "site": name, "round": 1, "nonce": request.nonce, "base_fingerprint": BASE, "steps": 3,
        "train_loss": 0.7, "mechanism": None,
    }  # fmt: skip
    return header_bytes(TrainReply(**{**known, **changes}))


UPDATE = {name: torch.full_like(value, 0.5) for name, value in ADAPTER.items()}


def changed(**tensors: torch.Tensor | None) -> bytes:
    """The update with tensors replaced, or taken out where None; names with __ for the dots."""
    edited = {**UPDATE, **{name.replace("__", "."): value for name, value in tensors.items()}}
    return save({name: value for name, value in edited.items() if value is not None}, metadata={"codec": "fp32"})


def of_shape(*shape: int) -> bytes:
    """A safetensors file without data, whose one tensor says it has a shape of no elements."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}
    header = json.dumps({"x.lora_A.weight": tensor, "__metadata__": {"codec": "fp32"}}).encode()
    return struct.pack("<Q", len(header)) + header


HOSTILE_PAYLOADS: dict[str, tuple[bytes, str]] = {
    "extra key": (changed(extra=torch.ones(1)), "keys"),
    "missing key": (changed(x__lora_A__weight=None), "keys"),
    "renamed key": (changed(x__lora_A__weight=None, y__lora_A__weight=torch.ones(2, 3)), "keys"),
    "wrong shape": (changed(x__lora_A__weight=torch.ones(3, 2)), "shape"),
    "broadcastable shape": (changed(x__lora_A__weight=torch.ones(1, 3)), "shape"),
    "wrong dtype": (changed(x__lora_A__weight=torch.ones(2, 3, dtype=torch.float16)), "dtype"),
    "integers": (changed(x__lora_A__weight=torch.ones(2, 3, dtype=torch.int32)), "dtype"),
    "NaN": (changed(x__lora_A__weight=torch.full((2, 3), float("nan"))), "non_finite"),
    "infinity": (changed(x__lora_A__weight=torch.full((2, 3), float("inf"))), "non_finite"),
    "huge": (changed(x__lora_A__weight=torch.full((2, 3), 1e30)), "range"),
    "oversized": (changed(extra=torch.ones(100_000)), "oversized"),
    "nothing": (b"", "malformed"),
    "garbage": (b"\x80\x04\x95" + b"garbage" * 9, "malformed"),
    "header too long": (b"\xff" * 8 + b"{}", "malformed"),
    "cut short": (encode(UPDATE, "fp32")[:-5], "malformed"),
    "another codec": (encode(UPDATE, "bf16"), "codec"),
    "no codec": (save(UPDATE), "codec"),
    "dimension beyond int64": (of_shape(0, 2**64 - 1), "malformed"),
    "dimension of 2^63": (of_shape(2**63, 0), "malformed"),
    "dimension of 2^62": (of_shape(0, 2**62, 8), "malformed"),
}


@pytest.mark.parametrize("attack", HOSTILE_PAYLOADS)
def test_hostile_payload_is_rejected_with_its_reason_and_the_round_goes_on(
    make_config: Callable[..., RunConfig], attack: str
) -> None:
    payload, reason = HOSTILE_PAYLOADS[attack]
    current = make_round(make_config())
    outcome = current.take("one", reply_to(current, "one"), payload)
    assert outcome.status == "rejected"
    assert str(outcome.reason).startswith(f"{reason}:")
    assert current.take("two", reply_to(current, "two"), encode(UPDATE, "fp32")).status == "admitted"
    adapter = current.finish()
    for name, value in ADAPTER.items():
        torch.testing.assert_close(adapter[name], value + 0.5)


HOSTILE_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "another site's name": ({"site": "two"}, "site"),
    "old round": ({"round": 2}, "round"),
    "replayed nonce": ({"nonce": "0" * 32}, "nonce"),
    "another base": ({"base_fingerprint": OTHER}, "base"),
    "noise nobody planned": ({"mechanism": MECHANISM, "train_loss": None}, "mechanism"),
}


@pytest.mark.parametrize("attack", HOSTILE_HEADERS)
def test_hostile_header_is_rejected_with_its_reason(make_config: Callable[..., RunConfig], attack: str) -> None:
    changes, reason = HOSTILE_HEADERS[attack]
    current = make_round(make_config())
    outcome = current.take("one", reply_to(current, "one", **changes), encode(UPDATE, "fp32"))
    assert outcome.status == "rejected"
    assert str(outcome.reason).startswith(f"{reason}:")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b'{"kind": "update"}',
        b"[" * 70_000,
        b"x" * 70_000,
        json.dumps({"a": 1}).encode(),
    ],
)
def test_broken_header_is_rejected(make_config: Callable[..., RunConfig], header: bytes) -> None:
    current = make_round(make_config())
    assert str(current.take("one", header, b"").reason).startswith("header:")


def test_unknown_header_field_is_refused() -> None:
    with pytest.raises(WireError):
        parse_header(b'{"kind":"refusal","protocol":1,"code":"data","place":"","text":"private"}', TrainReply)


def test_refusal_is_recorded_with_its_code(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config())
    outcome = current.take("one", header_bytes(Refusal(code="privacy", place="client/app.py:7")), b"")
    assert outcome.reason == "refused: the site refused with 'privacy' at client/app.py:7"


def test_loss_under_privacy_is_rejected(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config(privacy={"unit": "example"}), mechanism=MECHANISM)
    leaky = current.take("one", reply_to(current, "one", mechanism=MECHANISM), encode(UPDATE, "fp32"))
    assert str(leaky.reason).startswith("loss:")
    quiet = reply_to(current, "two", mechanism=MECHANISM, train_loss=None)
    assert current.take("two", quiet, encode(UPDATE, "fp32")).status == "admitted"


def test_site_counts_once(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config())
    payload = encode(UPDATE, "fp32")
    first = current.take("one", reply_to(current, "one"), payload)
    assert current.take("one", reply_to(current, "one"), payload) is first
    current.take("two", reply_to(current, "two"), encode(ADAPTER, "fp32"))
    expected = (UPDATE["x.lora_A.weight"] + ADAPTER["x.lora_A.weight"]) / 2 + 1
    torch.testing.assert_close(current.finish()["x.lora_A.weight"], expected)


def test_weights_are_the_declared_ones(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"weights": "examples"})
    cohort = {site: Member(n, description(site, num_examples=n)) for n, site in ((1, "one"), (3, "three"))}
    current = Round(1, cohort, ADAPTER, config, ADMISSION, BASE, RUN)
    zero = {name: torch.zeros_like(value) for name, value in ADAPTER.items()}
    current.take("one", reply_to(current, "one"), encode(UPDATE, "fp32"))
    current.take("three", reply_to(current, "three"), encode(zero, "fp32"))
    torch.testing.assert_close(current.finish()["x.lora_A.weight"], ADAPTER["x.lora_A.weight"] + 0.125)


def test_too_few_updates_end_the_round_and_say_why(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config(federation={"min_sites": 2}))
    current.take("one", reply_to(current, "one"), encode(UPDATE, "fp32"))
    with pytest.raises(RunError, match=r"1 usable updates; expected at least 2 .* 'two', no reply"):
        current.finish()


def test_record_counts_the_bytes_that_were_sent(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config())
    header, payload = reply_to(current, "one"), encode(UPDATE, "fp32")
    current.take("one", header, payload)
    current.take("two", reply_to(current, "two"), payload)
    site = current.record()["sites"]["one"]
    assert site["bytes_up"] == len(header) + len(payload)
    assert site["bytes_down"] == sum(map(len, current.request("one")))


def test_virtual_and_real_sites_do_not_mix(make_config: Callable[..., RunConfig]) -> None:
    mixed = {1: description("one"), 2: description("two", seeded=False)}
    members, left_out = admit_members(mixed, make_config(), BASE, OTHER)
    assert list(members) == ["two"]
    assert "virtual sites or real ones" in left_out[1]
    for seeded, what in ((True, "draws"), (False, "does not draw")):
        known = [Member(9, description("nine", seeded=not seeded))]
        members, left_out = admit_members(
            {1: description("one", seeded=seeded)}, make_config(), BASE, OTHER, None, known
        )
        assert members == {}
        assert f"'one' {what} its noise from the run's seed" in left_out[1]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"base_fingerprint": OTHER}, "base model"),
        ({"initial_fingerprint": BASE}, "initial adapter"),
        ({"mechanism": MECHANISM}, "privacy unit"),
        ({"num_examples": None}, "number of rows"),
        ({"site": "two"}, "two nodes"),
    ],
)
def test_member_that_does_not_fit_is_left_out(
    make_config: Callable[..., RunConfig], changes: dict[str, Any], rule: str
) -> None:
    config = make_config(aggregation={"weights": "examples"})
    told = {1: description("one", **changes), 2: description("two"), 3: description("three")}
    members, left_out = admit_members(told, config, BASE, OTHER)
    assert rule in left_out[1]
    assert list(members) == (["three"] if changes.get("site") == "two" else ["three", "two"])
    expect_members(len(members), left_out, config)
    with pytest.raises(RunError, match=rule):
        expect_members(len(members), left_out, config, everyone=True)
    with pytest.raises(RunError, match=f"0 sites can take part; expected at least 1 .* First of .* left out: .*{rule}"):
        expect_members(0, left_out, config)


def test_site_speaks_for_itself_alone(make_config: Callable[..., RunConfig]) -> None:
    told = {1: description("one"), 2: description("two"), 3: description("one")}
    members, left_out = admit_members(told, make_config(), BASE, OTHER, {1: "one", 2: "two", 3: "hostile"})
    assert {name: member.node_id for name, member in members.items()} == {"one": 1, "two": 2}
    assert "otherwise than its key was enrolled" in left_out[3]
    members, left_out = admit_members(told, make_config(), BASE, OTHER)
    assert list(members) == ["two"]
    assert left_out.keys() == {1, 3}


def test_cohort_repeats_and_varies_by_round(make_config: Callable[..., RunConfig]) -> None:
    names = [f"site {number}" for number in range(20)]
    config = make_config(federation={"sites_per_round": 5})
    cohorts = [tuple(sample_cohort(names, config, number)) for number in range(1, 30)]
    assert cohorts == [tuple(sample_cohort(names[::-1], config, number)) for number in range(1, 30)]
    assert len(set(cohorts)) > 20
    assert {len(set(cohort)) for cohort in cohorts} == {5}
    assert sample_cohort(names, make_config(), 1) == sorted(names)


def test_every_site_has_its_turn_early_and_late_where_fewer_may_work_than_there_are(
    make_config: Callable[..., RunConfig],
) -> None:
    names = [f"site {number:02d}" for number in range(20)]
    config = make_config(federation={"mode": "async", "buffer_size": 2, "sites_per_round": 10})
    turns = [sample_cohort(names, config, number) for number in range(1, 60)]
    assert all(sorted(order) == names for order in turns)
    assert turns == [sample_cohort(names[::-1], config, number) for number in range(1, 60)]
    assert all(10 < sum(order.index(name) < 10 for order in turns) < 50 for name in names)
