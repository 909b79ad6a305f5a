"""Hydra: a low-rank branch beside the weight and one behind it."""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.site import Site


@register("low_rank/hydra", source="https://arxiv.org/abs/2309.06922", placement="attention.output|mlp.down")
class Hydra(WeightMethod):
    """Multi-head low-rank adaptation: y' = y + s (B A x + D C y) for y = W x + b.

    The parallel branch B (out, rank), A (rank, in) learns new features, the sequential one D (out, rank), C (rank, out)
    combines those that W has. So W' = W + s (B A + D C W) and b' = b + s D C b.

    Args:
        rank: r, at most min(out, in); 2, as in the authors' code for VTAB-1k.
        scale: s; 1.
        dropout: on x of the change, in training only. The authors drop between the two factors of a branch.

    Start: A and C uniform in ±sqrt(6 / (sum of their sides)) (Xavier), B and D zero. The four projections of the authors'
    code have biases, which come to one shift of y; the formula of the paper has none, and nor has this.
    """

    rank: Rank = 2
    scale: PositiveFloat = 1.0
    dropout: Dropout = 0.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": _xavier(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "C": _xavier(self.rank, site.outputs),  # (rank, out)
            "D": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "s": fixed(torch.tensor(self.scale)),  # ()
        }

    def factors(self, W: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([B, D], dim=-1), s, torch.cat([A, C @ W], dim=-2)  # (out, 2 rank), (), (2 rank, in)

    def bias(self, b: Tensor, C: Tensor, D: Tensor, s: Tensor) -> Tensor:
        return b + s * (D @ (C @ b))


def _xavier(rows: int, columns: int) -> Tensor:
    bound = math.sqrt(6 / (rows + columns))
    return torch.empty(rows, columns).uniform_(-bound, bound)
