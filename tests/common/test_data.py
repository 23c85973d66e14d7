from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.data import DataConfig, PartitionConfig
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.data.partition import PARTITIONERS, Part
from common.data.readers import read_examples
from common.errors import DataError, FedtuneError


def classification(path: Path, **keys: Any) -> DataConfig:
    return DataConfig(task="classification", train=str(path), labels=("a", "b"), **keys)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def part(labels: Any, name: str = "train", texts: list[str] | None = None) -> Part:
    return Part(name, np.asarray(labels, dtype=np.int64), 4, lambda: texts or [])


GOOD = {"text": "hello", "label": "a", "site": "x"}


def test_reads_jsonl_with_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD)).encode())
    assert len(read_examples(str(path), classification(path), "data.train")) == 2


def test_reads_csv_with_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label,site\n"two\nlines, one row",b,x\n', encoding="utf-8")
    (example,) = read_examples(str(path), classification(path), "data.train")
    assert example.prompt == "two\nlines, one row"
    assert example.label == 1


def test_reads_a_hub_data_set_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", GOOD, {**GOOD, "label": "b"})
    source = f"hub:{tmp_path / 'set'}#train"
    assert [e.label for e in read_examples(source, classification(Path("x")), "data.train")] == [0, 1]
    with pytest.raises(DataError, match="cannot be loaded"):
        read_examples(f"hub:{tmp_path / 'set'}#nope", classification(Path("x")), "data.train")


BAD_ROWS = {
    "broken line": ('{"text": "x', "line 2", "broken JSON"),
    "no object": ("[1]", "line 2", "expected an object"),
    "not a number": ('{"text": NaN, "label": "a"}', "line 2", "broken JSON"),
    "missing field": ({"label": "a"}, "line 2", "'text' is missing"),
    "number as text": ({**GOOD, "text": 7}, "line 2", "expected text"),
    "null text": ({**GOOD, "text": None}, "line 2", "expected text"),
    "empty text": ({**GOOD, "text": "  "}, "line 2", "is empty"),
    "foreign label": ({**GOOD, "label": "c"}, "line 2", "not in data.labels"),
    "boolean label": ({**GOOD, "label": True}, "line 2", "not in data.labels"),
    "missing label": ({"text": "x"}, "line 2", "'label' is missing"),
    "lone surrogate": ('{"text": "\\ud800", "label": "a"}', "line 2", "surrogate"),
    "list as site": ({**GOOD, "site": ["x"]}, "line 2", "expected text"),
    "empty site": ({**GOOD, "site": " "}, "line 2", "no site name"),
    "deep nesting": ("[" * 100_000, "line 2", "broken JSON"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_its_line(tmp_path: Path, case: str) -> None:
    row, place, rule = BAD_ROWS[case]
    path = lines(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(DataError) as caught:
        read_examples(str(path), classification(path), "data.train")
    assert place in str(caught.value)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    lines(tmp_path / "empty.jsonl")
    lines(tmp_path / "rows.parquet", GOOD)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "twice.csv").write_text("text,text\nx,y\n")
    (tmp_path / "ragged.csv").write_text("text,label\nx\n")
    expected = {
        "": "is a folder", "no.jsonl": "does not exist", "empty.jsonl": "no rows", "rows.parquet": "unknown format",
        "latin.jsonl": "not UTF-8", "twice.csv": "names a column twice", "ragged.csv": "fewer values",
    }  # fmt: skip
    for name, rule in expected.items():
        with pytest.raises(DataError, match=rule):
            read_examples(str(tmp_path / name), classification(tmp_path), "data.train")
    with pytest.raises(FedtuneError, match="not installed"):
        read_examples("package:no_such_package/x.jsonl", classification(tmp_path), "data.train")


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ("text", "no list"),
        ([], "no list"),
        ([{"role": "user"}], "lacks role or content"),
        ([{"role": "user", "content": 3}], "expected text"),
        ([{"role": "user", "content": "hi"}], "expected 'assistant'"),
    ],
)
def test_bad_chat_is_refused(tmp_path: Path, messages: Any, rule: str) -> None:
    path = lines(tmp_path / "chat.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=rule):
        read_examples(str(path), DataConfig(task="causal_lm", train=str(path)), "data.train")


@given(
    kind=st.sampled_from(["dirichlet", "iid", "pathological", "size"]),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    sites=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_partition_deals_every_row_once_and_repeats(kind: str, labels: list[int], sites: int, seed: int) -> None:
    config = PartitionConfig(kind=kind, sites=sites, labels_per_site=-(-4 // sites))  # type: ignore[arg-type]
    first, again = (PARTITIONERS[kind]([part(labels)], config, seed)[0] for _ in range(2))
    assert len(first) == len(labels)
    assert first.min() >= 0
    assert first.max() < sites
    assert (first == again).all()


def test_dirichlet_mixes_agree_between_train_and_test() -> None:
    labels = np.repeat(np.arange(4), 2000)
    config = PartitionConfig(kind="dirichlet", sites=5, alpha=0.3)
    mixes = []
    for sites in PARTITIONERS["dirichlet"]([part(labels), part(labels, "test")], config, 1):
        mixes.append(np.array([[np.sum((sites == s) & (labels == c)) for c in range(4)] for s in range(5)]) / 2000)
    np.testing.assert_allclose(mixes[0], mixes[1], atol=1e-9)
    assert mixes[0].std() > 0.1


def test_iid_parts_are_equal_and_size_parts_are_not() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    equal = np.bincount(PARTITIONERS["iid"]([part(labels)], PartitionConfig(kind="iid", sites=8), 0)[0])
    assert set(equal) == {125}
    (sizes,) = PARTITIONERS["size"]([part(labels)], PartitionConfig(kind="size", sites=8), 0)
    skewed = np.bincount(sizes, minlength=8)
    assert skewed.max() > 2 * skewed.min()


def test_sites_are_sorted_and_hold_out_is_disjoint(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data={"test": None, "test_fraction": 0.25})
    data = load_federated_data(config.data, config.seed)
    assert data.sites == ("site 0", "site 1", "site 2")
    assert {site: len(rows) for site, rows in data.test.items()} == dict.fromkeys(data.sites, 3)
    assert {site: len(rows) for site, rows in data.train.items()} == dict.fromkeys(data.sites, 9)


def test_caps_keep_the_asked_number_of_rows(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data={"max_rows_per_site": 5, "max_test_rows": 7})
    data = load_federated_data(config.data, config.seed)
    assert {len(rows) for rows in data.train.values()} == {5}
    assert sum(len(rows) for rows in data.test.values()) == 7


def test_missing_site_column_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data={"partition": {"kind": "column", "column": "hospital"}})
    with pytest.raises(DataError, match="'hospital' is missing"):
        load_federated_data(config.data, config.seed)
