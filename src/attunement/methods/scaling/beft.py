"""BEFT: one shift of each value, in every attention."""

import torch
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("scaling/beft", source="https://arxiv.org/abs/2509.15974", placement="attention.value")
class BEFT(WeightMethod):
    """Bias-efficient fine-tuning: y' = y + shift, (out,), at the value projections and nowhere else.

    As a bias b' = b + shift, which is how it merges; a layer without a bias has one while it is merged.

    Start: zero. The authors train the biases that BERT and OPT have, and add this shift where Llama and GPT-J have none;
    for few training rows they find values to be worth more than queries and keys, which `on` can choose instead. Their
    score for that choice, how far each kind of bias moves when all of them train, is left out.
    """

    def tensors(self, site: Site) -> Tensors:
        return {"shift": torch.zeros(site.outputs)}  # (out,)

    def output(self, _: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return y + shift  # (..., out)

    def weight(self, W: Tensor) -> Tensor:
        return W  # (out, in)

    def bias(self, b: Tensor, shift: Tensor) -> Tensor:
        return b + shift  # (out,)
