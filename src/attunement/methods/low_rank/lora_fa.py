"""LoRA-FA: LoRA whose first factor stays as it was drawn, so that training keeps no input of the layer."""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register, seeded
from attunement.methods._low_rank import scale
from attunement.methods._sharing import own
from attunement.part import Part
from attunement.site import Site


@register("low_rank/lora_fa", source="https://arxiv.org/abs/2308.03303", placement="attention.{query,value}")
class LoRAFA(WeightMethod):
    """LoRA with A frozen: W' = W + s B A, s = alpha / rank, where B (out, rank) alone is trained; A (rank, in).

    The backward pass needs A x (tokens, rank) in place of x (tokens, in).

    Args:
        rank, alpha, rank_stabilised, dropout: as in `LoRA`. With a dropout its mask is kept too.
        corrected: give the optimiser s^-2 g (A A^T + 1e-8 I)^-1 for the gradient g of B, so that the step of the product
            is as near as it can be to that of W. It is in PEFT's optimiser for LoRA-FA, which has it always; the first
            version of the paper had not.
        seed: of A, which is drawn from it for each matrix and not stored.

    Start: A uniform in ±1/sqrt(in), B zero. PEFT's optimiser is an AdamW with epsilon 1e-6 besides. A PEFT folder of it is
    that of a LoRA, and is read as one.
    """

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False
    dropout: Dropout = 0.0
    corrected: bool = True
    seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": seeded(kaiming(self.rank, site.inputs, generator=own(self.seed, site))),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "scale": fixed(scale(self.rank, self.alpha, self.rank_stabilised)),  # ()
        }

    def factors(self, _: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B, scale, A  # (out, rank), (), (rank, in)

    def gradient(self, part: Part, name: str, g: Tensor) -> Tensor:
        if not self.corrected:
            return g
        A, s = part.tensor("A"), part.tensor("scale")[..., None, None]  # (..., rank, in), (..., 1, 1)
        gram = A @ A.mT + 1e-8 * torch.eye(self.rank, dtype=A.dtype, device=A.device)
        return torch.linalg.solve(gram, g.mT.to(A.dtype)).mT.to(g.dtype) / s.to(g.dtype) ** 2  # gram is symmetric
