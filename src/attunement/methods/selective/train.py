"""Train: parameters of the model itself, as copies that stand in for them."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.method import ParameterMethod, Tensors, fixed, register
from attunement.site import Site


@register("selective/train", source="https://arxiv.org/abs/2106.10199")
class Train(ParameterMethod):
    """Fine-tuning of chosen parameters: W' = copy, or with `rows` W' = W with those rows replaced by copy.

    `copy` is a tensor of float32 (float64 over float64) that stands in for the parameter, so the base stays as it was.

    Args:
        only: "bias" keeps to biases (BitFit, the source), "weight" leaves them out.
        rows: rows along the first dimension, such as tokens added to an embedding; negative ones count from the end.
        rate: factor on the learning rate. A new head often wants ten to a hundred times that of pretrained weights.

    Start: the values of the base.
    """

    only: Literal["all", "weight", "bias"] = "all"
    rows: tuple[int, ...] | None = None
    rate: PositiveFloat = 1.0

    def tensors(self, site: Site) -> Tensors:
        if self.rows is None:
            return {"copy": site.weight.clone()}
        index = torch.arange(site.weight.shape[0])[list(self.rows)]  # (rows,)
        return {"copy": site.weight[index.to(site.weight.device)], "index": fixed(index)}  # (rows, ...), (rows,)

    def refuse(self, site: Site) -> str | None:
        is_bias = "bias" in str(site.parameter)
        if (self.only == "bias" and not is_bias) or (self.only == "weight" and is_bias):
            return f"{site.parameter!r} is left out by only={self.only!r}"
        count = site.weight.shape[0]
        outside = [row for row in self.rows or () if not -count <= row < count]
        if not outside:
            return None
        said = f"row {outside[0]} is outside its {count} rows"
        return (
            f"{said}; resize_token_embeddings adds rows, before adapting"
            if outside[0] < 0
            else f"{said}; the last is {count - 1}"
        )

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {"copy": {"lr": self.rate}} if self.rate != 1 else {}

    def weight(self, W: Tensor, copy: Tensor, index: Tensor | None = None) -> Tensor:
        return copy if index is None else W.index_copy(0, index, copy)

    def carried(self, weight: Tensor) -> Tensor:
        if self.rows is None:
            return weight[:0]
        kept = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
        kept[list(self.rows)] = False
        return weight[kept]
