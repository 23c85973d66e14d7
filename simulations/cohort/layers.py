"""Trained linear layers that apply each site's own weights to that site's rows, in one pass over several sites.

A pass holds rows of several sites, site after site. Frozen layers see them all at once; a trained one, a LoRA factor or
a head, gets x [1, N, n] on packed rows or [B, ..., n], and multiplies the part of each site by that site's weight: in a
loop over sites on a CPU, elsewhere as one batched product, the parts padded to the longest. No sum runs over two sites,
so that each site's weights get the gradient of its own rows, or under DP ``grad_sample`` of each of its rows, as
:mod:`client.dp.capture` leaves it.

The layers' forward is replaced for as long as the context is open; no weight of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from client.dp.capture import capturable_layers, leave, products, rows_of
from common.errors import PrivacyError, RunError
from common.models.adapter import AdaptedModel
from common.models.layout import segments

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Share:
    """What a site has in a pass.

    Attributes:
        site: number of the site, as the context was given them.
        rows: how many rows of the pass are its own; they lie next to each other.
    """

    site: int
    rows: int


class Places:
    """How the places of x [N, n] are divided.

    Args:
        examples: places of each row, in order.
        shares: the sites, in order.

    Attributes:
        examples: as given.
        sites: places of each site.
    """

    def __init__(self, examples: Sequence[int], shares: Sequence[Share], device: torch.device) -> None:
        bounds = [0, *accumulate(share.rows for share in shares)]
        if bounds[-1] != len(examples):
            raise RunError(f"a layer was given {len(examples)} rows in a pass of {bounds[-1]}; expected those.")
        self.examples = list(examples)
        self.sites = [sum(examples[start:stop]) for start, stop in pairwise(bounds)]
        self._device = device

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """Int64 [K L] and [N]: the place in [N] at each place of K blocks of L, and the way back."""
        sizes = torch.tensor(self.sites)
        within = torch.arange(int(sizes.max()))
        index = (sizes.cumsum(0) - sizes)[:, None] + torch.minimum(within, sizes[:, None] - 1)
        back = (within < sizes[:, None]).flatten().nonzero().squeeze(1)
        return index.flatten().to(self._device), back.to(self._device)


class Pass:
    """Which sites' rows the pass that runs now holds."""

    def __init__(self) -> None:
        self._shares: tuple[Share, ...] = ()
        self._known: dict[tuple[int, ...], Places] = {}

    @property
    def sites(self) -> list[int]:
        """The sites in the pass, in the order of their rows."""
        return [share.site for share in self._shares]

    @property
    def rows(self) -> list[int]:
        """How many rows each of them has."""
        return [share.rows for share in self._shares]

    def hold(self, shares: Sequence[Share]) -> None:
        """Begin a pass over the rows of ``shares``."""
        self._shares, self._known = tuple(shares), {}

    def places(self, x: Tensor) -> Places:
        """Return how the rows lie in x [1, N, n] or [B, ..., n], which a layer is given now."""
        examples = rows_of(x, segments())
        key = tuple(examples)
        if key not in self._known:
            self._known[key] = Places(examples, self._shares, x.device)
        return self._known[key]


class _BySite(torch.autograd.Function):
    """y [N, m] from x [N, n], K weights [m, n] and K or no biases [m].

    Its backward gives each weight its gradient, or, under DP, leaves ``grad_sample`` on it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, rows: list[int] | None, *factors: Tensor) -> Tensor:
        count = len(places.sites)
        ctx.save_for_backward(x)
        ctx.places, ctx.rows, ctx.weights, ctx.biases = places, rows, factors[:count], factors[count:]
        y = multiply_by_site(x, [weight.t() for weight in ctx.weights], places)
        for part, bias in zip(torch.split(y, places.sites), ctx.biases, strict=False):
            part += bias
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        (x,) = ctx.saved_tensors
        places, weights, biases = ctx.places, ctx.weights, ctx.biases
        to_x = multiply_by_site(grad, weights, places) if ctx.needs_input_grad[0] else None
        if ctx.rows is None:
            of_weights = products(grad, x, places.sites).unbind()
            of_biases = [part.sum(dim=0) for part in torch.split(grad, places.sites)] if biases else ()
            return to_x, None, None, *of_weights, *of_biases
        _leave_all(weights, products(grad, x, places.examples), ctx.rows)
        if biases:
            sums = torch.stack([part.sum(dim=0) for part in torch.split(grad, places.examples)])
            _leave_all(biases, sums, ctx.rows)
        return (to_x, None, None, *(None for _ in (*weights, *biases)))


def _leave_all(parameters: Sequence[nn.Parameter], gradients: Tensor, rows: list[int]) -> None:
    """Leave per-example gradients [B, ...] on the sites' parameters, ``rows`` of them on each."""
    for parameter, own in zip(parameters, torch.split(gradients, rows), strict=True):
        if parameter.requires_grad:
            leave(parameter, own)


