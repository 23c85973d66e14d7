"""Engines that are started once for many tests, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from common.codecs.codec import encode
from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.methods import trained_names
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.wire import TrainRequest, header_bytes
from simulations.engines.catalog import open_engine
from simulations.engines.engine import Answer, Engine, Request
from simulations.engines.settings import EngineSettings
from tests.conftest import config_text

SITES = 3
RAY_MARKS = (
    pytest.mark.slow,
    # Not importorskip: the engine sets Ray's environment before it imports it.
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own log files
)
TICKETS = count(1_000_000)
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp", "delta": 1e-3, "sample_rate": 0.5}


@dataclass(frozen=True)
class Bench:
    """An engine for the sites of a run config."""

    engine: Engine
    config: RunConfig

    def ask(self, requests: list[Request]) -> dict[int, Answer]:
        """Submit and collect until nothing is left; every ticket comes back once."""
        answers = self.ask_more(requests, outstanding=0)
        assert answers.keys() == {request.ticket for request in requests}
        return answers

    def ask_more(self, requests: list[Request], outstanding: int) -> dict[int, Answer]:
        """Submit beside ``outstanding`` older ones and collect until none is left."""
        self.engine.submit(requests)
        answers: dict[int, Answer] = {}
        while len(answers) < len(requests) + outstanding:
            found = self.engine.collect()
            assert found
            for answer in found:
                assert answer.ticket not in answers
                answers[answer.ticket] = answer
        return answers


@pytest.fixture(scope="session")
def config_of(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Callable[[bool], RunConfig]:
    """The run config of all these tests, without and with DP."""
    folder = tmp_path_factory.mktemp("engines")

    def make(private: bool) -> RunConfig:
        privacy: dict[str, Any] = PRIVATE if private else {"unit": "none"}
        sections = {"privacy": privacy, "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1}}
        return parse_run_config(config_text(folder, tiny_models["bert"], **sections), "test", None)

    return make


@contextmanager
def open_bench(settings: EngineSettings, config: RunConfig) -> Iterator[Bench]:
    """Open an engine and close it."""
    with closing(open_engine(settings, config, SITES, "cpu")) as engine:
        yield Bench(engine, config)


def train_requests(config: RunConfig, number: int) -> list[Request]:
    """``number`` train messages to the sites in turn, each with a nonce of its own."""
    model = resident_model(config, "cpu")
    start = initial_adapter(model, config.seed)
    payload = encode({name: start[name] for name in trained_names(config, start)}, config.communication.codec)
    headers = [
        header_bytes(
            TrainRequest(
                config_digest=config.digest(), run="0" * 32, round=1 + index // SITES % 2, nonce=f"{index:032x}",
                base_fingerprint=model.base.fingerprint,
            )
        )
        for index in range(number)
    ]  # fmt: skip
    return [Request(next(TICKETS), index % SITES, "train", header, payload) for index, header in enumerate(headers)]
