"""The exceptions fedtune raises for what a person or a peer got wrong.

    FedtuneError
    ├── ConfigError        a run config, an override or a flag
    ├── DataError          a data file or a row in it
    ├── ModelError         a base model folder, its weights or its fingerprint
    ├── WireError          bytes or a header that came from another process
    │   └── AdmissionError an update the coordinator does not let in
    ├── PrivacyError       a mechanism that cannot be planned or must not run
    │   └── PolicyError    a run that asks for more than a site's own policy allows
    └── RunError           a run folder, a checkpoint, a round that cannot complete

Every message reads "<what> <got>; expected <rule>. <remedy>" on one line. Messages may name values from
private files, so they are shown where they arise and never sent: only ``code`` leaves a site.
"""

from __future__ import annotations


class FedtuneError(Exception):
    """Base of all errors that end in one line for the user instead of a traceback."""

    code = "error"


class ConfigError(FedtuneError):
    """The run config, an override or a command-line flag is not usable."""

    code = "config"


class DataError(FedtuneError):
    """A data file or one of its rows is not usable."""

    code = "data"


class ModelError(FedtuneError):
    """A base model cannot be loaded, or is not the one that was asked for."""

    code = "model"


class WireError(FedtuneError):
    """A message from another process does not follow the wire format."""

    code = "wire"


class AdmissionError(WireError):
    """An update that the coordinator refuses.

    Args:
        reason: a short machine-readable word, recorded with the round (for instance ``"non_finite"``).
        detail: what was found and what was expected.
    """

    code = "admission"

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class PrivacyError(FedtuneError):
    """A privacy mechanism cannot be planned or must not run."""

    code = "privacy"


class PolicyError(PrivacyError):
    """A run asks for more than a site's policy allows, or at a time when the site answers nothing.

    Args:
        key: the key of the run config, which leaves the site with the refusal; or that of the policy.
        message: for the site's own log.
        code: what the coordinator is told.
    """

    code = "policy"

    def __init__(self, key: str, message: str, *, code: str = "policy") -> None:
        super().__init__(message)
        self.key = key
        self.code = code


class RunError(FedtuneError):
    """A run folder, a checkpoint or a round that cannot be completed."""

    code = "run"
