"""What is computed of a model once, and forgotten with it: a cache that keeps no base model in memory.

An ``lru_cache`` over a model holds it until the entry is pushed out, and with it the whole base, of which a site's
device may have room for one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Concatenate, Generic, ParamSpec, TypeVar
from weakref import ref

from common.models.adapter import AdaptedModel

P = ParamSpec("P")
R = TypeVar("R")


class WeakCache(Generic[P, R]):
    """A function of a model and of hashable values, with what it gave last.

    Args:
        function: what is computed; its result must not refer to the model.
        size: how many results are kept, whatever models they are of.
    """

    def __init__(self, function: Callable[Concatenate[AdaptedModel, P], R], size: int) -> None:
        @lru_cache(maxsize=size)
        def kept(held: ref[AdaptedModel], /, *args: P.args, **kwargs: P.kwargs) -> R:
            model = held()
            if model is None:
                raise ReferenceError("the model is gone; expected one that its caller holds.")
            return function(model, *args, **kwargs)

        # A dead reference equals no other, so that a new model in an old one's place gets nothing of it.
        self._kept = kept
        update_wrapper(self, function)

    def __call__(self, model: AdaptedModel, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what the function gives, or gave for the same model and values."""
        return self._kept(ref(model), *args, **kwargs)  # type: ignore[arg-type]  # what has no hash raises TypeError

    def cache_clear(self) -> None:
        """Forget all results."""
        self._kept.cache_clear()


def weak_cache(size: int) -> Callable[[Callable[Concatenate[AdaptedModel, P], R]], WeakCache[P, R]]:
    """Let a function of a model remember its last ``size`` results without keeping a model alive."""

    def decorate(function: Callable[Concatenate[AdaptedModel, P], R]) -> WeakCache[P, R]:
        return WeakCache(function, size)

    return decorate
