"""ShareLoRA: LoRA whose factors are the same in all layers."""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.methods._sharing import kinds, lot, role, written
from attunement.site import Site


@register("low_rank/share_lora", source="https://arxiv.org/abs/2406.10785", placement="attention.{query,value}")
class ShareLoRA(WeightMethod):
    """Shared LoRA: W' = W + (alpha / rank) B A, with one A (rank, in), one B (out, rank) or both for all layers.

    Matrices of one role share: all queries have one A, all values another.

    Args:
        share: "A", as in most of the paper's runs and its code, "B", or "both".
        rank, alpha, rank_stabilised, dropout: as in `LoRA`.

    Start: A uniform in ±1/sqrt(in), B zero.
    """

    rank: Rank = 8
    share: Literal["A", "B", "both"] = "A"
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False
    dropout: Dropout = 0.0

    def shared(self, sites: list[Site]) -> Tensors:
        made: dict[str, Tensor] = {}
        for kind, (site, *_) in enumerate(kinds(sites, role)):
            made |= {f"A{kind}": kaiming(self.rank, site.inputs)} if self.share != "B" else {}
            made |= {f"B{kind}": torch.zeros(site.outputs, self.rank)} if self.share != "A" else {}
        return made

    def tensors(self, site: Site) -> Tensors:
        own = {} if self.share != "B" else {"A": kaiming(self.rank, site.inputs)}  # (rank, in)
        own |= {} if self.share != "A" else {"B": torch.zeros(site.outputs, self.rank)}  # (out, rank)
        return {
            **own,
            "kind": written(lot(site, role).kind),
            "scale": fixed(scale(self.rank, self.alpha, self.rank_stabilised)),
        }

    def factors(
        self, _: Tensor, kind: Tensor, scale: Tensor, A: Tensor | None = None, B: Tensor | None = None, **shared: Tensor
    ) -> tuple[Tensor, ...]:
        A = shared[f"A{kind.shape[1]}"] if A is None else A
        return shared[f"B{kind.shape[1]}"] if B is None else B, scale, A  # (out, rank), (), (rank, in)
