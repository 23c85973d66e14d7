"""Nothing private leaves a site: fifty planted strings and numbers are looked for in all that leaves or is written.

Real sites (files, ledgers and noise of their own) run on the virtual grid under DP, with debug logging. Looked through
are Flower's messages as they are serialised, the run folder, what is printed, every log record, and the errors of the
coordinator. Private are texts, other fields, person ids, paths, numbers of rows and persons, losses, gradient norms.
A site's own log and ledger stay there: they may name the file and count its rows, but hold no text and no person.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message
from flwr.common.serde import message_to_proto

import client.answers
import client.dp.step
from client.agent.resident import ResidentSite
from client.app import config_bytes
from client.ledger.ledger import Ledger
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import DataError, FedtuneError
from common.flower_keys import CONFIG_YAML
from common.flower_records import from_records, to_records
from common.run_folder import RunFolder
from server.federation import RunSettings, run_federation
from simulations.engines.app_handler import FIRST_NODE_ID, AppHandler
from simulations.engines.inprocess import InProcessEngine
from simulations.grid import VirtualGrid
from tests.conftest import LABELS, label_rows, write_rows

ROWS = (137, 211, 173)
PERSONS = (61, 83, 47)
CANARIES = tuple(f"zqx{number:02d}{word}" for number, word in enumerate(("wombat", "quokka", "numbat", "dunnart") * 11))
NUMBERS = ("481516234", "602214076", "299792458", "662607015", "141421356", "577215664")
INSIDE = (*CANARIES[3:10], *CANARIES[13:], *NUMBERS)
"""Those in texts, fields and person ids; the others name files and folders."""
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "sample_rate": 0.1, "accountant": "rdp", "delta": 1e-4}


class Sites:
    """Three real sites behind the virtual grid, and a record of what passes, by node.

    Attributes:
        spoken: every message as Flower serialises it, requests and replies.
        values: losses and gradient norms seen while training.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.spoken: list[bytes] = []
        self.values: list[float] = []
        self._paths = [self._make(number) for number in range(len(ROWS))]
        self._residents = {path: ResidentSite(path) for path in self._paths}

    def federate(self) -> None:
        handler = AppHandler(self._answer, len(ROWS), {CONFIG_YAML: dump_run_config(self.config)}, "cpu")
        grid = VirtualGrid(InProcessEngine(handler), len(ROWS))
        run_federation(grid, self.config, RunSettings(RunFolder(self.folder / "run"), device="cpu"))

    def data(self, number: int) -> Path:
        return self._paths[number].parent / f"{CANARIES[number]}.jsonl"

    def ledgers(self) -> bytes:
        folders = [path.parent / "ledger" for path in self._paths]
        return b"\n".join(file.read_bytes() for folder in folders for file in sorted(folder.rglob("*")))

    def _make(self, number: int) -> Path:
        """A site whose folder and file are named by canaries; the others stand in texts, fields and person ids."""
        folder = self.folder / CANARIES[10 + number]
        (folder / "ledger").mkdir(parents=True)
        rows = [
            row | {"person": f"{INSIDE[index % PERSONS[number] % len(INSIDE)]}-{index % PERSONS[number]}", "note": note}
            for index, row in enumerate(label_rows(ROWS[number]))
            for note in [INSIDE[(index + 5) % len(INSIDE)]]
        ]
        for index, row in enumerate(rows):
            row["text"] = f"{INSIDE[index % len(INSIDE)]} {row['text']} {INSIDE[(7 * index) % len(INSIDE)]}"
        write_rows(folder / f"{CANARIES[number]}.jsonl", rows)
        values = {
            "name": f"ward {number}", "data": f"{CANARIES[number]}.jsonl", "ledger": "ledger/spent.db",
            "device": "cpu", "person_field": "person", "budget": {"epsilon": 900.0, "delta": 1e-4},
            "model": self.config.model.source, "rows": {"task": "classification", "labels": LABELS},
            "policy": {"metrics": ["train_loss", "clip_norm"]},
        }  # fmt: skip
        (folder / "site.yaml").write_text(yaml.safe_dump(values))
        Ledger(folder / "ledger" / "spent.db").create()
        return folder / "site.yaml"

    def _answer(self, message: Message, context: Context) -> Message:
        path = self._paths[message.metadata.dst_node_id - FIRST_NODE_ID]
        header, payload = from_records(message.content)
        config = config_bytes(context.run_config)
        answered = self._residents[path].answer(message.metadata.message_type, config, header, payload)
        reply = Message(to_records(*answered), reply_to=message)
        self.spoken += [message_to_proto(said).SerializeToString() for said in (message, reply)]
        return reply


