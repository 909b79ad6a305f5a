"""LoRA, with its rank-stabilised scale and LoRA+'s two learning rates."""

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.site import Site


@register("low_rank/lora", source="https://arxiv.org/abs/2106.09685", placement="attention.{query,value}")
class LoRA(WeightMethod):
    """Low-rank adaptation: W' = W + (alpha / rank) B A, with B (out, rank) and A (rank, in).

    Args:
        rank: r, at most min(out, in). 8, with which the paper adapts GPT-3 and RoBERTa.
        alpha: numerator of the scale; None is `rank`, a scale of 1 ("we set alpha to the first r we try").
        rank_stabilised: scale alpha / sqrt(rank), so that a larger rank learns as fast (https://arxiv.org/abs/2312.03732).
        dropout: on x before A, in training only.
        lora_plus: learning rate of B over that of A (https://arxiv.org/abs/2402.12354, which suggests 16); 1 is LoRA.

    Start: A uniform in ±1/sqrt(in), B zero. The paper says Gaussian; its code and PEFT draw this A.
    An embedding is a matrix of one-hot inputs here and starts as any other; loralib starts it with A = 0 and B normal.
    """

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False
    dropout: Dropout = 0.0
    lora_plus: PositiveFloat = 1.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "scale": fixed(scale(self.rank, self.alpha, self.rank_stabilised)),  # ()
        }

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {"B": {"lr": self.lora_plus}} if self.lora_plus != 1 else {}

    def factors(self, _: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B, scale, A  # (out, rank), (), (rank, in)
