"""ConvLoRA: a low-rank change of a convolution, whose rows are split by the height of its window."""

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.site import Site


@register("low_rank/conv_lora", source="https://arxiv.org/abs/2402.04964", placement="conv")
class ConvLoRA(WeightMethod):
    """W' = W + (alpha / rank) reshape(B A), with B (k out, k rank) and A (k rank, in / k), k the height of the window.

    W (out, in) is the kernel as a matrix, in = channels * k * width; each of its rows is k rows of B A after one another, so
    its rank reaches k times k rank. Where there is no window, k = 1, it is LoRA.

    Args:
        rank: 2, as in the authors' code; at most min(out, in).
        alpha: numerator of the scale; None is `rank`: both are 2 there.
        dropout: on x, in training only.

    Start: A uniform in ±1/sqrt(in / k), B zero. The authors also train the batch norms, which is {"norm": Train()} beside it,
    and have their statistics follow the new domain, which is `attunement.batch_norm.estimate`.
    With k x k windows and without groups the shapes are those of loralib's Conv2d, which the authors took. Other windows and
    groups have no reference: loralib's own shapes fail there.
    """

    rank: Rank = 2
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0

    def tensors(self, site: Site) -> Tensors:
        k = _height(site)
        return {
            "A": kaiming(k * self.rank, site.inputs // k),  # (k rank, in / k)
            "B": torch.zeros(k * site.outputs, k * self.rank),  # (k out, k rank)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def delta(self, _: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        return scale * (B @ A).reshape(_.shape)


def _height(site: Site) -> int:
    window: Any = getattr(site.module, "kernel_size", (1,))
    return int(window[0]) if site.inputs % window[0] == 0 else 1
