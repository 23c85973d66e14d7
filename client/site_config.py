"""The site config: what belongs to one site alone. It never leaves the site.

Paths, fields, base model, device and budget stand here; how it is trained stands in the run config, which the
coordinator sends. Nothing in a run config can reach past this file: see ``client.agreement``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from client.policy.section import Policy
from common.config.load import read_config_text, validate_section
from common.config.section import Section
from common.config.yaml_text import parse_yaml
from common.sources import anchor, is_hub
from common.wire import SiteName

_USER = r"^[a-z_][a-z0-9_-]{0,31}$"


class Budget(Section):
    """What the releases of all runs together may spend of one unit of the site's data."""

    epsilon: Annotated[float, Field(gt=0, le=1000)]
    """ε that no record (or person) of the site is taken beyond, over all runs and rounds."""
    delta: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    """δ of the guarantee; well below one over the number of records (or persons), at which every run is refused."""
    unit: Literal["example", "user"] = "example"
    """example: ε is for one record; user: for one person with all records, and person_field must say whose they are."""


class RowsConfig(Section):
    """What a row of the site's file is. A run that asks for anything else is refused before a row is read."""

    task: Literal["classification", "causal_lm"]
    """classification reads text and label; causal_lm reads prompt and completion, or chat messages."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Field of the text."""
    label_field: Annotated[str, Field(min_length=1)] = "label"
    """Field of the label."""
    labels: Annotated[tuple[str | int, ...], Field(min_length=2, strict=False)] | None = None
    """The label set of a classification, in the order of the logits: the run's, in the same order."""

    @model_validator(mode="after")
    def _labels_go_with_the_task(self) -> RowsConfig:
        if self.task == "classification" and self.labels is None:
            raise ValueError("labels is missing; expected the list of labels of the classification")
        if self.task != "classification" and self.labels is not None:
            raise ValueError(f"labels is set for task {self.task!r}, which has none; remove it")
        if len({str(label) for label in self.labels or ()}) != len(self.labels or ()):
            raise ValueError("labels has a label twice; expected each once")
        return self


class Users(Section):
    """The system's users that a site's components run as, where whoever starts them may switch users."""

    agent: Annotated[str, Field(pattern=_USER)]
    """Reads data, model and policy, keeps the ledger."""
    supernode: Annotated[str, Field(pattern=_USER)]
    """Reads the site's key."""
    executor: Annotated[str, Field(pattern=_USER)]
    """Runs the coordinator's ClientApp. Its group may connect to the agent's socket."""

    @model_validator(mode="after")
    def _three(self) -> Users:
        if len({self.agent, self.supernode, self.executor}) < 3:
            raise ValueError("users has a user twice; expected three, so that none can read another's files")
        return self


class SiteConfig(Section):
    """A site: its data, its base model, its ledger, its budget, its device."""

    name: SiteName
    """Name of the site in the federation."""
    data: Annotated[str, Field(min_length=1)]
    """The training rows: a JSONL or CSV file, relative to the site config."""
    rows: RowsConfig
    """What a row is: task, fields and labels."""
    model: Annotated[str, Field(min_length=1)]
    """Base model and tokenizer: a folder, relative to the site config, or ``package:NAME/folder``. Never the run's."""
    ledger: Annotated[str, Field(min_length=1)]
    """The ledger file, relative to the site config. Keep it as long as the data."""
    budget: Budget
    """What may be spent. There is no default ε: it is the site's decision."""
    policy: Policy = Policy()
    """What a run may ask for; a run can only be stricter."""
    person_field: Annotated[str, Field(min_length=1)] | None = None
    """Field of a row that names the person it is of; never the run's choice. Without it the site takes part in no run
    for persons. Needed for a budget of unit user, useful for every ledger."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of LoRA factors that fits the device; any if not given. No more is held, tested, sent or trained
    here, save for a correction to the base (flora, fedex_lora), whose rank the run decides."""

    socket: Annotated[str, Field(min_length=1)] | None = None
    """The agent's socket, at most 100 bytes of path; state/run/agent.sock beside the site config if not given."""
    runtime_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port on loopback between SuperNode and executor; a free one if not given (9094 in systemd units)."""
    users: Users | None = None
    """Separate users for the three components, where fedtune-client up is started as root."""

    @model_validator(mode="after")
    def _consistent(self) -> SiteConfig:
        if is_hub(self.data):
            raise ValueError("data is a hub id; expected a file of the site's own")
        if is_hub(self.model):
            raise ValueError("model is a hub id; expected a folder of the site's own, or package:NAME/folder")
        if self.budget.unit == "user" and self.person_field is None:
            raise ValueError(
                "person_field is missing; expected the field that names the person, for budget.unit 'user'"
            )
        return self


def load_site_config(path: Path) -> SiteConfig:
    """Read a site config from a YAML file; its paths become absolute.

    Raises:
        ConfigError: naming the file, the line, the key and what to do.
    """
    document = parse_yaml(read_config_text(path, "a site config"), str(path))
    for key in ("data", "model", "ledger", "socket"):
        if isinstance(document.values.get(key), str) and document.values[key]:
            document.values[key] = anchor(document.values[key], path.parent)
    return validate_section(SiteConfig, document)
