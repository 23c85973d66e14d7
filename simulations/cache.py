"""Where simulations keep what they can make again: ``FEDTUNE_CACHE``, else the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from client.site import TOKEN_CACHE

VARIABLE = "FEDTUNE_CACHE"


def token_cache_folder() -> Path | None:
    """Return the folder of token tables, not made yet.

    ``FEDTUNE_CACHE`` moves it; set to nothing, tokens are kept in memory and None is returned. Otherwise it is
    ``fedtune`` in ``XDG_CACHE_HOME``, by default in ``~/.cache``.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser().absolute() if named else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedtune"


def virtual_node(place: int, count: int) -> dict[str, int | str]:
    """Return the node config of a virtual site.

    Args:
        place: of the site, in the order of the data.
        count: number of sites.
    """
    folder = token_cache_folder()
    kept: dict[str, int | str] = {} if folder is None else {TOKEN_CACHE: str(folder)}
    return {"partition-id": place, "num-partitions": count, **kept}
