"""SLoRA: LoRA with a square matrix in the middle."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale, too_large
from attunement.site import Site


@register("low_rank/slora", source="https://arxiv.org/abs/2502.14482")
class SLoRA(WeightMethod):
    """Structured LoRA: W' = W + (alpha / rank) B N A, with B (out, rank), N (rank, rank), A (rank, in), all trained.

    Args:
        rank: r, at most min(out, in). 8; the authors take 128 for Llama-2.
        alpha: numerator of the scale; None is `rank`, as in their scripts.
        dropout: on x before A, in training only.

    Start: A uniform in ±1/sqrt(in), N in ±1/sqrt(rank), B zero, as in the authors' code.
    """

    placement: ClassVar[str] = "attention.*|mlp.*"

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "N": kaiming(self.rank, self.rank),  # (rank, rank)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def refuse(self, site: Site) -> str | None:
        return too_large(self.rank, site)

    def factors(self, _: Tensor, A: Tensor, N: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B, scale, N, A
