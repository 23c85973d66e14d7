"""Config section ``data``: the task, how rows are read, and the virtual sites of a simulation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section
from common.sources import is_hub


class PartitionConfig(Section):
    """How the rows of ``data.train`` and ``data.test`` become the sites of a simulation."""

    kind: Literal["column", "iid", "dirichlet", "pathological", "size", "cluster", "flower"] = "column"
    """column: a field names the site; iid: equal random parts; dirichlet: label mix drawn per site
    (Hsu et al. 1909.06335); pathological: few labels at each site (McMahan et al. 1602.05629); size: random parts of
    log-normal size; cluster: texts that are alike; flower: a partitioner of flwr-datasets, where that is installed."""
    column: Annotated[str, Field(min_length=1)] = "site"
    """The field that names the site, for kind column."""
    sites: Annotated[int, Field(ge=1)] | None = None
    """Number of sites, for every kind but column."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Concentration of the Dirichlet distribution: small is skewed. For kind dirichlet, ours or Flower's."""
    labels_per_site: Annotated[int, Field(ge=1)] = 2
    """Labels at each site, for kind pathological and Flower's partitioner of that name."""
    shards_per_site: Annotated[int, Field(ge=1)] = 2
    """Shards at each site, for Flower's partitioner "shard"."""
    sigma: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the logarithm of the site sizes, for kind size."""
    encoder: Annotated[str, Field(min_length=1)] | None = None
    """For kind cluster: an encoder (a folder or ``package:NAME/folder``) whose mean-pooled vectors are clustered;
    without it TF-IDF weights are. A key of its own, so that runs on different base models can share a partition."""
    partitioner: Literal["dirichlet", "exponential", "linear", "pathological", "shard", "square"] | None = None
    """For kind flower: which one of flwr-datasets."""

    @model_validator(mode="after")
    def _sites_where_drawn(self) -> PartitionConfig:
        if (self.partitioner is not None) != (self.kind == "flower"):
            raise ValueError("partitioner goes with kind 'flower'; expected both or neither")
        if self.encoder is not None and is_hub(self.encoder):
            raise ValueError("encoder is a hub id; expected a folder or package:NAME/folder. Download it first")
        if self.encoder is not None and self.kind != "cluster":
            raise ValueError(f"encoder is set for kind {self.kind!r}; expected kind 'cluster'. Remove it")
        if self.kind != "column" and self.sites is None:
            raise ValueError(f"sites is missing; expected a number of sites for kind {self.kind!r}")
        if self.kind == "column" and self.sites is not None:
            raise ValueError("sites is set for kind 'column', where the column decides; remove it")
        return self


class DataConfig(Section):
    """What a row is, and where a simulation reads rows. Real sites take the paths from their own site config."""

    task: Literal["classification", "causal_lm"]
    """classification reads text and label; causal_lm reads prompt and completion, or chat messages."""
    train: Annotated[str, Field(min_length=1)]
    """JSONL or CSV file, ``package:NAME/file``, or ``hub:owner/name#split``."""
    test: Annotated[str, Field(min_length=1)] | None = None
    """The test part, same forms as train. Without it, ``test_fraction`` of every site is held out."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each site's rows held out as test part when ``test`` is not given."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of a hub data set."""
    labels: Annotated[tuple[str | int, ...], Field(min_length=2, strict=False)] | None = None
    """The label set of a classification, in the order of the logits. Part of the config, never read off the data."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Field of the text."""
    label_field: Annotated[str, Field(min_length=1)] = "label"
    """Field of the label."""
    person_field: Annotated[str, Field(min_length=1)] | None = None
    """Field that names the person a row is of, for privacy.unit user and the ledger. The name stays at the site."""
    prompt_template: str = "{prompt}"
    """What the model is shown for a prompt; must contain {prompt}."""
    max_length: Annotated[int, Field(ge=4, le=131072)] = 128
    """Tokens a row is cut to."""
    max_rows_per_site: Annotated[int, Field(ge=1)] | None = None
    """Keep at most this many training rows of a site (a seeded choice)."""
    max_test_rows: Annotated[int, Field(ge=1)] | None = None
    """Keep at most this many test rows in all (a seeded choice)."""
    partition: PartitionConfig = PartitionConfig()
    """How rows become sites."""

    @model_validator(mode="after")
    def _task_has_its_fields(self) -> DataConfig:
        if self.task == "classification":
            if self.labels is None:
                raise ValueError("labels is missing; expected the list of labels of the classification")
            if len({str(label) for label in self.labels}) != len(self.labels):
                raise ValueError("labels has a label twice; expected each once")
        elif self.labels is not None:
            raise ValueError("labels is set for task 'causal_lm', which has none; remove it")
        partition = self.partition
        if partition.kind in ("dirichlet", "pathological", "flower") and self.task != "classification":
            raise ValueError(f"partition.kind {partition.kind!r} needs labels; expected task 'classification'")
        if partition.kind == "pathological":
            _expect_each_label_somewhere(len(self.labels or ()), partition)
        if "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template has no {prompt}; expected a text that contains it")
        if self.test is not None and self.test_fraction > 0:
            raise ValueError("test and test_fraction are both set; expected one of them")
        return self


def _expect_each_label_somewhere(labels: int, partition: PartitionConfig) -> None:
    each, sites = partition.labels_per_site, partition.sites or 1
    if each > labels:
        raise ValueError(f"partition.labels_per_site is {each} but there are {labels} labels; expected at most as many")
    if each * sites < labels:
        raise ValueError(
            f"partition has {sites} sites of {each} labels, too few for {labels} labels; expected at least "
            f"{-(-labels // each)} sites, so that no row is left out"
        )
