"""Bone: a small block for each piece of a weight's rows, that is added to it and multiplies it."""

import torch
from torch import Tensor

from attunement.fields import Tile
from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("low_rank/bone", source="https://arxiv.org/abs/2409.15371", placement="attention.*|mlp.*")
class Bone(WeightMethod):
    """Block affine adaptation: each tile W_oi (r, r) becomes W_oi + W_oi B_o + B_o, with one B_o (r, r) for a row of tiles.

    Args:
        block_size: r, which divides out and in. 64, as in PEFT, where this is MiSS with init_weights "bat".

    Start: B zero. The text of the paper was not read: the formula is PEFT's.
    """

    block_size: Tile = 64

    def tensors(self, site: Site) -> Tensors:
        return {"B": torch.zeros(site.outputs // self.block_size, self.block_size, self.block_size)}  # (out/r, r, r)

    def delta(self, W: Tensor, B: Tensor) -> Tensor:
        r = B.shape[-1]
        tiles = W.unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (out/r, r, in/r, r)
        return (torch.einsum("oajb,obc->oajc", tiles, B) + B[:, :, None]).reshape(W.shape)  # (out, in)
