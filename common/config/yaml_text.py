"""YAML as configs need it: duplicate keys refused, ``1e-5`` a number, and the place of every key kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from common.errors import ConfigError

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads every float of YAML 1.2 as a number and nothing as a date."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases: nested ones unfold without limit, and a config needs none."""
        if self.check_event(yaml.AliasEvent):
            reader: Any = self
            mark = reader.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*name) is not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))


@dataclass
class Document:
    """A parsed YAML file: plain values, and where each key was set."""

    name: str
    values: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict)

    def place_of(self, path: Path) -> str:
        """Where a key was set (file and line, or the override), or the nearest key above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Return the value of a scalar node; integers win over floats where both match."""
    if node.style is None and re.fullmatch(r"[-+]?[0-9]{1,30}", node.value):
        return int(node.value)
    return loader.construct_object(node, deep=True)


def _build(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> Any:
    name, line = document.name, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
            key_line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{name} line {key_line}: a key is not text; expected a name.")
            if key in built:
                raise ConfigError(
                    f"{name} line {key_line}: key {key!r} stands twice in one section; expected once. "
                    "Remove one of them."
                )
            document.places[(*path, key)] = f"{name} line {key_line}"
            built[key] = _build(loader, value_node, (*path, key), document)
        return built
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.places[(*path, index)] = f"{name} line {item.start_mark.line + 1}"
            items.append(_build(loader, item, (*path, index), document))
        return items
    try:
        return _scalar(loader, cast(yaml.ScalarNode, node))
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ConfigError(f"{name} line {line}: value cannot be read as YAML; expected a plain value.") from error


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML text whose top level is a mapping.

    Args:
        text: the YAML.
        name: what to call it in errors (a file name).

    Raises:
        ConfigError: syntax, anchors in a loop, tabs, duplicate keys, or a top level that is no mapping.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{name} is empty; expected 'section: ...' lines. See configs/ for examples.")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name} line 1: top level is no mapping; expected 'section: ...' lines.")
        document = Document(name, {})
        document.values = _build(loader, node, (), document)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name} line {mark.line + 1}" if mark else name
        problem = (error.problem or "syntax error").replace("\n", " ")
        remedy = "Indent with spaces." if "\\t" in problem else "Check the indentation and quotes there."
        raise ConfigError(f"{place}: {problem}; expected YAML. {remedy}") from error
    except (yaml.YAMLError, RecursionError, ValueError, KeyError) as error:
        raise ConfigError(f"{name} cannot be read as YAML; expected plain sections and keys.") from error
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str) -> Any:
    """Read the right-hand side of ``--set key=value`` as YAML; what is no YAML is taken as text."""
    try:
        return parse_yaml(f"value: {text}", "value").values["value"]
    except ConfigError:
        return text
