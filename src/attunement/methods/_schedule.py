"""What methods that follow a schedule share: its length, seeded draws, running averages, the blocks that take turns."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.part import Part
from attunement.site import Site

Block = tuple[str, int]


def span(name: str, adapter: Adapter, total: int | None, warmup: float, final: float) -> tuple[int, int]:
    """The step after which ranks change, and the one from which they stay; below 1 a length is a share of all steps.

    Raises:
        AttunementError: where the number of steps is not known, or too small for a step between the two.
    """
    total = total or adapter.total_steps
    if total is None:
        raise AttunementError(
            f"{name}: its schedule needs the number of steps in all: give the field total_steps or set "
            f"total_steps of the adapter {adapter.name!r}, as at.Trainer does"
        )
    before, after = (round(total * steps) if steps < 1 else int(steps) for steps in (warmup, final))
    after = max(after, 1)
    if before + after >= total:
        raise AttunementError(
            f"{name}: of {total} steps, {before} of warmup and {after} of final leave none in which ranks are allocated"
        )
    return before, total - after


def after_backward(name: str, parts: Sequence[Part], tensor: str) -> None:
    """Refuse a `before_step` without gradients, from which a schedule would learn nothing, in silence."""
    if all(part.gradient(tensor) is None for part in parts):
        raise AttunementError(
            f"{name}: before_step was called where no gradient is; its place is after backward() and before zero_grad()"
        )


def drawn(seed: int, *numbers: int) -> torch.Generator:
    """A generator for one draw of a schedule: it depends on the seed and the step alone, so a resumed run has it too."""
    mixed = seed
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**32  # torch takes 32 bits of a seed
    return torch.Generator().manual_seed(mixed)


def average(now: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float) -> None:
    """AdaLoRA's smoothed importance and its uncertainty, the distance from the mean just updated; in place."""
    mean.mul_(beta1).add_(now, alpha=1 - beta1)
    spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)


def agreed(value: Tensor) -> Tensor:
    """The mean over the processes of a distributed run, so that all of them choose alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def blocks_of(sites: Iterable[Site]) -> list[Block]:
    """The blocks in which sites stand, in order; what stands in none takes no turns."""
    return sorted({(site.stack or "", site.block) for site in sites if site.block is not None})


def rest_all_but(parts: Sequence[Part], awake: Iterable[Block]) -> None:
    """Leave every block out of the step but these."""
    kept = set(awake)
    for part in parts:
        part.rest(part.site.block is not None and (part.site.stack or "", part.site.block) not in kept)


def orthogonality(shown: Tensor, *matrices: Tensor) -> Tensor:
    """The sum of ||M M^T - I||, Frobenius, over matrices (..., r, n), of the rows where `shown` (..., r) is one."""
    rows = [M * shown[..., None] for M in matrices]
    return torch.stack([torch.linalg.matrix_norm(M @ M.mT - torch.diag_embed(shown)).sum() for M in rows]).sum()
