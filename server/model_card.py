"""The model card of a run: what the adapter is, how it was trained, what it is worth and what is claimed of it.

Everything comes from the run config and the summary, so the card can be published with the adapter: it names no site,
and who took part in which round is not in it.
"""

from __future__ import annotations

from typing import Any

import yaml

from common.config.adapter import AdapterConfig
from common.config.run import RunConfig
from common.methods import method_of
from common.sources import is_hub


def model_card(config: RunConfig, summary: dict[str, Any], adapter: AdapterConfig) -> str:
    """Return the card as Markdown with the front matter that model hubs read.

    Args:
        config: the run config.
        summary: of the run; see :func:`server.summary.summarise`.
        adapter: what was exported: with corrections it has a higher rank than the run's.
    """
    front: dict[str, Any] = {"library_name": "peft", "tags": ["fedtune", "federated", config.data.task]}
    if is_hub(config.model.source):
        front["base_model"] = config.model.source.removeprefix("hub:")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.name}",
        _what(config, summary, adapter),
        f"## Privacy\n\n{summary['privacy_claim']}\n\n{_spent(summary)}",
        _results(config, summary),
        _use(config),
    ]
    return "\n\n".join(parts) + "\n"


def _what(config: RunConfig, summary: dict[str, Any], adapter: AdapterConfig) -> str:
    kind = {
        "lora": f"LoRA factors of rank {adapter.rank}, alpha {adapter.alpha:g}",
        "prompt": f"a prompt of {adapter.virtual_tokens} virtual tokens",
        "head_only": "the classification head alone",
    }[adapter.kind]
    method = f", aggregated by {config.aggregation.method}" if adapter.kind == "lora" else ""
    return (
        f"An adapter for {config.data.task.replace('_', ' ')}: {kind}, fine-tuned with fedtune across "
        f"{len(summary['sites'])} sites in {summary['rounds']} rounds{method}. The base model's weights have SHA-256 "
        f"`{summary['base_fingerprint']}`. Software: "
        + ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        + "."
    )


def _spent(summary: dict[str, Any]) -> str:
    lines = []
    if summary["epsilon"]:
        lines.append(f"Spent at the site that spent most: ε = {max(summary['epsilon'].values()):.2f}, "
                     f"δ = {summary['delta']:g}.")  # fmt: skip
    if summary["site_level"]:
        whole = summary["site_level"]
        lines.append(f"Spent on whole sites: ε = {whole['epsilon']:.2f}, δ = {whole['delta']:g}.")
    return " ".join(lines) or "Nothing was accounted."


def _results(config: RunConfig, summary: dict[str, Any]) -> str:
    before, after = (summary[key].get("test") for key in ("metrics_before", "metrics_after"))
    if not after or not before:
        return "## Results\n\nNot evaluated."
    rows = [f"| {name} | {before['overall'][name]:.4g} | {value:.4g} |" for name, value in after["overall"].items()]
    table = "\n".join(["| on the coordinator's test part | before | after |", "| --- | ---: | ---: |", *rows])
    if summary["personal"]:
        table += "\n\nThese are figures of each site with the factors that it keeps, which are not in this adapter."
    elif config.adapter.kind == "lora" and method_of(config).personal:
        table += "\n\nThese are figures of what all sites share. Each has factors of its own, which are zero here."
    return f"## Results\n\n{table}\n\nOne run; how it does on other data, and for whom it does worse, was not measured."


def _use(config: RunConfig) -> str:
    labels = (
        f" Labels, in the order of the logits: {', '.join(map(str, config.data.labels))}." if config.data.labels else ""
    )
    return (
        "## Use\n\n"
        '`common.models.export.load_adapter("adapter", BASE)` of fedtune loads it on its base model, whatever the '
        f"pooling or prompt. Texts were cut to {config.data.max_length} tokens.{labels}"
    )
