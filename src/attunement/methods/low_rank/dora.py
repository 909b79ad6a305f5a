"""DoRA: LoRA on the directions of a weight, with its magnitudes learned apart."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.site import Site


@register(
    "low_rank/dora", source="https://arxiv.org/abs/2402.09353", placement="attention.{query,key,value}|mlp.{up,down}"
)
class DoRA(WeightMethod):
    """Weight-decomposed low-rank adaptation: W' = magnitude * V / ||V||, V = W + (alpha / rank) B A.

    The norm is that of each row of V (out, in): of the weights that feed one output, as in PEFT, where the paper's
    authors put it; the paper calls it column-wise. It is a constant for the gradient (section 4.3).

    Args:
        rank, alpha, rank_stabilised, lora_plus: as in `LoRA`. The paper uses alpha = 2 * rank.

    Start: A and B as in `LoRA`, magnitude = ||W||, so W' = W. A row of zeros (a padding token) stays zero.
    No dropout: W' is not additive, and a dropped x would reach the base weight.
    """

    cannot: ClassVar[Mapping[str, str]] = {"gradcheck": "the norm is a constant for its gradient"}

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False
    lora_plus: PositiveFloat = 1.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "magnitude": torch.linalg.vector_norm(site.weight, dim=-1),  # (out,)
            "scale": fixed(scale(self.rank, self.alpha, self.rank_stabilised)),  # ()
        }

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {"B": {"lr": self.lora_plus}} if self.lora_plus != 1 else {}

    def weight(self, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: Tensor) -> Tensor:
        V = W + scale * (B @ A)  # (out, in)
        norm = torch.linalg.vector_norm(V.detach(), dim=-1)  # (out,)
        return (magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny))[:, None] * V  # (out, in)
