"""EVA: LoRA that starts along the directions in which a layer's inputs vary most, with ranks where they explain most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from attunement.fields import Share
from attunement.method import Method, Tensors, register
from attunement.methods.low_rank.lora import LoRA
from attunement.site import Site
from attunement.statistics import Components, Statistics, out_of_sight


@register("low_rank/eva", source="https://arxiv.org/abs/2410.07170", placement="attention.*|mlp.*")
class EVA(LoRA):
    """Explained variance adaptation: W' = W + (alpha / rank) B A, A (rank, in) the principal components of the inputs.

    The components of all sites compete: those that explain the largest shares of their site's variance win, until the
    budget, `rank` a site, is spent. A site gets as many ranks as it has winners; one without any is left alone.

    Args:
        rank: r, the mean rank. 16, as in the reference code.
        alpha: numerator of the scale; 1, as in the reference code.
        rank_stabilised, dropout, lora_plus: as in `LoRA`.
        rho: a site gets at most rho * rank; 1 leaves every site at `rank`. 2, as in the reference code.
        tau: the data are looked at until the first `rank` components of every site keep their direction from one batch
            to the next, a cosine of tau, or until they end.
        whiten: divide the components by the square root of their singular values.
        keep_scale: give a site of rank k alpha * k / r, so that all have the same scale, as PEFT does; the reference
            code keeps alpha, so that a site's scale falls as its rank grows.

    Start: B zero, so W' = W. The components are found batch by batch (incremental PCA of centred inputs), in batches
    that have rho * rank tokens at least. Tokens without a label count, as in the reference script; PEFT leaves them out.
    The reference code goes round the data until all sites have settled and stops looking at each that has; here the
    data are gone through once.
    """

    cannot: ClassVar[dict[str, str]] = {"meta": "it starts from data, which cannot run through a model without values"}

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = 1.0
    rho: Annotated[float, Field(ge=1)] = 2.0
    tau: Share = 0.99
    whiten: bool = False
    keep_scale: bool = False

    @property
    def needs(self) -> tuple[Components]:  # type: ignore[override]
        return (Components(round(self.rank * self.rho), watched=self.rank, tau=self.tau),)

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, Method]:
        most = {site: min(round(self.rank * self.rho), site.outputs, site.inputs) for site in sites}
        shares = [statistics[site]["components"].share[: most[site]].cpu() for site in sites]
        owner = torch.cat([torch.full((len(share),), i) for i, share in enumerate(shares)])
        winners = torch.cat(shares).argsort(descending=True, stable=True)[: self.rank * len(sites)]
        counts = owner[winners].bincount(minlength=len(sites)).tolist()
        return {site: self._of_rank(count) for site, count in zip(sites, counts, strict=True) if count}

    def _of_rank(self, count: int) -> EVA:
        alpha = self.alpha * count / self.rank if self.keep_scale and self.alpha is not None else self.alpha
        return dataclasses.replace(self, rank=count, alpha=alpha)

    def tensors(self, site: Site) -> Tensors:
        return {**super().tensors(site), "A": torch.zeros(self.rank, site.inputs)}  # (rank, in), to be filled

    def calibrate(self, site: Site, statistics: Statistics) -> Tensors:
        found = statistics["components"]
        A = found.directions[: self.rank]  # (rank, in)
        A = A / found.singular[: self.rank, None].sqrt() if self.whiten else A.clone()
        return {**super().tensors(site), "A": A}

    def refuse(self, site: Site) -> str | None:
        return super().refuse(site) or out_of_sight(site)
