"""SVFit: the largest singular values of a weight, trained."""

from torch import Tensor

from attunement.ahead import ahead
from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, register, seeded
from attunement.site import Site
from attunement.subspace import singular


@register("low_rank/svfit", source="https://arxiv.org/abs/2409.05926", placement="attention.{query,value}")
class SVFit(WeightMethod):
    """Singular-value fine-tuning: W' = W + U diag(sigma - start) Vh, U (out, rank), Vh (rank, in), from the SVD of W.

    The largest singular values train; the singular vectors and the rest of W stay.

    Args:
        rank: how many singular values; None is all of them, min(out, in). One number each, so large ranks are cheap to
            store, but U and Vh are held beside W. The paper takes as many as hold 99 % of W.

    Start: sigma = start. U, Vh and start are computed again from the base at load, never stored: where singular values
    coincide the vectors are not unique, and another machine's SVD may choose others. A small rank of a large matrix is
    found by random projection.
    No public code was found for this paper; the formula is from its text, the placement from LoRA, which it follows.
    """

    rank: Rank | None = None

    @ahead()
    def tensors(self, site: Site) -> Tensors:
        U, sigma, Vh = singular(site.weight, self.rank or min(site.outputs, site.inputs))
        return {
            "sigma": sigma.clone(),  # (rank,)
            "start": seeded(sigma.clone()),  # (rank,)
            "U": seeded(U.contiguous()),  # (out, rank)
            "Vh": seeded(Vh.contiguous()),  # (rank, in)
        }

    def factors(self, _: Tensor, sigma: Tensor, start: Tensor, U: Tensor, Vh: Tensor) -> tuple[Tensor, ...]:
        return U, sigma - start, Vh
