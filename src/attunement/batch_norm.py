"""Batch norms that follow a new domain: their running statistics, estimated again (AdaBN)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.statistics import _call, _moved

Buffers = dict[str, Tensor]


def estimate(model: nn.Module, data: Iterable[Any]) -> Buffers:
    """Put the means and variances of data in place of a model's running statistics (https://arxiv.org/abs/1603.04779).

    Each batch norm sees what it would in training: what the ones before it make of the same batch; the running statistics
    become the averages over the batches. They are buffers of the model, not of an adapter: they change for all adapters and
    are saved by `state_dict`. Under ConvLoRA (https://arxiv.org/abs/2402.04964) call it after training on the new domain.

    Args:
        data: batches, as for `adapt`.

    Returns:
        What the buffers were before, for `restore`.

    Raises:
        AttunementError: where there is no batch norm with running statistics, or no batch.
    """
    norms = _norms(model)
    if not norms:
        raise AttunementError("estimate: this model has no batch norm with running statistics")
    before = {f"{path}.{name}": value.clone() for path, norm in norms.items() for name, value in norm._buffers.items()
              if value is not None}  # fmt: skip
    modes = [(module, module.training) for module in model.modules()]
    momenta = {norm: norm.momentum for norm in norms.values()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        with torch.no_grad():
            for batch in data:
                _call(model, _moved(batch, device))
                count += 1
        if not count:
            raise AttunementError("estimate: the data have no batch")
    except BaseException:
        restore(model, before)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return before


def restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put running statistics back that `estimate` has returned."""
    for key, value in before.items():
        path, _, name = key.rpartition(".")
        model.get_submodule(path)._buffers[name].copy_(value)  # type: ignore[union-attr]


def _norms(model: nn.Module) -> dict[str, Any]:
    kinds = nn.modules.batchnorm._BatchNorm
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds) and m.running_mean is not None}
