"""Bottleneck adapters: small two-layer networks behind or beside the sublayers of a transformer."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from attunement.method import OutputMethod, Tensors, fixed, kaiming, register
from attunement.site import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PARALLEL = ("parallel", "scaled_parallel")


@register("bottleneck/bottleneck", source="https://arxiv.org/abs/1902.00751")
class Bottleneck(OutputMethod):
    """Bottleneck adapter: y' = y + scale * up(f(down(h))), h = y behind a sublayer, h = x beside it.

    y is what the sublayer adds to the residual stream, x is what its first matrix reads.

    Args:
        size: the width of the bottleneck. 64, one of the sizes of Houlsby et al.; 512 in He et al.
        style: where it stands.
            houlsby: behind attention and mlp. pfeiffer: behind mlp alone (https://arxiv.org/abs/2005.00247).
            parallel: beside mlp. scaled_parallel: beside mlp, scale 4 (https://arxiv.org/abs/2110.04366). Else scale 1.
        activation: f. relu; the `adapters` library takes silu for its Houlsby configuration.

    Start: down uniform in ±1/sqrt(width), its bias, up and up's bias zero, as He et al. do; Houlsby et al. start near
    zero (normal, 0.01) instead. No dropout, no layer norm of its own.
    Pfeiffer in `adapters` gives `down` the sum of y and the residual after the layer norm; here h is y alone.
    Beside a block that normalises first, x is the normalised stream; `adapters` takes the stream itself.
    """

    cannot: ClassVar[dict[str, str]] = {"merge": "what it adds is not linear in its input"}

    size: PositiveInt = 64
    style: Literal["houlsby", "pfeiffer", "parallel", "scaled_parallel"] = "houlsby"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

    @property
    def placement(self) -> str:  # type: ignore[override]
        return "attention|mlp" if self.style == "houlsby" else "mlp"

    def tensors(self, site: Site) -> Tensors:
        return {
            "down": kaiming(self.size, site.inputs if self.reads_input() else site.outputs),  # (size, width of h)
            "down_bias": torch.zeros(self.size),  # (size,)
            "up": torch.zeros(site.outputs, self.size),  # (out, size)
            "up_bias": torch.zeros(site.outputs),  # (out,)
            "scale": fixed(torch.tensor(4.0 if self.style == "scaled_parallel" else 1.0)),  # ()
        }

    def reads_input(self) -> bool:
        return self.style in PARALLEL

    def output(
        self, x: Tensor, y: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor
    ) -> Tensor:
        h = x if self.reads_input() else y  # (..., width of h)
        z = ACTIVATIONS[self.activation](F.linear(h.to(down.dtype), down, down_bias))  # (..., size)
        return y + scale * F.linear(z, up, up_bias)  # (..., out)