TELLING = (1e-3, 1e6)
"""Private floats that are looked for; others, such as 0, occur everywhere."""

pytestmark = pytest.mark.slow
MakeSites = Callable[..., Sites]
Look = Callable[..., None]


@pytest.fixture
def make_sites(make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSites:
    """Make sites that note the losses and gradient norms of their training."""

    def make(privacy: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> Sites:
        user = (privacy or {}).get("unit") == "user"  # the coordinator's own test rows name no person
        by_person = {"data": {"person_field": "person"}, "evaluation": {"enabled": False}} if user else {}
        config = make_config(
            privacy=PRIVATE | (privacy or {}), training={"local_steps": 4} | (training or {}),
            **by_person,
        )  # fmt: skip
        made = Sites(config, tmp_path)
        micro_batch, joint_norm = client.dp.step.DpStep.micro_batch, client.dp.step.joint_norm

        def noting_losses(self: Any, losses: torch.Tensor, *rest: Any) -> None:
            made.values += losses.detach().tolist()
            micro_batch(self, losses, *rest)

        def noting_norms(parts: Any) -> torch.Tensor:
            found = joint_norm(parts)
            made.values += [value for norms in (*parts, found) for value in norms.tolist()]
            return found

        monkeypatch.setattr(client.dp.step.DpStep, "micro_batch", noting_losses)
        monkeypatch.setattr(client.dp.step, "joint_norm", noting_norms)
        return made

    return make


@pytest.fixture
def look(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Look:
    """Look through everything that left or was written; a site's own log may be left out, see the test."""
    caplog.set_level(logging.DEBUG)

    def through(sites: Sites, *, site_log: bool = True) -> None:
        assert_nothing_left(sites, caplog.records, "".join(capfd.readouterr()), site_log=site_log)

    return through


def assert_no_canary(where: str, said: bytes, canaries: Sequence[str] = (*CANARIES, *NUMBERS)) -> None:
    found = [canary for canary in canaries if canary.encode() in said]
    assert not found, f"{where} holds {found}"


def assert_no_private_number(where: str, text: str, values: list[float]) -> None:
    """No number of rows or persons as a word, no loss or norm to nine digits or more."""
    counts = {str(count) for count in (*ROWS, *PERSONS)}
    text = re.sub(r"\w+\.py:\d+", "", text)
    words = re.findall(r"(?<![\w.+-])\d+(?:\.\d+)?(?![\w])", text)
    assert not counts & set(words), f"{where} holds {counts & set(words)}"
    spelt = {f"{value:.9g}"[:-1] for value in values if TELLING[0] < abs(value) < TELLING[1]}
    numbers = {f"{float(word):.9g}"[:-1] for word in words if "." in word}
    assert not spelt & numbers, f"{where} holds {spelt & numbers}"


def assert_nothing_left(sites: Sites, log: list[logging.LogRecord], printed: str, *, site_log: bool) -> None:
    doubles = [struct.pack("<d", value) for value in sites.values if TELLING[0] < abs(value) < TELLING[1]]
    for number, said in enumerate(sites.spoken):
        assert_no_canary(f"message {number}", said)
        assert_no_private_number(f"message {number}", header_of(said), sites.values)
        assert not any(double in said for double in doubles), f"message {number} holds a private float"
    for path in (sites.folder / "run").rglob("*"):
        if path.is_file() and path.name != "config.yaml":
            assert_no_canary(path.name, path.read_bytes())
            if path.suffix != ".safetensors":
                assert_no_private_number(path.name, path.read_text(encoding="utf-8"), sites.values)
    for record in log:
        shown = logging.Formatter("%(name)s %(message)s").format(record)
        if not record.name.startswith("client."):
            assert_no_canary(f"log of {record.name}", shown.encode())
            assert_no_private_number(f"log of {record.name}", shown, sites.values)
        elif site_log:
            assert_no_canary(f"log of {record.name}", shown.encode(), INSIDE)
    assert_no_canary("output", printed.encode())
    assert_no_canary("a ledger", sites.ledgers(), INSIDE)


def header_of(said: bytes) -> str:
    """The printable parts of a serialised message that are JSON headers."""
    return " ".join(match.decode() for match in re.findall(rb'\{"kind"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', said))


@pytest.mark.parametrize(
    "privacy", [{}, {"unit": "user"}, {"clipping": "adaptive"}], ids=["example", "user", "adaptive"]
)
def test_nothing_private_leaves_a_run(make_sites: MakeSites, look: Look, privacy: dict[str, Any]) -> None:
    sites = make_sites(privacy)
    sites.federate()
    assert len(sites.spoken) == 2 * 3 * (1 + 2)  # request and reply, three sites, a description and two rounds
    assert len(sites.values) > 100
    look(sites)


@pytest.mark.parametrize("failure", [ValueError, DataError, MemoryError])
def test_error_inside_training_leaves_nothing_but_its_code_and_place(
    make_sites: MakeSites, look: Look, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    sites = make_sites()
    real, secret = client.answers.train_locally, f"row 7 is {CANARIES[20]} with loss {NUMBERS[0]} of {ROWS[1]} rows"

    def failing(model: Any, site: Any, *rest: Any) -> Any:
        if site.name == "ward 1":
            raise failure(secret) from KeyError(secret)
        return real(model, site, *rest)

    monkeypatch.setattr(client.answers, "train_locally", failing)
    sites.federate()
    rounds = [record for record in RunFolder(sites.folder / "run").records() if record["kind"] == "round"]
    assert [record["sites"]["ward 1"]["status"] for record in rounds] == ["rejected"] * 2
    look(sites, site_log=failure is not DataError)


@pytest.mark.parametrize("broken", [{"text": None}, {"label": CANARIES[30]}], ids=["no text", "odd label"])
def test_broken_row_leaves_its_site_out_without_being_quoted(
    make_sites: MakeSites, look: Look, broken: dict[str, Any]
) -> None:
    sites = make_sites()
    rows = [json.loads(line) for line in sites.data(1).read_text().splitlines()]
    rows[99] |= broken
    write_rows(sites.data(1), rows)
    sites.federate()
    start = next(iter(RunFolder(sites.folder / "run").records()))
    (reason,) = start["left_out"].values()
    assert "'site_data' at unknown" in reason
    assert_no_canary("the reason", reason.encode())
    assert_no_private_number("the reason", reason, sites.values)
    look(sites, site_log="label" not in broken)


def test_diverging_sites_end_the_run_without_a_private_number(make_sites: MakeSites, look: Look) -> None:
    sites = make_sites(training={"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(FedtuneError) as caught:
        sites.federate()
    assert_no_canary("the coordinator's error", str(caught.value).encode())
    look(sites)


@pytest.mark.parametrize(
    "leak",
    [
        f'{{"kind":"update","note":"{CANARIES[40]}"}}',
        f'{{"kind":"update","num_examples":{ROWS[0]}}}',
        '{"kind":"update","train_loss":0.123456789012}',
        struct.pack("<d", 0.123456789012).decode("latin-1"),
    ],
    ids=["text", "rows", "loss", "float"],
)
def test_search_finds_what_is_planted(make_sites: MakeSites, look: Look, leak: str) -> None:
    sites = make_sites()
    sites.values.append(0.123456789012)
    look(sites)
    sites.spoken.append(b"\x00\xff" + leak.encode("latin-1") + b"\xff")
    with pytest.raises(AssertionError):
        look(sites)
