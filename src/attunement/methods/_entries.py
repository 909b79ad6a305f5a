"""Trained numbers at some entries of a matrix: at random ones, which follow from a seed, or at those that score highest."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, TypeVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from attunement.errors import AttunementError
from attunement.fields import Fits
from attunement.method import Method, Tensors, fixed, seeded
from attunement.site import Site
from attunement.statistics import Statistics

K = TypeVar("K", bound=Hashable)


def spectrum(site: Site, count: int, seed: int) -> Tensors:
    """`spectrum` (count,), zero, and `index` (count,) of its entries in the flat matrix; PEFT draws the same ones."""
    return {"spectrum": torch.zeros(count), "index": seeded(at_random(site.outputs * site.inputs, count, seed).clone())}


@functools.lru_cache(maxsize=8)
def at_random(size: int, count: int, seed: int) -> Tensor:
    """The first `count` of a random order of so many entries; kept, since every matrix of a size has the same."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


def too_many(name: str, count: int, site: Site) -> str | None:
    """Why a matrix has not as many entries, as the end of a sentence, or None."""
    size = site.outputs * site.inputs
    return None if count <= size else f"{name} {count} is larger than its {size} entries; the most is {size}"


Frequencies = Annotated[PositiveInt, Fits(too_many)]
"""How many entries of a matrix's spectrum are trained."""


def integer(size: int) -> torch.dtype:
    """The type of an index into so many entries."""
    return torch.int32 if size < 2**31 else torch.int64


def scattered(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Zeros in the shape of `like` but for `values` (count,) at the flat `index` (count,)."""
    return values.new_zeros(like.numel()).scatter(0, index.long(), values).view(like.shape)


def bare(site: Site, count: int) -> Tensors:
    """`values` (count,), zero, and `index` (count,), which is put in place later."""
    index = torch.zeros(count, dtype=integer(site.weight.numel()))
    return {"values": torch.zeros(count), "index": fixed(index)}


def at_largest(scores: Tensor, count: int) -> Tensors:
    """`values` (count,), zero, and `index` (count,), rising, of the entries with the largest scores."""
    index = scores.flatten().topk(count, sorted=False).indices.sort().values
    return {"values": torch.zeros(count), "index": fixed(index.to(integer(scores.numel())))}


class MostSensitive(Method):
    """W' = W plus `values` at the entries of most Fisher information: `kept`, by a site's key, is how many it has."""

    kept: Mapping[str, int] | None

    def tensors(self, site: Site) -> Tensors:
        return bare(site, (self.kept or {})[site.key])

    def calibrate(self, site: Site, statistics: Statistics) -> Tensors:
        return at_largest(statistics["fisher"], (self.kept or {})[site.key])

    def delta(self, _: Tensor, values: Tensor, index: Tensor) -> Tensor:
        return scattered(values, index, _)


def largest(scores: Mapping[K, Tensor], count: int) -> dict[K, Tensor]:
    """The flat indices, rising, of the `count` largest scores of all tensors together; one of them may have none."""
    return next(iter(rankings(scores, [count])))


def rankings(scores: Mapping[K, Tensor], counts: Sequence[int]) -> Iterator[dict[K, Tensor]]:
    """The same for several counts, at the price of one sorting.

    Raises:
        AttunementError: where a score is not finite.
    """
    if odd := next((key for key, score in scores.items() if not torch.isfinite(score).all()), None):
        raise AttunementError(f"adapt: the statistics of {getattr(odd, 'key', odd)} are not finite")
    device = next(iter(scores.values())).device
    flat = torch.cat([score.flatten().to(device) for score in scores.values()])
    order = flat.topk(min(max(counts), len(flat))).indices
    starts = torch.tensor([0, *(score.numel() for score in scores.values())], device=device).cumsum(0)
    for count in counts:
        index = order[:count].sort().values
        ends = torch.searchsorted(index, starts)
        yield {key: index[ends[i] : ends[i + 1]] - starts[i] for i, key in enumerate(scores)}
