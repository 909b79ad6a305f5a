"""CoLoRA: LoRA of a larger rank where a matrix contributes more to what is learned."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveInt

from attunement.method import Method, register
from attunement.methods._changes import change_or_gradient
from attunement.methods.low_rank.lora import LoRA
from attunement.site import Site
from attunement.statistics import Statistics


@register("low_rank/colora", source="https://arxiv.org/abs/2408.01099", placement="attention.*|mlp.*|conv")
class CoLoRA(LoRA):
    """Contribution-based LoRA: W' = W + s B A, with the ranks of all sites together shared out by their contributions.

    The contribution of W is |sum G * D|, what its change D accounts for of the change of the loss, with the gradient G of
    the loss by W: of that are its ranks, one at least, and `largest` at most.

    Args:
        rank: the mean rank; 8.
        alpha: s is alpha / rank whatever a site's own rank; None is a scale of one.
        largest: the most that one matrix gets; None is 4 * rank. A small matrix has fewer.
        tuned: a safetensors file with the weights of the model after full fine-tuning, by their names in this one. None
            takes D = -G, one step of full fine-tuning.
        rank_stabilised, dropout, lora_plus: as in `LoRA`.

    It needs data with labels, for a model that returns its loss. The authors attribute along the path from the weights
    before to those after fine-tuning of a network for image restoration; here at its start, in one term. No code of theirs
    was found: how they turn contributions into ranks could not be seen. Their pre-training on composed degradations of
    images (PROD) is a way to make data, and not here. What is saved are LoRAs of the ranks that were chosen.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    cannot: ClassVar[Mapping[str, str]] = {"meta": "its ranks are chosen by data, which cannot run through it"}

    largest: PositiveInt | None = None
    tuned: str | None = None

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, Method]:
        changes = change_or_gradient(self.tuned, sites, statistics)
        shares = torch.stack([(statistics[s]["gradient"] * changes[s]).sum().abs().double().cpu() for s in sites])
        most = [min(self.largest or 4 * self.rank, site.outputs, site.inputs) for site in sites]
        ranks = [1] * len(sites)
        for _ in range(max(0, self.rank * len(sites) - len(sites))):  # one by one, to who has the most for each it has
            due = [
                float(share) / rank if rank < top else -1.0
                for share, rank, top in zip(shares, ranks, most, strict=True)
            ]
            if max(due) < 0:
                break
            ranks[due.index(max(due))] += 1
        return {site: self._of_rank(rank) for site, rank in zip(sites, ranks, strict=True)}

    def _of_rank(self, rank: int) -> LoRA:
        kept = 1.0 if self.alpha is None else self.alpha / self.rank
        alpha = kept * (rank**0.5 * self.rank**0.5 if self.rank_stabilised else rank)
        return LoRA(rank, alpha, self.rank_stabilised, self.dropout, self.lora_plus)
