"""Loading a config: YAML, overrides, and errors that name file, line, key and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from common.config.run import RunConfig
from common.config.yaml_text import Document, parse_value, parse_yaml
from common.errors import ConfigError
from common.sources import anchor

Whole = TypeVar("Whole", bound=BaseModel)

SYNONYMS = {
    "learning_rate": "lr", "epochs": "local_epochs", "steps": "local_steps", "r": "rank",
    "lora_alpha": "alpha", "noise": "noise_multiplier", "max_seq_length": "max_length", "path": "source",
    "eps": "epsilon", "clients_per_round": "sites_per_round", "num_rounds": "rounds",
}  # fmt: skip


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run config from a YAML file and apply ``section.key=value`` overrides.

    Paths in the file are taken relative to the file, paths in overrides relative to the current folder; the
    result holds absolute ones.

    Raises:
        ConfigError: naming the file, the line, the key and what to do.
    """
    return parse_run_config(read_config_text(path, "a run config"), str(path), path.parent, overrides)


def read_config_text(path: Path, what: str) -> str:
    """Read a config file as text.

    Args:
        path: the file.
        what: what it should be, for errors ("a run config").

    Raises:
        ConfigError: if it is not there, no file, or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected {what} in YAML. Check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; expected a YAML file. Name the file in it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; expected YAML. Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); expected a readable file.") from error


def parse_run_config(text: str, name: str, base: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run config from YAML text; see :func:`load_run_config`.

    Args:
        text: the YAML.
        name: what to call it in errors.
        base: folder that relative paths refer to; None keeps them as they are (a config that travelled).
        overrides: ``section.key=value`` strings.
    """
    document = parse_yaml(text, name)
    if base is not None:
        _anchor_sources(document.values, base)
    for override in overrides:
        _apply_override(document, override)
    return validate_section(RunConfig, document)


def validate_section(model: type[Whole], document: Document) -> Whole:
    """Make a config of a parsed document.

    Args:
        model: the section that is the whole document.
        document: the values and their places.

    Raises:
        ConfigError: naming the place, the key and what to do.
    """
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        misspelt = [detail for detail in found if detail["type"] == "extra_forbidden"]
        first = (misspelt or found)[0]
        raise ConfigError(_explain(first, _alternatives(first, found, document), document, model)) from None


def dump_run_config(config: RunConfig) -> str:
    """Return the resolved config as YAML that :func:`load_run_config` reads back to the same config."""
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude={"simulation"} if config.simulation is None else None),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def _anchor_sources(values: dict[str, Any], base: Path) -> None:
    for section, key in (("model", "source"), ("data", "train"), ("data", "test")):
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key]:
            part[key] = anchor(part[key], base)
    data = values.get("data")
    partition = data.get("partition") if isinstance(data, dict) else None
    if isinstance(partition, dict) and isinstance(partition.get("encoder"), str) and partition["encoder"]:
        partition["encoder"] = anchor(partition["encoder"], base)


def _apply_override(document: Document, override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r} is no assignment; expected section.key=value.")
    place: dict[str, Any] = document.values
    for depth, key in enumerate(keys[:-1], start=1):
        if place.get(key) is None:
            place[key] = {}
            document.places[tuple(keys[:depth])] = f"--set {override}"
        if not isinstance(place[key], dict):
            raise ConfigError(f"--set {override!r}: {key!r} is no section; expected section.key=value.")
        place = place[key]
    place[keys[-1]] = parse_value(text.strip())
    path = tuple(keys)
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = f"--set {override}"
    if path in {
        ("model", "source"), ("data", "train"), ("data", "test"), ("model",), ("data",),
        ("data", "partition"), ("data", "partition", "encoder"),
    }:  # fmt: skip
        _anchor_sources({keys[0]: document.values[keys[0]]}, Path.cwd())


def _alternatives(detail: ErrorDetails, found: list[ErrorDetails], document: Document) -> str:
    """Return what is expected of a value: the rule of each type that it may have."""
    path = _walked(detail["loc"], document.values)
    rules = []
    for other in found:
        place = _walked(other["loc"], document.values)
        if place[: len(path)] == path:
            inside = ".".join(map(str, place[len(path) :]))
            rules.append(_rule(other["msg"]) + (f" at {inside}" if inside else ""))
    return " or ".join(dict.fromkeys(rules))


def _rule(message: str) -> str:
    rule = re.sub(r"^[A-Z]\w+ should have ", "one with ", message.removeprefix("Input should be "))
    rule = re.sub(r"^[A-Z]\w+ should match ", "one of the ", rule)
    return re.sub(r" after validation, not \d+$", "", rule).rstrip(".").replace("a valid tuple", "a list")


def _explain(detail: ErrorDetails, rule: str, document: Document, model: type[BaseModel]) -> str:
    """Turn one pydantic error into "<place>: <key> <got>; expected <rule>. <remedy>"."""
    path = tuple(part for part in detail["loc"] if part in _walked(detail["loc"], document.values))
    place = document.place_of(path)
    key = ".".join(str(part) for part in path) or "config"
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown key {key!r}; {_nearest(path, model)}"
    if kind == "missing":
        wanted = ".".join(str(part) for part in detail["loc"])
        return f"{place}: {wanted} is missing; expected a value. Add it."
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        prefix = "" if message.split(" ")[0].startswith(tuple(model.model_fields)) else f"{key}: "
        return f"{place}: {prefix}{message}."
    got = detail["input"]
    shown = repr(got) if isinstance(got, str | int | float | bool) or got is None else f"a {type(got).__name__}"
    if kind == "model_type":
        rule = "a section of 'key: value' lines"
    return f"{place}: {key} is {shown[:80]}; expected {rule}. Correct it."


def _walked(location: tuple[str | int, ...], values: Any) -> list[str | int]:
    """The leading parts of ``location`` that are keys of the document (pydantic adds names of union members)."""
    walked: list[str | int] = []
    for part in location:
        inside: Any = (
            values if isinstance(values, dict) else dict(enumerate(values if isinstance(values, list) else ()))
        )
        if part not in inside:
            continue
        values = inside[part]
        walked.append(part)
    return walked


def _section_at(path: tuple[str | int, ...], model: type[BaseModel]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(str(part))
        candidates = _classes(field.annotation) if field is not None else []
        if not candidates:
            break
        model = candidates[0]
    return model


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [found for argument in get_args(annotation) for found in _classes(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _nearest(path: tuple[str | int, ...], model: type[BaseModel]) -> str:
    valid = list(_section_at(path[:-1], model).model_fields)
    wrong = str(path[-1])
    known = {key: key for key in valid} | {key: to for key, to in SYNONYMS.items() if to in valid}
    close = [known[key] for key in difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)]
    if close:
        return f"did you mean {close[0]!r}? Valid keys: {', '.join(valid)}."
    return f"expected one of {', '.join(valid)}."
