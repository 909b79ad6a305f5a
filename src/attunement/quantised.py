"""Quantised bases: bitsandbytes' 8-bit and 4-bit Linear. Their weights stay packed; additive changes run beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attunement.errors import AttunementError


def dense(module: Any) -> Tensor:
    """The dequantised weight (out, in) of a bitsandbytes layer, detached, float32."""
    import bitsandbytes as bnb

    weight = module._parameters["weight"]
    if isinstance(module, bnb.nn.Linear4bit):
        if weight.quant_state is None:  # not packed yet: it is at the first move to a device
            return weight.detach().float()
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(module, bnb.nn.Linear8bitLt):
        packed = weight.data if weight.CB is None else weight.CB
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        if packed.dtype != torch.int8 or scale is None:
            return weight.detach().float()
        return packed.float() * (scale.float() / 127)[:, None]
    raise AttunementError(
        f"{type(module).__name__} is a quantised layer of a kind that is not known; known: Linear4bit, Linear8bitLt"
    )
