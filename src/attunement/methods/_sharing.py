"""What sites that share tensors have to know: which of them are of one kind, their order, and draws of their own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch

from attunement.method import Tagged, seeded
from attunement.methods._schedule import drawn
from attunement.site import Site


class Lot(NamedTuple):
    """Where a site stands among those of its method in an adapter; a stack of matrices counts with each of them."""

    number: int
    kind: int
    """Which of the kinds of sites."""
    before: int
    """How many matrices of its kind come before it."""
    alike: int
    """How many matrices of its kind there are."""


def size(site: Site) -> Hashable:
    """Sites of one size."""
    return site.outputs, site.inputs


def role(site: Site) -> Hashable:
    """Sites of one role in one stack, and of one size: what shares across layers and not within one."""
    return site.stack, site.role, site.outputs, site.inputs


def kinds(sites: Iterable[Site], kind: Callable[[Site], Hashable]) -> list[list[Site]]:
    """The sites by kind, in order of appearance."""
    found: dict[Hashable, list[Site]] = {}
    for site in sites:
        found.setdefault(kind(site), []).append(site)
    return list(found.values())


def lot(site: Site, kind: Callable[[Site], Hashable] = size) -> Lot:
    """Where a site stands among those of its method."""
    sites = list(site.among) or [site]
    own, number, words = kind(site), place(site), list(dict.fromkeys(map(kind, sites)))
    before = sum(copies(one) for one in sites[:number] if kind(one) == own)
    return Lot(
        number, words.index(own), before, before + sum(copies(one) for one in sites[number:] if kind(one) == own)
    )


def place(site: Site) -> int:
    """Its number among the sites of its method."""
    return next((number for number, one in enumerate(site.among) if one.key == site.key), 0)


def copies(site: Site) -> int:
    """How many matrices a site has: one, but for stacks of experts."""
    return math.prod(site.batch)


def nth(site: Site) -> int:
    """Which matrix of a stack it is."""
    return getattr(site, "_index", None) or 0


def own(seed: int, site: Site, *numbers: int) -> torch.Generator:
    """A generator for the draws of one matrix, which follow from the seed and from the matrix's name."""
    return drawn(seed, zlib.crc32(site.key.encode()), nth(site), *numbers)


def written(number: int) -> Tagged:
    """A whole number as the width of an empty tensor, so that an expression knows it without reading a value."""
    return seeded(torch.empty(0, number))


def widest(sites: Iterable[Site]) -> tuple[int, int]:
    """The largest `outputs` and the largest `inputs`."""
    both = [(site.outputs, site.inputs) for site in sites]
    return max(out for out, _ in both), max(inputs for _, inputs in both)
