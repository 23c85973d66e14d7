"""Tiny models and data that every test can use; everything is built here, nothing is downloaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.quiet import quiet_dependencies

quiet_dependencies()

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from common.config.load import parse_run_config  # noqa: E402
from common.config.run import RunConfig  # noqa: E402
from tests.tiny_models import FAMILIES, save_tiny_model  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
LABELS = ["heart", "skin", "bones"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of the shared folder where it is absent, and GPU tests where there is none; slow ones start first."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} is absent"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Simulations keep their tokens in a folder of the test session, never in the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _quiet_hooks() -> None:
    """Opacus' hooks on frozen inputs warn once a layer; expected with LoRA."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one tiny base model a family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def label_rows(count: int, sites: int = 3, start: int = 0) -> list[dict[str, Any]]:
    """Rows whose label follows from their words, dealt to sites in turn."""
    words = {"heart": ["pulse", "chest", "beat"], "skin": ["rash", "itch", "mole"], "bones": ["knee", "hip", "ankle"]}
    rows = []
    for index in range(start, start + count):
        label = LABELS[index % 3]
        own = words[label][(index // 3) % 3]
        text = f"the {own} hurts since day {index % 17} " + "and night " * (index % 5)
        rows.append({"text": text.strip(), "label": label, "site": f"site {index % sites}"})
    return rows


def chat_rows(count: int, sites: int = 3) -> list[dict[str, Any]]:
    """Prompts and completions, dealt to sites in turn."""
    return [
        {
            "prompt": f"what about the knee {index % 7}",
            "completion": f"rest the knee and call on day {index % 5}",
            "site": f"site {index % sites}",
        }
        for index in range(count)
    ]


@pytest.fixture
def make_config(tmp_path: Path, tiny_models: dict[str, Path]) -> Callable[..., RunConfig]:
    """Build a run config on tiny data and a tiny model; keyword arguments replace whole sections' keys."""

    def make(family: str = "bert", task: str = "classification", **sections: Any) -> RunConfig:
        return parse_run_config(config_text(tmp_path, tiny_models[family], task, **sections), "test", None)

    return make


def config_text(folder: Path, base_model: Path, task: str = "classification", **sections: Any) -> str:
    """Write tiny data into ``folder`` and return a run config on it as YAML."""
    rows = label_rows if task == "classification" else chat_rows
    train, test = write_rows(folder / "train.jsonl", rows(36)), write_rows(folder / "test.jsonl", rows(12))
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(base_model)},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"task": task, "train": str(train), "test": str(test), "max_length": 24},
        "training": {"lr": 0.01, "batch_size": 4},
        "privacy": {"unit": "none"},
        "federation": {"rounds": 2},
    }
    if task == "classification":
        values["data"]["labels"] = LABELS
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return yaml.safe_dump(values)