def multiply_by_site(x: Tensor, matrices: Sequence[Tensor], places: Places, *, batched: bool | None = None) -> Tensor:
    """Multiply the part of x [N, a] of each of K sites by its own matrix [a, b], to [N, b].

    Args:
        x: what is multiplied.
        matrices: one a site.
        places: which part is whose.
        batched: whether all at once, the parts padded to the longest; by default wherever launching many small products
            costs more than the padding, which is everywhere but on a CPU.
    """
    if batched if batched is not None else x.device.type != "cpu":
        index, back = places.blocks
        padded = x.index_select(0, index).view(len(matrices), -1, x.shape[1])
        return torch.bmm(padded, torch.stack(list(matrices))).flatten(0, 1).index_select(0, back)
    y = x.new_empty(len(x), matrices[0].shape[1])
    parts = zip(torch.split(x, places.sites), matrices, torch.split(y, places.sites), strict=True)
    for part, matrix, into in parts:
        torch.mm(part, matrix, out=into)
    return y


def divisible_layers(model: AdaptedModel, names: frozenset[str]) -> dict[str, nn.Module] | None:
    """Return the layers that own the trained ``names``, or None where they are not all plain linear layers.

    Then sites cannot be trained together: nothing else is known to treat its rows apart.
    """
    trained = {name: parameter for name, parameter in model.parameters.items() if name in names}
    try:
        layers = dict(capturable_layers(model.module, trained))
    except PrivacyError:
        return None
    return layers if all(type(layer) is nn.Linear for layer in layers.values()) else None


@contextmanager
def divided_layers(
    model: AdaptedModel, layers: Mapping[str, nn.Module], sites: Sequence[Parameters], *, private: bool
) -> Iterator[Pass]:
    """Let ``layers`` apply to each site's rows the site's own parameters while the context is open.

    Args:
        model: the model.
        layers: from :func:`divisible_layers`.
        sites: each site's trained parameters by saved name.
        private: whether per-example gradients are left, in place of gradients.

    Yields:
        What has to be told which rows a pass holds, before each.

    Raises:
        RunError: if a layer's forward is replaced already.
    """
    if any("forward" in layer.__dict__ for layer in layers.values()):
        raise RunError("a layer's forward is replaced already; expected none while sites are trained together.")
    running = Pass()
    names = {id(parameter): name for name, parameter in model.parameters.items()}
    with ExitStack() as replaced:
        for layer in layers.values():
            layer.forward = _divided_forward(layer, names, sites, running, private=private)
            replaced.callback(layer.__dict__.pop, "forward", None)
        yield running


def _divided_forward(
    layer: Any, names: Mapping[int, str], sites: Sequence[Parameters], running: Pass, *, private: bool
) -> Callable[[Tensor], Tensor]:
    held = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    own = [[site.get(names.get(id(parameter), ""), parameter) for site in sites] for parameter in held]

    def multiply(x: Tensor) -> Tensor:
        places = running.places(x)
        present = running.sites
        factors = [by_site[site] for by_site in own for site in present]
        rows = running.rows if private else None
        y: Tensor = _BySite.apply(x.reshape(-1, x.shape[-1]), places, rows, *factors)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    return multiply
