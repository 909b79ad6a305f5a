"""SSF: each output scaled and shifted."""

import torch
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("scaling/ssf", source="https://arxiv.org/abs/2210.08823", placement="attention.*|mlp.*|norm|conv")
class SSF(WeightMethod):
    """Scaling and shifting features: y' = gamma * y + beta, both (out,), behind linear layers, convolutions and norms.

    As a weight W' = diag(gamma) W and b' = gamma * b + beta, which is how it merges.

    Start: gamma one, beta zero. The reference code draws them from normal(1, 0.02) and normal(0, 0.02), which changes
    the model before training. Its placement is every linear layer, convolution and norm below the head, patch embedding
    included; token embeddings, which its vision models do not have, are left out.
    """

    def tensors(self, site: Site) -> Tensors:
        return {"gamma": torch.ones(site.outputs), "beta": torch.zeros(site.outputs)}  # (out,), (out,)

    def output(self, _: Tensor, y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return y * gamma + beta  # (..., out)

    def weight(self, W: Tensor, gamma: Tensor) -> Tensor:
        return gamma[:, None] * W  # (out, in)

    def bias(self, b: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return gamma * b + beta  # (out,)
