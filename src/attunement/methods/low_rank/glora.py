"""GLoRA: scales and shifts of a weight and of its bias, each of its own shape."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from attunement.fields import too_large
from attunement.method import Tagged, Tensors, WeightMethod, kaiming, register, seeded
from attunement.site import Site


@register("low_rank/glora", source="https://arxiv.org/abs/2306.07967", placement="attention.*|mlp.*")
class GLoRA(WeightMethod):
    """Generalised LoRA: W' = W + W * A + B and b' = b + b * D + E + W C, products * of entries, W C of matrices.

    Args:
        rank: of what is low-rank. 8, as in PEFT; the authors take 4.
        weights: what A and B are: "lora", products (out, rank) (rank, in); "vector" (out, 1); "constant"; "none".
        coupling: what C (in,) is: "lora", a product (in, rank) (rank, 1); "vector"; "none".
        shifts: what D and E (out,) are: "vector", "constant", "none". All as in PEFT.

    A layer without a bias has no C, D and E, as in PEFT. Start: A, B, C, D and E zero; the second factor of a product uniform
    in ±1/sqrt(last side), where the authors draw Xavier's. The authors train a supernet of all shapes, drawn anew at every
    step, and search the best by evolution; a recipe names one shape for each matrix here. W in W C is the base's,
    whatever else acts on it: where C is, a copy of W is held beside it, and not stored.
    """

    rank: PositiveInt = 8
    weights: Literal["lora", "vector", "constant", "none"] = "lora"
    coupling: Literal["lora", "vector", "none"] = "lora"
    shifts: Literal["vector", "constant", "none"] = "constant"

    def tensors(self, site: Site) -> Tensors:
        made: dict[str, Tensor | Tagged] = {}
        for name in "AB":
            made |= _path(name, self.weights, self.rank, site.outputs, site.inputs)
        if _has_bias(site):
            made |= _path("C", self.coupling, self.rank, site.inputs, 1)
            for name in "DE":
                made |= _path(name, self.shifts, self.rank, site.outputs, 1)
            if self.coupling != "none":
                made["W0"] = seeded(site.weight.clone())  # (out, in)
        return made

    def refuse(self, site: Site) -> str | None:
        if self.weights == "none" and (not _has_bias(site) or self.coupling == self.shifts == "none"):
            return "nothing is left to train there"
        return too_large("rank", self.rank, site) if self.weights == "lora" else None

    def delta(self, W: Tensor, **t: Tensor) -> Tensor:
        A, B = _value("A", t), _value("B", t)
        return torch.zeros_like(W) if A is None or B is None else W * A + B  # (out, in)

    def bias(
        self,
        b: Tensor,
        W0: Tensor | None = None,
        C: Tensor | None = None,
        C_left: Tensor | None = None,
        C_right: Tensor | None = None,
        D: Tensor | None = None,
        E: Tensor | None = None,
    ) -> Tensor:
        if C_left is not None and C_right is not None:
            C = C_left @ C_right  # (in, 1)
        if D is not None and E is not None:
            b = b + (b[:, None] * D + E)[:, 0]
        return b if C is None or W0 is None else b + (W0 @ C)[:, 0]  # (out,)


def _has_bias(site: Site) -> bool:
    return site.module._parameters.get(site.bias) is not None


def _path(name: str, shape: str, rank: int, rows: int, columns: int) -> dict[str, Tensor]:
    """The tensors of one of A ... E: its two factors, or itself."""
    if shape == "lora":
        return {f"{name}_left": torch.zeros(rows, rank), f"{name}_right": kaiming(rank, columns)}
    return {} if shape == "none" else {name: torch.zeros((rows, 1) if shape == "vector" else ())}


def _value(name: str, t: dict[str, Tensor]) -> Tensor | None:
    return t[f"{name}_left"] @ t[f"{name}_right"] if f"{name}_left" in t else t.get(name)
