"""IntTune: the middle matrix of NLoRA alone."""

from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._low_rank import scale
from attunement.site import Site


@register("low_rank/inttune", source="https://arxiv.org/abs/2502.14482", placement="attention.*|mlp.*")
class IntTune(WeightMethod):
    """Intermediate tuning: W' = W + (alpha / rank) B0 (N - N0) A0, trained N (rank, rank).

    B0 (out, rank), A0 (rank, in) and N0 are the first columns of W, its first rows and the block where they cross, as in
    `NLoRA`; N starts at N0, so W' = W.

    Args:
        rank: r, at most min(out, in); r^2 numbers a matrix. 128, as in the authors' script.
        alpha: numerator of the scale; None is `rank`, as there.

    The authors' code leaves W as it is, so that training starts from W + B0 N0 A0; here that is taken off. The frame is
    read again from the base at load, not stored.
    """

    rank: Rank = 128
    alpha: PositiveFloat | None = None

    def tensors(self, site: Site) -> Tensors:
        W, r = site.weight, self.rank
        return {
            "N": W[:r, :r].clone(),  # (rank, rank)
            "N0": seeded(W[:r, :r].clone()),
            "B0": seeded(W[:, :r].clone()),  # (out, rank)
            "A0": seeded(W[:r].clone()),  # (rank, in)
            "scale": fixed(scale(r, self.alpha, rank_stabilised=False)),  # ()
        }

    def factors(self, _: Tensor, N: Tensor, N0: Tensor, B0: Tensor, A0: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B0, scale, N - N0, A0
