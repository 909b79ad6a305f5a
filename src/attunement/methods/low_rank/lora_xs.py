"""LoRA-XS: a small matrix between frozen singular vectors of the weight."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.ahead import ahead
from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._low_rank import scale
from attunement.site import Site
from attunement.subspace import singular


@register(
    "low_rank/lora_xs", source="https://arxiv.org/abs/2405.17604", placement="attention.{query,value,output}|mlp.down"
)
class LoRAXS(WeightMethod):
    """LoRA with extremely small counts: W' = W + (alpha / rank) U R S V^T, trained R (rank, rank), W ~ U S V^T.

    Args:
        rank: r, at most min(out, in); r^2 numbers a matrix. 4 to 25 in the authors' runs on GLUE, 64 for Llama.
        alpha: numerator of the scale; 16, as in their scripts.
        exact: decompose the whole of W; else a random projection where W is large beside the rank.

    Start: R zero, so W' = W; the authors draw it from normal(0, 1e-5), nearly as much. U and S V^T are computed again from
    the base at load, not stored: signs are fixed, but where singular values coincide another machine may find other
    vectors, in which R means another change.
    """

    rank: Rank = 16
    alpha: PositiveFloat | None = 16.0
    exact: bool = False

    @ahead(unless="exact")
    def tensors(self, site: Site) -> Tensors:
        U, S, Vh = singular(site.weight, self.rank, exact=self.exact)
        return {
            "R": torch.zeros(self.rank, self.rank),  # (rank, rank)
            "U": seeded(U.contiguous()),  # (out, rank)
            "SV": seeded(S[:, None] * Vh),  # (rank, in)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def factors(self, _: Tensor, R: Tensor, U: Tensor, SV: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return U, scale, R, SV  # (out, rank), (), (rank, rank), (rank, in)
