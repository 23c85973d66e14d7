"""Where a run and a site meet: what the run must ask for, and what of it the site carries out.

A run config comes from the coordinator, who may be hostile: could it choose which fields and labels are read, its
refusals would answer questions on single rows; could it choose the base model, it would choose which paths are opened
and which chat template sees the messages. So both are the site's, see ``client.site_config``.
"""

from __future__ import annotations

from client.policy.rules import expect_run
from client.site_config import RowsConfig, SiteConfig
from common.config.data import DataConfig, PartitionConfig
from common.config.run import RunConfig
from common.errors import ConfigError, PrivacyError

_SHOWN = 80


def agreed_config(config: RunConfig, site_config: SiteConfig) -> RunConfig:
    """Return a run config as a real site carries it out. Reads no row and no model.

    Rows are those of the site's file, read by the site's own fields; base model and tokenizer are the site's own.
    Template, length, precision and pooling stay the run's. Partition, test part and row limits describe simulated
    sites and are dropped. Digests are compared with ``config``, never with what is returned here.

    Raises:
        ConfigError: if the run simulates faults, which belongs to fedtune-sim.
        PolicyError: if a key of the run goes beyond the site's policy.
        PrivacyError: if the run asks for another task, field, label set or person than the site config allows.
    """
    if config.simulation is not None:
        raise ConfigError("simulation of the run is set; expected no such section at a real site. Leave the run.")
    expect_run(site_config.policy, config)
    rows, data = site_config.rows, config.data
    for key in RowsConfig.model_fields:
        asked, own = getattr(data, key), getattr(rows, key)
        if asked != own:
            raise _other(f"data.{key}", asked, f"{own!r}, which is rows.{key} of the site config")
    if config.privacy.unit == "user" and site_config.person_field is None:
        raise _other("data.person_field", data.person_field, "no run for persons: the site config has no person_field")
    if config.privacy.unit == "user" and data.person_field != site_config.person_field:
        own_field = site_config.person_field
        raise _other("data.person_field", data.person_field, f"{own_field!r}, which names the person at this site")
    own_data = DataConfig(
        **{key: getattr(rows, key) for key in RowsConfig.model_fields},
        train=site_config.data,
        person_field=site_config.person_field,
        prompt_template=data.prompt_template,
        max_length=data.max_length,
        partition=PartitionConfig(kind="iid", sites=1),
    )
    own_model = config.model.model_copy(update={"source": site_config.model, "revision": None})
    return config.model_copy(update={"data": own_data, "model": own_model})


def _other(key: str, asked: object, expected: str) -> PrivacyError:
    return PrivacyError(
        f"{key} of the run is {repr(asked)[:_SHOWN]}; expected {expected}. Leave the run, or have it changed."
    )
