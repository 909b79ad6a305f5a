"""How far full fine-tuning moves each weight: from a file of tuned weights, or as a step down a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attunement.errors import AttunementError, nearest
from attunement.site import Site
from attunement.statistics import Statistics


def change_or_gradient(
    tuned: str | None, sites: Sequence[Site], statistics: Mapping[Site, Statistics]
) -> dict[Site, Tensor]:
    """The change of W at every site, (..., out, in): to what the file has, or minus the gradient where there is none."""
    if tuned is not None:
        return changes_to(tuned, sites)
    changes = {site: -statistics[site]["gradient"] for site in sites}
    for site, D in changes.items():
        if not torch.isfinite(D).all():
            raise AttunementError(f"adapt: the gradient of the loss at {site.key} is not finite")
    return changes


def changes_to(tuned: str, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The weights in a safetensors file less those of the base."""
    if not Path(tuned).is_file():
        raise AttunementError(f"adapt: there is no file {tuned!r} of tuned weights")
    try:
        with safe_open(tuned, framework="pt") as file:
            names = list(file.keys())
            return {site: _moved(site, tuned, names, file) for site in sites}
    except SafetensorError as error:
        raise AttunementError(f"adapt: {tuned!r} is no safetensors file: {error}") from None


def _moved(site: Site, tuned: str, names: list[str], file: safe_open) -> Tensor:
    name = f"{site.name}.{site.parameter}" if site.name else str(site.parameter)
    if name not in names:
        raise AttunementError(f"adapt: {tuned!r} has no {name!r}{nearest(name, names)}")
    W = site.weight
    D = site.take(file.get_tensor(name)).to(W) - W
    if not torch.isfinite(D).all():
        raise AttunementError(f"adapt: {name!r} in {tuned!r} is not finite")
    return D
