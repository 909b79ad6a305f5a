"""Any change of weights as plain LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attunement.adapter import Adapter
from attunement.adapting import attach, build, check_name
from attunement.errors import AttunementError
from attunement.merging import merged_at, unmergeable
from attunement.method import method as method_named
from attunement.method import split
from attunement.part import Group
from attunement.site import Site


def to_lora(adapter: Adapter, rank: int | None = None, name: str | None = None) -> Adapter:
    """A new adapter of plain LoRA with the same change: exact where the factors' rank allows, else the best of that rank.

    Servers read LoRA only. The relative error ||D - BA|| / ||D|| of every site (Frobenius norm, 0 where exact) stands in
    `.info["errors"]`, the largest of them in `.info["error"]`. Trained parameters such as heads are taken over as they are.

    Args:
        rank: by default the largest rank of the adapter's own factors.
        name: by default the adapter's name with "-lora" behind it.

    Raises:
        AttunementError: for a part that is no change of a weight, one that reads a weight with a merge in it, or a rank
            that is missing where no factors give one.
    """
    lora = method_named("lora")
    model, name = adapter.model, name or f"{adapter.name}-lora"
    check_name(model, name)
    changes, kept = {}, []
    for part in adapter.parts:
        if part.method.acts_on == "parameter":
            kept.append(part)
            continue
        why = None if part.additive else unmergeable(part)
        if part.reads_weight and (beneath := merged_at(part, model)):
            raise AttunementError(
                f"to_lora: {part.key} is made from the weight, in which {beneath!r} is merged; unmerge it first"
            )
        if why is not None or part.site.batch:
            raise AttunementError(f"to_lora: {part.key}: {why or 'LoRA on stacked experts is read by no server'}")
        shift = (
            part.method.bias(torch.zeros(part.site.outputs), **part.values("bias"))
            if hasattr(part.method, "bias")
            else None
        )
        if shift is not None and bool((shift != 0).any()):
            raise AttunementError(
                f"to_lora: {part.key}: {type(part.method).__name__} shifts the bias, which LoRA cannot"
            )
        changes[part] = _factored(part)
    ranks = [B.shape[1] for B, _, exact in changes.values() if exact]
    if rank is None and len(ranks) < len(changes):
        raise AttunementError("to_lora: this adapter's changes have full rank; say which rank to convert to")
    rank = max(ranks, default=1) if rank is None else rank
    errors: dict[str, float] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    by_rank: dict[int, list[Site]] = {}
    for part, (B, A, exact) in changes.items():
        own = min(rank, part.site.inputs, part.site.outputs)
        if not (exact and B.shape[1] <= own):
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            total = S.square().sum().sqrt()
            errors[part.key] = float(S[own:].square().sum().sqrt() / total) if total > 0 else 0.0
            B, A = U[:, :own] * S[:own], Vh[:own]
        else:
            errors[part.key] = 0.0
        values[part.key] = (B, A)
        by_rank.setdefault(own, []).append(part.site)
    groups = [Group(lora(rank=r, alpha=r), f"to_lora({adapter.name})", sites) for r, sites in by_rank.items()]
    groups += [
        Group(g.method, g.on, [p.site for p in g.parts]) for g in adapter.groups_ if g.parts and g.parts[0] in kept
    ]
    made = build(model, groups, name)
    with torch.no_grad():
        for part in made.parts:
            if part.key in values:
                B, A = values[part.key]
                part.holder._parameters["B"].zero_()[:, : B.shape[1]] = B  # type: ignore[union-attr]
                part.holder._parameters["A"].zero_()[: A.shape[0]] = A  # type: ignore[union-attr]
        fresh = {part.key: part for part in made.parts}
        for part in kept:
            for word, value in part.holder.state_dict().items():
                fresh[part.key].holder.state_dict()[word].copy_(value)
    made.info.update(errors=errors, error=max(errors.values(), default=0.0))
    return attach(made)


@torch.no_grad()
def _factored(part: Any) -> tuple[Tensor, Tensor, bool]:
    """A part's change as B (out, r), A (r, in), and whether r is what its own factors have."""
    W = part.site.weight
    if part.weight_form == "factors":
        B, A = split(part.method.factors(W, **part.values("factors")))
        if B is not None:
            return B, A, True
        D = A
    else:
        D = part._new_weight(W, part.values(part.weight_form)) - W
    return torch.eye(D.shape[0], dtype=D.dtype, device=D.device), D, False
