"""A new site: its site config with every choice explained, its key, its ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from client.keys import make_key, read_key
from client.ledger.ledger import Ledger
from client.places import Places
from client.site_config import SiteConfig, load_site_config
from common.atomic import write_atomic
from common.config.load import validate_section
from common.config.model import ModelConfig
from common.config.yaml_text import parse_value, parse_yaml
from common.errors import ConfigError
from common.kit import key_fingerprint
from common.models.folder import model_folder, weights_fingerprint
from common.sources import anchor

_TEMPLATE = """\
# The site config of fedtune: yours alone, it never leaves the site. docs/site.md explains every key.
name: {name}
data: {data}
rows:
  task: {task}
{labels}model: {model}
ledger: ledger/ledger.db
device: {device}
{more}
# What all runs together may spend of one record (or person). Your decision.
budget:
  epsilon: {epsilon}
  delta: {delta}
  unit: {unit}

# What a run may ask for; it can only be stricter. fedtune-client policy show has every rule.
policy:
  base_models:
    - sha256: {sha256}
  tasks: [{task}]
  epsilon_per_run: {epsilon}
  largest_rank: {largest_rank}        # of a run; max_rank is what the device holds of it
  largest_rounds: 100
  metrics: []              # train_loss and clip_norm may leave, noised and charged, only if named here
  # hours: 20:00-06:00
  # pause: true
"""


@dataclass(frozen=True)
class Answers:
    """What an engineer says of a site.

    Attributes:
        name: in the federation.
        data: the file of its rows.
        task: "classification" or "causal_lm".
        labels: of a classification, with commas between them.
        model: base model: a folder or ``package:NAME/folder``.
        epsilon: the budget.
        delta: of the budget.
        device: to compute on.
        max_rank: the largest that fits the device.
        person_field: field that names the person of a row; the budget is for persons then.
        largest_rank: the largest that a run may have.
    """

    name: str
    data: Path
    task: str
    labels: str | None
    model: str
    epsilon: float
    delta: float
    device: str
    max_rank: int | None
    person_field: str | None
    largest_rank: int


def write_site(folder: Path, answers: Answers) -> list[str]:
    """Write ``site.yaml``, make key and ledger, and return what the engineer is told.

    Raises:
        ConfigError: for answers that make no site config, or where one stands.
        ModelError: if the base model is not there.
        PrivacyError: if a ledger stands there.
    """
    path = folder / "site.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists; expected a folder without a site. Edit it, or choose another folder.")
    text = _text(folder, answers)
    validate_section(SiteConfig, parse_yaml(text, "the answers"))
    folder.mkdir(parents=True, exist_ok=True)
    places = Places.beside(path)
    if not places.private_key.exists():
        make_key(places)
    fingerprint = key_fingerprint(read_key(places.private_key).public_key())
    write_atomic(path, text.encode())
    path.chmod(0o640)
    ledger = Path(load_site_config(path).ledger)
    told = [f"wrote {path}", f"made  {places.private_key}, which never leaves this machine"]
    if not ledger.exists():
        ledger.parent.mkdir(mode=0o700, exist_ok=True)
        Ledger(ledger).create()
        told.append(f"made  {ledger}: nothing was spent of these data. If they ever had a ledger, restore that instead")
    return [
        *told,
        f"Send {places.public_key} to the coordinator, and read this out by telephone: {fingerprint}",
        f"Your name in the federation: {answers.name}",
        f"Next: fedtune-client check {path}, and when the kit has come: fedtune-client enroll KIT --site {path}",
    ]


def _text(folder: Path, answers: Answers) -> str:
    model = anchor(answers.model, Path.cwd())
    fingerprint = weights_fingerprint(model_folder(ModelConfig(source=model)))
    data = answers.data.absolute()
    labels = [parse_value(label.strip()) for label in (answers.labels or "").split(",") if label.strip()]
    more = "" if answers.max_rank is None else f"max_rank: {answers.max_rank}\n"
    more += "" if answers.person_field is None else f"person_field: {_quoted(answers.person_field)}\n"
    inside = data.is_relative_to(folder.absolute())
    return _TEMPLATE.format(
        name=_quoted(answers.name),
        data=_quoted(str(data.relative_to(folder.absolute()) if inside else data)),
        task=answers.task,
        labels=f"  labels: {json.dumps(labels, ensure_ascii=False)}\n" if labels else "",
        model=_quoted(model),
        device=_quoted(answers.device),
        more=more,
        epsilon=f"{answers.epsilon:g}",
        delta=f"{answers.delta:g}",
        unit="example" if answers.person_field is None else "user",
        sha256=fingerprint,
        largest_rank=answers.largest_rank,
    )


def _quoted(text: str) -> str:
    """A text as YAML, in quotes where it needs them."""
    plain = text.replace("-", "").replace("_", "").replace("/", "").replace(".", "")
    return text if plain.isalnum() and plain.isascii() and not plain.isdigit() else json.dumps(text, ensure_ascii=False)
