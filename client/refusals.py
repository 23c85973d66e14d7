"""What a refusal says: to the coordinator a code and a place in our code, to the site's own log a line.

Two refusals leave without a place and under one code each, because where they arise would tell of single rows:

================  ================================================================================================
``site_data``     the site's own rows cannot be read or tokenised, whatever the row, line or rule
``round_failed``  a charged round could not be trained, whatever went wrong; from then on it is its only answer
================  ================================================================================================

What goes beyond the site's policy is refused with the code ``policy`` and, as its place, the key of the run config that
does: the coordinator's own.

That such a refusal was sent at all still depends on the data.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError, FedtuneError, PolicyError, PrivacyError
from common.run_source import APP_ROOT
from common.wire import CHANGED, Refusal


class SiteDataError(DataError):
    """The site's own rows cannot be read or tokenised."""

    code = "site_data"


class ChangedError(FedtuneError):
    """The site is no longer as it described itself to the run."""

    code = CHANGED


class RoundFailedError(PrivacyError):
    """A round that was charged failed, which is the only answer to it that ever leaves."""

    code = "round_failed"


def refusal_of(error: Exception) -> Refusal:
    """Return what the coordinator is told of an error."""
    code = error.code if isinstance(error, FedtuneError) else "internal"
    if isinstance(error, PolicyError):
        return Refusal(code=code, place=error.key)
    placeless = isinstance(error, SiteDataError | RoundFailedError)
    return Refusal(code=code, place="" if placeless else place_of(error))


def log_line(error: Exception) -> str:
    """Return what the site's own log says: our errors in words, others, which may quote rows, by type and place."""
    if isinstance(error, FedtuneError):
        return str(error)
    return f"internal error {type(error).__name__} at {place_of(error)}"


def place_of(error: BaseException) -> str:
    """File and line of our own code nearest to where the error arose; no values."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(APP_ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(APP_ROOT).as_posix()}:{frame.lineno}"
    return type(error).__name__


@contextmanager
def own_rows() -> Iterator[None]:
    """Turn whatever goes wrong with the site's own rows into one and the same refusal.

    Raises:
        SiteDataError: in place of any exception; its text is for the site's own log.
    """
    try:
        yield
    except Exception as error:  # whatever its type: type and place would tell which rule a row breaks
        raise SiteDataError(log_line(error)) from error
