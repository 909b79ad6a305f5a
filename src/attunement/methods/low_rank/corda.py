"""CorDA: low-rank adapters that start from the directions of a weight that data use most, or least."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from attunement.errors import AttunementError
from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.methods._low_rank import moved
from attunement.site import Site
from attunement.statistics import Statistics, out_of_sight
from attunement.subspace import singular


@register("low_rank/corda", source="https://arxiv.org/abs/2406.05223", placement="attention.*|mlp.*")
class CorDA(WeightMethod):
    """Context-oriented decomposition adaptation: W' = W - B0 A0 + B A, with B (out, rank), A (rank, in).

    With C (in, in) the second moment of the inputs and the SVD of W C = U S V^T, W = U S (V^T C^-1). B0 = U sqrt(S) and
    A0 = sqrt(S) V^T C^-1 are `rank` of these triplets, where B and A start; so W' = W, and W keeps its bits.

    Args:
        rank: r, at most min(out, in). 128, as in the reference code.
        mode: which triplets train. ipm, instruction-previewed, is the largest, from data of the task itself; kpm,
            knowledge-preserved, is the smallest, from data whose knowledge is to stay.
        dropout: on x before A, in training only.

    It needs data: about 256 samples of 2,048 tokens in the paper, or width / tokens per sample * 128 samples.
    C is damped by 1 % of its mean diagonal, doubled until C^-1 C is within 0.05 of the identity, as in the reference
    code. That code divides each batch by its largest value and sums; here batches weigh as their tokens and the largest
    value of all is taken. One batch gives the same B and A, several the same up to that weighting. No scale, as there.
    The reference code changes W itself and saves the whole model. B0 and A0 are saved here: twice the size of LoRA's
    files. In rounding, W' - W is taken as B (A - A0) + (B - B0) A0, so that small changes are not lost.
    """

    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    cannot: ClassVar[dict[str, str]] = {"meta": "it starts from data, which cannot run through a model without values"}

    rank: Rank = 128
    mode: Literal["ipm", "kpm"] = "ipm"
    dropout: Dropout = 0.0

    def tensors(self, site: Site) -> Tensors:
        return self._from(torch.zeros(site.outputs, self.rank), torch.zeros(self.rank, site.inputs))

    def calibrate(self, site: Site, statistics: Statistics) -> Tensors:
        W = site.weight  # (out, in)
        peak = abs(statistics.peak) or 1.0
        C = statistics["covariance"].to(W) * (statistics.tokens / statistics.batches / peak**2)  # (in, in)
        if not C.any():
            raise AttunementError(f"adapt: the data send only zeros into {site.key}, which say nothing about it")
        identity = torch.eye(site.inputs, dtype=W.dtype, device=W.device)
        damping = 0.01
        while True:
            damped = C + damping * C.diagonal().mean() * identity
            inverse, info = torch.linalg.inv_ex(damped)
            if not info and torch.dist(damped @ inverse, identity) < 0.05:
                break
            damping *= 2
        most = min(W.shape)  # the smallest triplets need all of them
        U, S, Vh = singular(W @ damped, self.rank if self.mode == "ipm" else most)
        kept = slice(self.rank) if self.mode == "ipm" else slice(most - self.rank, None)
        root = S[kept].sqrt()  # (rank,)
        return self._from(U[:, kept] * root, root[:, None] * (Vh[kept] @ inverse))

    def _from(self, B: Tensor, A: Tensor) -> Tensors:
        return {"A": A, "B": B, "A0": fixed(A.clone()), "B0": fixed(B.clone())}  # (rank, in), (out, rank)

    def refuse(self, site: Site) -> str | None:
        return out_of_sight(site)

    def factors(self, _: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, ...]:
        return moved(B, A, B0, A0)  # (out, 2 rank), (2 rank, in)
