"""Types of fields that many methods share; what a matrix must have room for is checked at every site, too."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, PositiveInt

if TYPE_CHECKING:
    from attunement.method import Method
    from attunement.site import Site


class Fits(NamedTuple):
    """Marks a field whose value a matrix must have room for: `reason(name, value, site)` says why it has not, or None."""

    reason: Callable[[str, Any, Site], str | None]


def too_large(name: str, rank: int, site: Site) -> str | None:
    """Why a rank does not fit a matrix (out, in), or None: above min(out, in) a product B A only costs more."""
    largest = min(site.outputs, site.inputs)
    if rank <= largest:
        return None
    return f"{name} {rank} is larger than a {site.outputs} x {site.inputs} matrix has; the largest is {largest}"


def nearest_divisor(whole: int, size: int, least: int = 1) -> int:
    """The divisor of a number, at least `least`, that is nearest to a size."""
    sizes = (d for d in range(least, whole + 1) if whole % d == 0)
    return min(sizes, key=lambda d: abs(d - size), default=whole)


def undivided(name: str, size: int, site: Site) -> str | None:
    """Why a number does not divide both sizes of a matrix, or None."""
    common = math.gcd(site.outputs, site.inputs)
    if common % size == 0:
        return None
    nearest = nearest_divisor(common, size)
    return f"{name} {size} does not divide {site.outputs} x {site.inputs}; the nearest that does is {nearest}"


def unfilled(name: str, size: int, site: Site) -> str | None:
    """Why blocks of a size of at least 2 do not fill the inputs, or None."""
    if site.inputs % size == 0:
        return None
    nearest = nearest_divisor(site.inputs, size, least=2)
    return f"{name} {size} does not divide its {site.inputs} inputs; the nearest that does is {nearest}"


def no_room(name: str, count: int, site: Any) -> str | None:
    """Why a sequence has no place for so many tokens more, or None."""
    if site.limit is None or count < site.limit:
        return None
    return f"{name} {count} leaves no room in its {site.limit} positions; the most is {site.limit - 1}"


Rank = Annotated[PositiveInt, Fits(too_large)]
"""How many columns B and rows A have in a product B A: at most the smaller size of the matrix."""
Tile = Annotated[PositiveInt, Fits(undivided)]
"""A size or a count of tiles: it divides both sizes of the matrix."""
Block = Annotated[int, Field(ge=2), Fits(unfilled)]
"""How many neighbouring inputs are turned together: it divides the inputs of the matrix."""
Tokens = Annotated[PositiveInt, Fits(no_room)]
"""How many tokens a sequence gets: fewer than the positions that the model knows."""
Dropout = Annotated[float, Field(ge=0, lt=1)]
"""The chance with which an entry of x is zero in training: a field `dropout` of this type is applied by the core."""
Share = Annotated[float, Field(gt=0, le=1)]
"""A part of a whole."""


def misfit(method: Method, site: Site) -> str | None:
    """Why a method cannot take a site, as the end of a sentence: a field that does not fit it, or its own refusal."""
    for name, fits in _fitted(type(method)):  # type: ignore[arg-type]
        value = getattr(method, name)
        if value is not None and (reason := fits.reason(name, value, site)) is not None:
            return reason
    return method.refuse(site)


@functools.cache
def _fitted(cls: Any) -> tuple[tuple[str, Fits], ...]:
    """The marked fields of a method's class: the mark stands on the field's type or inside it, as in `Rank | None`."""

    def marks(hint: Any) -> list[Fits]:
        own = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Fits)]
        return own + [mark for part in typing.get_args(hint) for mark in marks(part)]

    found = []
    for name, field in cls.__pydantic_fields__.items():
        own = [mark for mark in field.metadata if isinstance(mark, Fits)]
        found += [(name, mark) for mark in own + marks(field.annotation)]
    return tuple(found)
