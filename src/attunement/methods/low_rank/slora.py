"""SLoRA: LoRA with a square matrix in the middle."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.site import Site


@register("low_rank/slora", source="https://arxiv.org/abs/2502.14482", placement="attention.*|mlp.*")
class SLoRA(WeightMethod):
    """Structured LoRA: W' = W + (alpha / rank) B N A, with B (out, rank), N (rank, rank), A (rank, in), all trained.

    Args:
        rank: r, at most min(out, in). 8; the authors take 128 for Llama-2.
        alpha: numerator of the scale; None is `rank`, as in their scripts.
        dropout: on x before A, in training only.

    Start: A uniform in ±1/sqrt(in), N in ±1/sqrt(rank), B zero, as in the authors' code.
    """

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "N": kaiming(self.rank, self.rank),  # (rank, rank)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def factors(self, _: Tensor, A: Tensor, N: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B, scale, N, A
