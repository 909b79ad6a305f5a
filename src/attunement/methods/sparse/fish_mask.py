"""FISH Mask: the entries with the most Fisher information are trained, the others stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveInt

from attunement.fields import Share
from attunement.method import ParameterMethod, register
from attunement.methods._entries import MostSensitive, largest
from attunement.site import Site
from attunement.statistics import Statistics


@register("sparse/fish_mask", source="https://arxiv.org/abs/2111.09839")
class FishMask(MostSensitive, ParameterMethod):
    """Fisher-induced sparse unchanging mask: W' = W, plus `values` at the entries `index`, both (count,).

    The entries are those of all chosen parameters together whose squared gradient of the loss, averaged over the data, is
    largest. That is the empirical Fisher information where each batch is one row with its label.

    Args:
        share: of the entries that train; 0.005, as in the paper's table and its code.
        count: how many instead.
        kept: how many entries each parameter has; set by `adapt`.

    It needs data: 1,024 rows in the reference code, one a batch.
    Start: values zero. The placement is every parameter, biases and norms too. A task head trains whole beside it, as there;
    its size is not taken off the count here.
    The reference code trains W itself under a masked gradient, which is the same function; weight decay pulls towards the
    base here, and its other scores (absolute gradients, labels drawn from the model) are left out.
    """

    needs: ClassVar[tuple[str, ...]] = ("fisher",)
    cannot: ClassVar[dict[str, str]] = {"meta": "it starts from data, which cannot run through a model without values"}

    share: Share = 0.005
    count: PositiveInt | None = None
    kept: dict[str, PositiveInt] | None = None

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, FishMask]:
        scores = {site: statistics[site]["fisher"] for site in sites}
        total = sum(score.numel() for score in scores.values())
        found = largest(scores, min(self.count or max(1, round(self.share * total)), total))
        method = dataclasses.replace(self, kept={site.key: len(index) for site, index in found.items() if len(index)})
        return {site: method for site, index in found.items() if len(index)}
