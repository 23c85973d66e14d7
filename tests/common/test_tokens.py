from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.run import RunConfig
from common.data import tokens
from common.data.batches import TokenRow
from common.data.federated import load_federated_data
from common.data.token_table import JoinedRows, TokenTable
from common.data.tokens import FederatedTokens, load_federated_tokens, table_fingerprint, token_table
from common.evaluation import Evaluator
from common.models.adapter import initial_adapter
from common.models.base import load_tokenizer
from common.models.resident import resident_model
from common.tasks.catalog import TASKS

Make = Callable[..., RunConfig]


def load(config: RunConfig, cache: Path | None) -> FederatedTokens:
    load_federated_tokens.cache_clear()
    return load_federated_tokens(config.data, config.seed, Path(config.model.source), cache)


def same(first: TokenRow, second: TokenRow) -> bool:
    alike = first.input_ids.dtype == second.input_ids.dtype and first.targets.dtype == second.targets.dtype
    return alike and torch.equal(first.input_ids, second.input_ids) and torch.equal(first.targets, second.targets)


CASES: dict[str, dict[str, Any]] = {
    "column": {},
    "held out": {"test": None, "test_fraction": 0.3},
    "capped": {"max_rows_per_site": 5, "max_test_rows": 4},
    "dirichlet": {"partition": {"kind": "dirichlet", "sites": 3, "alpha": 5.0}},
    "persons": {"person_field": "site", "partition": {"kind": "iid", "sites": 4}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [False, True])
def test_tokens_are_those_of_the_examples(make_config: Make, tmp_path: Path, case: str, kept: bool) -> None:
    config = make_config(data=CASES[case])
    read, tokenizer = load_federated_data(config.data, config.seed), load_tokenizer(Path(config.model.source))
    for _ in range(2):
        found = load(config, tmp_path / "cache" if kept else None)
        assert found.sites == read.sites
        assert found.shared_with_test == read.shared_with_test
        for ours, part in ((found.train, read.train), (found.test, read.test)):
            assert list(ours) == list(part)
            for site, examples in part.items():
                expected = TASKS["classification"].tokenise(examples, tokenizer, config.data)
                assert all(same(row, other) for row, other in zip(ours[site], expected, strict=True))
                assert ours[site].lengths == tuple(map(len, expected))
                assert ours[site].num_units("user") == len({example.person for example in examples})


def test_causal_rows_survive_the_table(make_config: Make, tmp_path: Path) -> None:
    config = make_config("gpt2", "causal_lm")
    examples = load_federated_data(config.data, config.seed).train["site 1"]
    expected = TASKS["causal_lm"].tokenise(examples, load_tokenizer(Path(config.model.source)), config.data)
    rows = load(config, tmp_path / "cache").train["site 1"]
    assert all(same(row, other) for row, other in zip(rows, expected, strict=True))
    assert [len(row) for row in rows[2:5]] == list(map(len, expected[2:5]))


def fingerprint(config: RunConfig) -> str | None:
    return table_fingerprint(config.data.train, config.data, "data.train", Path(config.model.source))


def test_fingerprint_follows_what_shapes_tokens_and_nothing_else(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    first = fingerprint(config)
    assert first == fingerprint(config.model_copy(update={"seed": 5}))
    others = [make_config(data={"max_length": 20}), make_config(data={"text_field": "site"}), make_config("roberta"),
              make_config(data={"partition": {"kind": "iid", "sites": 2}})]  # fmt: skip
    found = [fingerprint(other) for other in others]
    assert (
        found[2] != first
        or (Path(others[2].model.source) / "config.json").read_bytes()
        == (Path(config.model.source) / "config.json").read_bytes()
    )
    assert first not in (found[0], found[1], found[3])
    assert found[3] == fingerprint(make_config(data={"partition": {"kind": "dirichlet", "sites": 3}}))
    train = Path(config.data.train)
    train.write_text(train.read_text().replace("knee", "hip", 1))
    assert fingerprint(config) != first
    hub = config.data.model_copy(update={"train": "hub:some/data"})
    assert table_fingerprint("hub:some/data", hub, "data.train", Path(config.model.source)) is None


def table(config: RunConfig, cache: Path) -> TokenTable:
    return token_table(config.data.train, config.data, "data.train", Path(config.model.source), cache)


def test_second_start_neither_reads_nor_tokenises(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    first = table(config, tmp_path / "cache")
    monkeypatch.setattr(tokens, "load_tokenizer", lambda folder: pytest.fail("tokenised again"))
    again = table(config, tmp_path / "cache")
    assert np.array_equal(again.input_ids, first.input_ids)
    assert isinstance(again.input_ids.base, np.memmap)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "cache" / "tokens").iterdir())
    assert (tmp_path / "cache" / "tokens").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest", "no manifest"])
def test_damaged_table_is_made_again(
    make_config: Make, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    kept = np.array(table(config, tmp_path).input_ids)
    (place,) = (tmp_path / "tokens").iterdir()
    ids, manifest = place / "input_ids.npy", place / "manifest.json"
    content = ids.read_bytes()
    {
        "cut": lambda: ids.write_bytes(content[:-40]),
        "flipped": lambda: ids.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        "gone": ids.unlink,
        "manifest": lambda: manifest.write_text("{"),
        "no manifest": manifest.unlink,
    }[damage]()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(table(config, tmp_path).input_ids, kept)
    assert "are damaged" in caplog.text
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [place.name]


def _race(config: RunConfig, cache: Path, gate: Any, answers: Any) -> None:
    gate.wait()
    answers.put(int(np.sum(table(config, cache).input_ids)))


@pytest.mark.slow
def test_two_processes_that_make_one_table_agree(make_config: Make, tmp_path: Path) -> None:
    config, ways = make_config(), multiprocessing.get_context("spawn")
    gate, answers = ways.Barrier(2), ways.Queue()
    racing = [ways.Process(target=_race, args=(config, tmp_path, gate, answers)) for _ in range(2)]
    for process in racing:
        process.start()
    sums = {answers.get(timeout=120) for _ in racing}
    for process in racing:
        process.join()
    assert sums == {int(np.sum(table(config, tmp_path).input_ids))}
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_cache_that_cannot_be_used_is_said_and_not_needed(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert load(make_config(), tmp_path / "file").sites == ("site 0", "site 1", "site 2")
    assert "cannot be used" in caplog.text


def test_rows_joined_are_the_rows_in_turn(make_config: Make) -> None:
    found = load(make_config(), None)
    joined = JoinedRows([found.train[site] for site in found.sites])
    expected = [row for site in found.sites for row in found.train[site]]
    assert len(joined) == len(expected)
    assert all(same(joined[index], row) for index, row in enumerate(expected))
    assert same(joined[-1], expected[-1])
    with pytest.raises(IndexError):
        joined[len(expected)]


def test_evaluation_of_tokens_is_that_of_examples(make_config: Make) -> None:
    config = make_config()
    model = resident_model(config)
    adapter = initial_adapter(model, config.seed)
    read = Evaluator(model, config, load_federated_data(config.data, config.seed).test)(adapter)
    assert Evaluator(model, config, load(config, None).test)(adapter) == read
