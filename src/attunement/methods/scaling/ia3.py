"""(IA)^3: keys, values and the hidden layer of the feed-forward network, each rescaled by a learned vector."""

from typing import Literal

import torch
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("scaling/ia3", source="https://arxiv.org/abs/2205.05638", placement="attention.{key,value}|mlp.down")
class IA3(WeightMethod):
    """Infused adapter by inhibiting and amplifying inner activations: y' = rows * y, or x' = columns * x.

    Keys and values are rescaled, rows (out,); the hidden layer of an mlp is rescaled where `mlp.down` takes it in,
    columns (in,). For a gated mlp that equals the reference code's rescaled `up`.

    Args:
        side: which of the two a matrix gets; "role" is columns on `mlp.down` and rows elsewhere.

    Start: ones.
    """

    side: Literal["role", "output", "input"] = "role"

    def form(self, site: Site) -> str:
        if self.side != "role":
            return self.side
        return "input" if site.role.endswith("mlp.down") else "output"

    def refuse(self, site: Site) -> str | None:
        if self.form(site) == "input" and getattr(site.module, "kernel_size", None):
            return "a convolution's columns are not channels; rescale its output with side='output'"
        return None

    def tensors(self, site: Site) -> Tensors:
        if self.form(site) == "input":
            return {"columns": torch.ones(site.inputs)}  # (in,)
        return {"rows": torch.ones(site.outputs)}  # (out,)

    def input(self, x: Tensor, columns: Tensor) -> Tensor:
        return x * columns  # (..., in)

    def output(self, _: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return y * rows  # (..., out)

    def weight(self, W: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        W = W if rows is None else rows[:, None] * W  # (out, in)
        return W if columns is None else W * columns

    def bias(self, b: Tensor, rows: Tensor | None = None) -> Tensor:
        return b if rows is None else rows * b  # (out,)
