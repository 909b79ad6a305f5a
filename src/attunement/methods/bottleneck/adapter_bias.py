"""AdapterBias: one shift for all tokens, each with its own weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attunement.method import Tensors, WeightMethod, kaiming, register
from attunement.site import Site


@register("bottleneck/adapter_bias", source="https://arxiv.org/abs/2205.00305", placement="mlp.down")
class AdapterBias(WeightMethod):
    """AdapterBias: y' = y + (x w + b) v, w (in,), b (1,) and v (out,); x (..., in) is what enters the layer.

    A token-dependent shift of rank one, which merges: W' = W + v w^T, and b v is added to the bias.

    Start: v zero, so that y' = y; w and b as in `nn.Linear(in, 1)`.
    The authors train the layer norms outside of attention along: `{"mlp.down": AdapterBias(), "norm": Train()}` trains
    these and the others. They add the shift behind the dropout that follows the layer in training, here it goes through it.
    Their option of one w and b for all layers is left out.
    """

    def tensors(self, site: Site) -> Tensors:
        return {
            "w": kaiming(site.inputs),  # (in,)
            "b": kaiming(site.inputs)[:1].clone(),  # (1,)
            "v": torch.zeros(site.outputs),  # (out,)
        }

    def output(self, x: Tensor, y: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return y + F.linear(x.to(w.dtype), w[None], b) * v  # (..., out)

    def weight(self, W: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return W + v[:, None] * w  # (out, in)

    def bias(self, bias: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return bias + b * v  # (out,)
