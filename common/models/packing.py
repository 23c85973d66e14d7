"""The packed forward pass: transformer blocks compute on tokens that exist, and give the same as on padded rows.

Embeddings, positions and everything after the last block are the model's own, on [B, T]. Hooks, set for one call,
take the padding out before the first block and put zeros in its place after the last; between them every layer, LoRA
factors included, sees [1, N, d], and only attention pads (:mod:`common.models.attention`). A language model's head sees
[1, N, d] as well; a classifier's last block is narrowed (:mod:`common.models.narrowing`). How the rows lie can be read
inside by :func:`common.models.layout.segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.models.attention import Packed, attending
from common.models.families import Blocks
from common.models.layout import Layout, laid_out, lay
from common.models.narrowing import Columns, Narrow

Forward = Callable[[Any, Tensor, Tensor], Tensor]
"""From a PEFT model, input_ids [B, T] and attention_mask [B, T] to logits."""

_ALLOWED: ContextVar[bool] = ContextVar("packing allowed", default=True)


@contextmanager
def padded() -> Iterator[None]:
    """Compute on padded rows for a while, for code that needs an example in each place of the first dimension."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def plain_forward(module: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run the model on padded rows."""
    logits: Tensor = module(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits


@dataclass(frozen=True)
class Start:
    """Where a forward pass starts, if not at the first block.

    Attributes:
        depth: the block, from 0; those below are not run.
        states: [1, N, d], what enters it.
    """

    depth: int
    states: Tensor


class PackedForward:
    """Runs a model on packed rows; a :data:`Forward`.

    Args:
        model: the model, before or after PEFT wraps it, loaded with :data:`common.models.attention.PACKED`.
        blocks: what its transformer blocks are called.
        language_model: whether it has a language model's head.
        reads: the column of each row that a classifier reads, [B, T] ids to int64 [B]; None if it reads all.
    """

    def __init__(self, model: Any, blocks: Blocks, *, language_model: bool, reads: Columns | None) -> None:
        (found,) = (layer for name, layer in model.named_modules() if f".{name}".endswith(f".{blocks.path}"))
        self._layers: list[nn.Module] = list(found)
        self._blocks = blocks
        self._head: nn.Module | None = model.get_output_embeddings() if language_model else None
        self._reads = reads

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return len(self._layers)

    def states(self, module: Any, input_ids: Tensor, attention_mask: Tensor, depth: int) -> Tensor:
        """Return what enters block ``depth``, [1, N, d]; every row has a token."""
        packed = Packed(Layout(attention_mask))
        seen: list[Tensor] = []

        def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        with self._hooked(packed), attending(packed), laid_out(None), _skipped(self._layers[depth:]):
            handle = self._layers[depth].register_forward_pre_hook(note)
            try:
                plain_forward(module, input_ids, attention_mask)
            finally:
                handle.remove()
        return seen[0]

    def __call__(self, module: Any, input_ids: Tensor, attention_mask: Tensor, start: Start | None = None) -> Tensor:
        """Return the logits, [B, L] or [B, T, V]; at padding, a language model's are zero.

        Batches with a row without a token, or with padding where the classifier reads, run padded. With ``start``, no
        block below is run; a padded pass runs them all, and gives the same.
        """
        if not _ALLOWED.get():
            return plain_forward(module, input_ids, attention_mask)
        layout = Layout(attention_mask, None if self._reads is None else self._reads(input_ids))
        if not layout.complete:
            return plain_forward(module, input_ids, attention_mask)
        packed = Packed(layout)
        below = [] if start is None else self._layers[: start.depth]
        with self._hooked(packed), attending(packed), laid_out(None), _skipped(below):
            if start is None:
                return plain_forward(module, input_ids, attention_mask)
            states = start.states
            handle = self._layers[start.depth].register_forward_pre_hook(lambda _, inputs: (states, *inputs[1:]))
            try:
                return plain_forward(module, input_ids, attention_mask)
            finally:
                handle.remove()

    @contextmanager
    def _hooked(self, packed: Packed) -> Iterator[None]:
        first, last = self._layers[0], self._layers[-1]
        with ExitStack() as hooks:

            def around(layer: nn.Module, before: Any, after: Any) -> None:
                if before is not None:
                    hooks.callback(layer.register_forward_pre_hook(before).remove)
                if after is not None:
                    hooks.callback(layer.register_forward_hook(after).remove)

            turn = _Turn(packed.layout)
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(turn, with_kwargs=True).remove)
            around(first, _Enter(packed), None)
            if packed.layout.read is not None:
                narrow = Narrow(packed, packed.layout.read)
                around(last, narrow.begin, narrow.end)
                for name in self._blocks.single:
                    around(last.get_submodule(name), narrow.cut, narrow.fill)
                if self._blocks.onwards is not None:
                    around(last.get_submodule(self._blocks.onwards), narrow.cut_for_good, None)
            else:
                around(last, None, _Leave(packed))
            if self._head is not None:
                around(self._head, _Enter(packed), _Leave(packed))
            yield


@contextmanager
def _skipped(layers: list[nn.Module]) -> Iterator[None]:
    """Let blocks return what they are given."""
    try:
        for layer in layers:
            layer.forward = _as_it_is
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _as_it_is(states: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    return states


class _Enter:
    """Takes padding out of a layer's first argument."""

    def __init__(self, packed: Packed) -> None:
        self._layout = packed.layout

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        lay(self._layout.lengths)
        return (self._layout.pack(arguments[0]), *arguments[1:])


class _Leave:
    """Puts zeros in its place in a layer's output."""

    def __init__(self, packed: Packed) -> None:
        self._layout = packed.layout

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        lay(None)
        return self._layout.unpack(output)


class _Turn:
    """Gives rotary position embeddings, cos and sin of [1 or B, T, D], to packed tokens; made once for all blocks."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._packed: tuple[Tensor, ...] | None = None

    def __call__(self, layer: nn.Module, arguments: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        turns = settings.get("position_embeddings")
        if turns is None:
            return None
        if self._packed is None:
            rows = self._layout.shape[0]
            self._packed = tuple(self._layout.pack(turn.expand(rows, -1, -1)) for turn in turns)
        return arguments, settings | {"position_embeddings": self._packed}
