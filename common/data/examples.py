"""One row of private text, checked, before it is tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.data import DataConfig
from common.errors import DataError


@dataclass(frozen=True)
class Example:
    """A training or test row.

    Attributes:
        prompt: what the model is given: the text of a classification, or the prompt of a completion.
        completion: what a causal LM learns to say; empty for a classification.
        label: index into ``data.labels``; -1 for a causal LM.
        messages: chat messages as (role, content) pairs, instead of prompt and completion.
        site: the site that the row names, where it names one.
        person: whom the row is of, where ``data.person_field`` says so.
    """

    prompt: str
    completion: str = ""
    label: int = -1
    messages: tuple[tuple[str, str], ...] = ()
    site: str | None = None
    person: str | None = None

    @property
    def content(self) -> tuple[str, str, int, tuple[tuple[str, str], ...]]:
        """Everything but site and person: what makes two rows the same."""
        return (self.prompt, self.completion, self.label, self.messages)

    @property
    def text(self) -> str:
        """All that is said in the row, in one piece."""
        return "\n".join(content for _, content in self.messages) or f"{self.prompt}\n{self.completion}".strip()


def count_units(examples: Sequence[Example], unit: str) -> int:
    """Return the number of what a privacy unit protects among ``examples``: persons for "user", else rows."""
    return len({example.person for example in examples}) if unit == "user" else len(examples)


def example_from_row(row: Mapping[str, Any], data: DataConfig, place: str) -> Example:
    """Check one row and make an :class:`Example` of it.

    Args:
        row: the fields as read from the file.
        data: the config section that names the fields and the labels.
        place: file and line, for errors.

    Raises:
        DataError: a missing field, text that is no text, a label outside the set.
    """
    site: str | None = None
    if data.partition.kind == "column" and data.partition.column in row:
        site = _site_name(row[data.partition.column], data.partition.column, place)
    person = None if data.person_field is None else _person(row, data.person_field, place)
    if data.task == "classification":
        text = _text(row, data.text_field, place)
        if not text.strip():
            raise DataError(f"{place}: field {data.text_field!r} is empty; expected text. Drop the row.")
        return Example(prompt=text, label=_label(row, data, place), site=site, person=person)
    if "messages" in row:
        return Example(prompt="", messages=_messages(row["messages"], place), site=site, person=person)
    completion = _text(row, "completion", place)
    if not completion.strip():
        raise DataError(f"{place}: field 'completion' is empty; expected text. Drop the row.")
    return Example(prompt=_text(row, "prompt", place), completion=completion, site=site, person=person)


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    if name not in row:
        raise DataError(
            f"{place}: field {name!r} is missing; found {', '.join(map(repr, row)) or 'no fields'}. "
            "Add it, or name another field in the data section."
        )
    return _clean(row[name], f"field {name!r}", place)


def _clean(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is a {type(value).__name__}; expected text. Quote it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {what} holds half of a surrogate pair, which is no character; "
            "expected Unicode text. Repair or drop the row."
        ) from None
    return value


def _label(row: Mapping[str, Any], data: DataConfig, place: str) -> int:
    name, labels = data.label_field, data.labels or ()
    if name not in row:
        raise DataError(f"{place}: field {name!r} is missing; expected one of the labels. Add it.")
    value = row[name]
    if isinstance(value, str | int) and not isinstance(value, bool):
        by_text = {str(label): index for index, label in enumerate(labels)}
        if str(value) in by_text:
            return by_text[str(value)]
    shown = ", ".join(map(str, labels[:12])) + (", ..." if len(labels) > 12 else "")
    raise DataError(
        f"{place}: label {str(value)[:60]!r} is not in data.labels; expected one of {shown}. "
        "Correct the row or add the label."
    )


def _site_name(value: Any, column: str, place: str) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    name = _clean(name, f"field {column!r}", place).strip()
    if not name or len(name) > 128 or not name.isprintable():
        raise DataError(
            f"{place}: field {column!r} is no site name; expected 1 to 128 printable characters. Correct it."
        )
    return name


def _person(row: Mapping[str, Any], name: str, place: str) -> str:
    """The person as text: 7 and "7" are one person. Never quoted in an error."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{place}: field {name!r} names no person; expected text or a whole number. Correct the row.")
    return str(value).strip()


def _messages(value: Any, place: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: field 'messages' is no list; expected chat messages. Correct it.")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place}: a chat message lacks role or content; expected both. Correct it.")
        role = _clean(message["role"], "role of a message", place)
        messages.append((role, _clean(message["content"], "content of a message", place)))
    if messages[0][0] == "assistant":
        raise DataError(f"{place}: the first message is the assistant's; expected one it answers. Add it.")
    if messages[-1][0] != "assistant":
        raise DataError(
            f"{place}: the last message is by {messages[-1][0]!r}; expected 'assistant', whose words are "
            "learnt. Cut the conversation there."
        )
    return tuple(messages)
