"""The embedded data: what its README promises, counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from common.config.load import load_run_config
from simulations.data.make_clinic import FOLDER, LABELS, Neighbours, build, normal
from simulations.data.measure_clinic import linear_accuracy, load

ROOT = Path(__file__).resolve().parents[2]
PARTS = {part: load(part) for part in ("train", "test")}
FIELDS = ["text", "label", "site", "age_band", "prompt", "completion"]


def test_sites_have_the_promised_rows_and_fields() -> None:
    for part, rows in (("train", 400), ("test", 100)):
        assert set(Counter(row["site"] for row in PARTS[part]).values()) == {rows}
        assert len({row["site"] for row in PARTS[part]}) == 8
        assert all(list(row) == FIELDS and all(row.values()) for row in PARTS[part])
        assert {row["age_band"] for row in PARTS[part]} == {"0-17", "18-39", "40-64", "65+"}


def test_labels_are_those_of_the_quickstart_and_mixed_by_site() -> None:
    assert set(load_run_config(ROOT / "configs" / "quickstart.yaml").data.labels or ()) == set(LABELS)
    for rows in PARTS.values():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(LABELS)
        assert max(counts.values()) < 0.24 * len(rows)
    mixes = {
        site: max(Counter(row["label"] for row in PARTS["train"] if row["site"] == site).values())
        for site in {row["site"] for row in PARTS["train"]}
    }
    assert max(mixes.values()) > 1.5 * min(mixes.values())


def test_messages_are_distinct_and_test_is_no_near_duplicate_of_train() -> None:
    texts = [normal(row["text"]) for rows in PARTS.values() for row in rows]
    assert len(set(texts)) == len(texts)
    neighbours = Neighbours()
    for row in PARTS["train"]:
        neighbours.add(row["text"])
    assert max(neighbours.nearest(row["text"]) for row in PARTS["test"]) < 0.5


def test_generator_writes_the_committed_files_byte_for_byte() -> None:
    for part, rows in build().items():
        written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        assert written == (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_linear_model_does_not_solve_it() -> None:
    best = max(linear_accuracy(PARTS["train"], PARTS["test"]).values())
    assert 0.5 < best < 0.82
    assert f"{best:.1%}" in (FOLDER.parent / "README.md").read_text(encoding="utf-8")
