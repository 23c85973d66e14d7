from __future__ import annotations

import ast
import sys
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
from common.data.partition import PARTITIONERS, Part, label_owners
from common.errors import ConfigError, DataError, ModelError
from tests.conftest import LABELS, label_rows, write_rows


@given(sites=st.integers(1, 30), labels=st.integers(1, 12), each=st.integers(1, 12), seed=st.integers(0, 99))
def test_labels_are_shared_out_evenly(sites: int, labels: int, each: int, seed: int) -> None:
    each = min(each, labels)
    owners = label_owners(labels, PartitionConfig(kind="pathological", sites=sites, labels_per_site=each), seed)
    assert set(owners.sum(axis=0)) == {each}
    assert owners.sum(axis=1).max() - owners.sum(axis=1).min() <= 1


def test_pathological_sites_have_their_labels_in_train_and_test() -> None:
    config = PartitionConfig(kind="pathological", sites=9, labels_per_site=2)
    labels = {"train": np.repeat(np.arange(6), 300), "test": np.repeat(np.arange(6), 60)}
    parts = [Part(name, own, 6, list) for name, own in labels.items()]
    train, test = PARTITIONERS["pathological"](parts, config, 3)
    for site in range(9):
        seen = set(labels["train"][train == site])
        assert len(seen) == 2
        assert seen == set(labels["test"][test == site])
    assert set(np.bincount(train)) == {200}


@pytest.mark.parametrize(
    ("partition", "rule"),
    [
        ({"kind": "pathological", "sites": 4, "labels_per_site": 3}, "there are 2 labels"),
        ({"kind": "pathological", "sites": 1, "labels_per_site": 1}, "at least 2 sites"),
        ({"kind": "iid", "sites": 2, "encoder": "x"}, "expected kind 'cluster'"),
        ({"kind": "cluster", "sites": 2, "encoder": "hub:a/b"}, "hub id"),
        ({"kind": "iid", "sites": 2, "partitioner": "linear"}, "goes with kind 'flower'"),
        ({"kind": "flower", "sites": 2}, "goes with kind 'flower'"),
    ],
)
def test_partitions_that_make_no_sense_are_refused(partition: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        DataConfig(task="classification", train="x", labels=("a", "b"), partition=partition)  # type: ignore[arg-type]


TOPICS = {"heart": "pulse chest beat", "bones": "knee hip ankle"}


def topic_rows(count: int) -> list[dict[str, Any]]:
    """Rows on two topics with labels that say nothing of them."""
    words = list(TOPICS.values())
    return [
        {"text": f"{words[i % 2]} {words[i % 2].split()[i % 3]} day {i % 5}", "label": LABELS[i % 3]}
        for i in range(count)
    ]


@pytest.mark.parametrize("encoder", [None, "bert"])
def test_clusters_part_topics_alike_in_train_and_test(
    make_config: Callable[..., RunConfig], tmp_path: Path, tiny_models: dict[str, Path], encoder: str | None
) -> None:
    pytest.importorskip("sklearn")
    more = {} if encoder is None else {"encoder": str(tiny_models[encoder])}
    config = make_config(data={"partition": {"kind": "cluster", "sites": 2, **more}})
    write_rows(Path(config.data.train), topic_rows(60))
    write_rows(Path(str(config.data.test)), topic_rows(20))
    load_federated_data.cache_clear()
    data = load_federated_data(config.data, config.seed)
    topics = {
        site: {"pulse" in example.prompt for part in (data.train, data.test) for example in part[site]}
        for site in data.sites
    }
    assert sorted(map(sorted, topics.values())) == [[False], [True]]
    load_federated_data.cache_clear()
    assert load_federated_data(config.data, config.seed) == data


def test_clusters_that_cannot_be_are_refused(
    make_config: Callable[..., RunConfig], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    decoder = {"kind": "cluster", "sites": 2, "encoder": str(tiny_models["gpt2"])}
    config = make_config(data={"partition": decoder})
    with pytest.raises(ModelError, match="expected an encoder"):
        load_federated_data(config.data, config.seed)
    config = make_config(data={"partition": {"kind": "cluster", "sites": 37}})
    with pytest.raises(DataError, match="36 training rows for 37 clusters"):
        load_federated_data(config.data, config.seed)
    monkeypatch.setattr("common.data.clusters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[clusters\]"):
        load_federated_data(config.data, 1)


FLOWER = ("dirichlet", "exponential", "linear", "pathological", "shard", "square")


@pytest.mark.parametrize("name", FLOWER)
@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")
def test_flower_partitioners_deal_every_row(make_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    pytest.importorskip("flwr_datasets")
    config = make_config(data={"partition": {"kind": "flower", "partitioner": name, "sites": 3}})
    write_rows(Path(config.data.train), label_rows(120))
    write_rows(Path(str(config.data.test)), label_rows(90))
    load_federated_data.cache_clear()
    data = load_federated_data(config.data, config.seed)
    assert sum(map(len, data.train.values())) == 120
    assert sum(map(len, data.test.values())) == 90
    for site, rows in data.test.items():
        assert {row.label for row in rows} <= {row.label for row in data.train[site]}
    load_federated_data.cache_clear()
    assert load_federated_data(config.data, config.seed) == data


def test_missing_flower_package_is_named(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    config = make_config(data={"partition": {"kind": "flower", "partitioner": "linear", "sites": 3}})
    with pytest.raises(ConfigError, match=r"flwr-datasets\. Run: pip install"):
        load_federated_data(config.data, config.seed)


def test_optional_packages_are_imported_inside_functions_alone() -> None:
    root = Path(__file__).resolve().parents[2]
    for module in [*(root / "common").rglob("*.py"), *(root / "client").rglob("*.py")]:
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in named} & {"sklearn", "matplotlib", "flwr_datasets"}, module
