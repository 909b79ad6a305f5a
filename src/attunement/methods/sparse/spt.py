"""SPT: matrices in which many entries are sensitive get a LoRA, the others train those entries alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt

from attunement.fields import Share, misfit
from attunement.method import Method, WeightMethod, register
from attunement.methods._entries import MostSensitive, rankings
from attunement.methods.low_rank.lora import LoRA
from attunement.site import Site
from attunement.statistics import Statistics


@register(
    "sparse/spt",
    source="https://arxiv.org/abs/2303.08566",
    placement="attention.{query,key,value,output}|mlp.{up,down}",
)
class SPT(MostSensitive, WeightMethod):
    """Sensitivity-aware tuning: W' = W + B A where much is sensitive, else W' = W plus `values` (count,) at `index`.

    The sensitivity of an entry is its squared gradient, summed over the data. Of the t most sensitive entries of all
    matrices together, one with at least 1 / ease as many as a LoRA has numbers gets that LoRA; the others train theirs.
    t is chosen so that all that trains comes closest to the budget.

    Args:
        share: the budget, as a share of the entries of the chosen matrices; 0.005, 0.4 of ViT-B's 86 million numbers, in
            the middle of the 0.2 to 1 million of the reference scripts.
        budget: how many numbers instead.
        rank: of the LoRA; 8.
        ease: 10, as in the reference scripts (`alpha` there).
        kept: how many entries each matrix has; set by `adapt`.

    It needs data: the reference code takes the first 16 batches of the training set.
    Start: values zero, and LoRA's own. t is sought in 79 steps of a 50th of the budget, as there for its largest one.
    Vectors are left out: the code trains sensitive entries of biases and norms too, or the whole vector; `Train` beside it
    does. So is SPT-Adapter. Stacked matrices (experts) have as many entries each.
    """

    needs: ClassVar[tuple[str, ...]] = ("fisher",)
    cannot: ClassVar[dict[str, str]] = {"meta": "it starts from data, which cannot run through a model without values"}

    share: Share = 0.005
    budget: PositiveInt | None = None
    rank: PositiveInt = 8
    ease: PositiveFloat = 10.0
    kept: dict[str, PositiveInt] | None = None

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, Method]:
        scores = {site: statistics[site]["fisher"] for site in sites}
        budget = self.budget or max(1, round(self.share * sum(score.numel() for score in scores.values())))
        lora = LoRA(rank=self.rank)
        size = {
            s: math.inf if misfit(lora, s) else math.prod(s.batch) * self.rank * (s.outputs + s.inputs) for s in sites
        }
        best: tuple[float, dict[Site, int]] = (math.inf, {})
        steps = sorted({math.ceil(budget * step / 50) for step in range(1, 80)})
        for found in rankings(scores, steps):
            counts = {site: len(index) for site, index in found.items()}
            total = sum(size[s] if n >= size[s] / self.ease else n for s, n in counts.items())
            best = min(best, (abs(total - budget), counts), key=lambda one: one[0])
        structured = {s for s, n in best[1].items() if n >= size[s] / self.ease}
        kept = {s.key: math.ceil(n / math.prod(s.batch)) for s, n in best[1].items() if n and s not in structured}
        alone = dataclasses.replace(self, kept=kept or None)
        return {s: lora if s in structured else alone for s, n in best[1].items() if n}
