"""A hostile run config: whatever it asks, its refusals say nothing of a row, a path or a model of the site."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MessageType

import client.site
from client.agreement import agreed_config
from client.site import read_site_rows
from client.site_config import load_site_config
from common.data.partition import PARTITIONERS
from common.errors import DataError, PrivacyError
from common.wire import DescribeRequest, Refusal, SiteDescription, TrainReply, header_bytes, parse_header
from tests.client.real_sites import PRIVATE, RealSite
from tests.conftest import write_rows

MakeSite = Callable[..., RealSite]
USER = PRIVATE | {"unit": "user"}


def asked(site: RealSite) -> bytes:
    """The header of the site's reply to a describe request."""
    request = header_bytes(DescribeRequest(config_digest=site.config.digest()))
    return site.send(request, b"", MessageType.QUERY)[0]


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"labels": ["heart", "skin", "bones", "rare"]}, "data.labels"),
        ({"labels": ["skin", "heart", "bones"]}, "data.labels"),
        ({"text_field": "patient"}, "data.text_field"),
        ({"label_field": "site"}, "data.label_field"),
        ({"task": "causal_lm", "labels": None}, "data.task"),
    ],
)
def test_run_that_asks_for_other_rows_is_refused_before_one_is_read(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], key: str
) -> None:
    site = make_site(family="gpt2", data=data)
    site.write(rows={"task": "classification", "labels": ["heart", "skin", "bones"]})
    monkeypatch.setattr(client.site, "read_rows", lambda *arguments: pytest.fail("a row was read"))
    with pytest.raises(PrivacyError, match=f"^{key} of the run is .*; expected ") as caught:
        read_site_rows(site.config, load_site_config(site.path))
    assert "\n" not in str(caught.value)
    reply = site.describe()
    assert isinstance(reply, Refusal)
    assert reply.code == "privacy"
    assert site.train(1)[0] == reply


@pytest.mark.parametrize("own", [None, "patient"])
def test_run_never_chooses_the_person(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    site = make_site(USER, data={"person_field": "text"})
    site.write(person_field=own)
    monkeypatch.setattr(client.site, "read_rows", lambda *arguments: pytest.fail("a row was read"))
    with pytest.raises(PrivacyError, match=r"^data\.person_field of the run is 'text'"):
        read_site_rows(site.config, load_site_config(site.path))
    reply = site.describe()
    assert isinstance(reply, Refusal)
    assert reply.code == "privacy"


def test_run_for_records_names_no_person_at_a_site_that_names_none(make_site: MakeSite) -> None:
    site = make_site(data={"person_field": "text"})
    site.write(person_field=None)
    assert read_site_rows(site.config, load_site_config(site.path)).persons is None


BROKEN = {
    "label": lambda rows: rows[3].update(label="unheard of"),
    "no text": lambda rows: rows[5].pop("text"),
    "blank": lambda rows: rows[7].update(text=" "),
    "number": lambda rows: rows[9].update(text=7),
    "surrogate": lambda rows: rows[11].update(text="\ud800"),
    "person": lambda rows: rows[2].update(patient=None),
    "empty file": lambda rows: rows.clear(),
}


def test_all_broken_rows_give_the_same_bytes(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    replies = set()
    for spoil in BROKEN.values():
        rows = [dict(row) for row in site.rows]
        spoil(rows)
        write_rows(site.data, rows)
        replies.add(asked(site))
    for text in ("{", "[1]", '{"text": "\ufffe"}', "\x00"):
        site.data.write_text(text)
        replies.add(asked(site))
    site.data.write_bytes(b"\xff\xfe")
    replies.add(asked(site))
    site.data.unlink()
    replies.add(asked(site))
    write_rows(site.data, site.rows)
    for error in (ValueError("row 7"), MemoryError(), DataError("row 8"), RecursionError()):
        monkeypatch.setattr(type(site.model.base.tokenizer), "__call__", _raising(error))
        replies.add(asked(site))
    assert replies == {header_bytes(Refusal(code="site_data", place=""))}
    header, _ = site.train(1)
    assert header == Refusal(code="site_data", place="")


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    return fail


def test_broken_row_is_named_in_the_sites_own_log(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site()
    write_rows(site.data, [row | {"label": "odd"} if index == 4 else row for index, row in enumerate(site.rows)])
    with caplog.at_level(logging.ERROR, "client.agent.resident"):
        site.describe()
    assert "own.jsonl line 5: label 'odd'" in caplog.text


def test_partition_of_the_run_is_not_applied(make_site: MakeSite) -> None:
    for kind in sorted(PARTITIONERS):
        more = {"partitioner": "linear"} if kind == "flower" else {}
        site = make_site(data={"partition": {"kind": kind, "sites": 2, **more}})
        assert isinstance(site.describe(), SiteDescription)
    site = make_site(data={"partition": {"kind": "column", "column": "patient"}})
    write_rows(site.data, [row | {"patient": "p" * (129 + index)} for index, row in enumerate(site.rows)])
    assert isinstance(site.describe(), SiteDescription)


def test_real_site_leaves_no_tokens_on_disk(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    site = make_site()
    before = {path for path in tmp_path.rglob("*") if path.suffix == ".npy"}
    assert isinstance(site.describe(), SiteDescription)
    assert not (tmp_path / "cache").exists()
    assert {path for path in tmp_path.rglob("*") if path.suffix == ".npy"} == before == set()


@pytest.mark.parametrize("source", ["hub", "absent", "elsewhere"])
def test_run_never_chooses_the_model(
    make_site: MakeSite, tmp_path: Path, tiny_models: dict[str, Path], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.models.folder._snapshot", lambda config: pytest.fail("a hub was asked"))
    site = make_site()
    named = {"hub": "hub:owner/name", "absent": str(tmp_path / "nothing"), "elsewhere": str(tiny_models["gpt2"])}
    model = {"source": named[source]} | ({"revision": "0" * 40} if source == "hub" else {})
    site.config = site.config.model_validate(site.config.model_dump() | {"model": model})
    assert isinstance(site.describe(), SiteDescription)
    assert isinstance(site.train(1)[0], TrainReply)
    assert site.own_model().base.folder == tiny_models["bert"]


def test_agreed_config_keeps_what_is_the_runs_and_agrees_with_itself(
    make_site: MakeSite, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    site = make_site(model={"pooling": "mean", "dtype": "fp32"}, data={"max_length": 17})
    own = load_site_config(site.path)
    agreed = agreed_config(site.config, own)
    assert (agreed.model.pooling, agreed.model.dtype, agreed.data.max_length) == ("mean", "fp32", 17)
    assert (agreed.data.train, agreed.data.test) == (str(site.data), None)
    assert agreed_config(agreed, own) == agreed
    rest = {"model", "data"}
    assert agreed.model_dump(exclude=rest) == site.config.model_dump(exclude=rest)


def test_site_reads_no_file_that_flowers_run_config_names(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site()
    replies = []
    for name in (tmp_path / "absent.yaml", site.data, site.path):
        for text in ({}, {"config-yaml": " "}, {"config-yaml": 7}):
            site.flower_config = {"config-file": str(name), **text}
            replies.append(asked(site))
    (reply,) = {parse_header(header, SiteDescription) for header in replies}
    assert isinstance(reply, Refusal)
    assert reply.code == "config"
