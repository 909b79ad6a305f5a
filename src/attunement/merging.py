"""Writing changes into the base's weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.part import Part
from attunement.root import bench_of
from attunement.site import NormLayout, base_of, owners_of, working_dtype

if TYPE_CHECKING:
    from attunement.adapter import Adapter


class Merged(NamedTuple):
    """A parameter that a merge has written, and what `unmerge` puts back: the tied object itself, or a copy."""

    part: Part | None
    module: nn.Module
    name: str
    before: Tensor | None
    keep: bool


def merge(adapter: Adapter, *, keep: bool, partial: bool, untie: bool) -> None:
    """See `Adapter.merge`."""
    if adapter.merged:
        raise AttunementError(f"merge: adapter {adapter.name!r} is merged already")
    from attunement.storage import fingerprint

    bench = bench_of(adapter.model)
    parts = []
    for part in adapter.parts:
        why = unmergeable(part)
        if why is None:
            parts.append(part)
        elif not partial:
            raise AttunementError(
                f"merge: {part.key}: {why}; partial=True merges the other parts and keeps this one beside"
            )
    if not parts:
        raise AttunementError(f"merge: adapter {adapter.name!r} has no part that can be merged")
    for name, parameter in adapter.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AttunementError(f"merge: {name!r} of adapter {adapter.name!r} has values that are not finite")
    owners = owners_of(adapter.model)
    tied = []
    for part in parts:
        own = part.site.module._parameters[part.site.parameter or ""]
        alike = (part.site.module, *part.twins)
        others = [f"{path}.{name}" for path, module, name in owners[id(own)] if module not in alike]
        if others and not untie:
            raise AttunementError(
                f"merge: {part.key} is tied to {others[0]}, which a merge would change too; untie=True gives it its own copy"
            )
        tied += [part] if others else []
    below = next(
        (a for a in bench.adapters.values() if a._restorable and _weights(a) & {_place(part) for part in parts}), None
    )
    if below is not None and not keep:
        raise AttunementError(
            f"merge: {below.name!r} is merged at the same weights, and unmerging it would take out what is merged for good "
            "after it; unmerge it first"
        )
    for other in bench.adapters.values():
        other._fingerprint = fingerprint(other)
    with torch.no_grad():
        for part in parts:  # all is computed once before anything is written
            for name, value in _after(part):
                if not torch.isfinite(value).all():
                    raise AttunementError(f"merge: {part.key}: the merged {name} would have values that are not finite")
        done: list[Merged] = []
        for part in parts:
            module = part.site.module
            for name, value in _after(part):
                own = module._parameters[name]
                if own is None or (part in tied and name == part.site.parameter):
                    # a tied weight's own object comes back with `unmerge`, and with it the tie
                    done.append(Merged(part, module, name, own if keep else None, keep))
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    done.append(Merged(part, module, name, own.detach().to("cpu", copy=True) if keep else None, keep))
                    own.data.copy_(value)
        if tied and getattr(config := getattr(adapter.model, "config", None), "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            adapter._untied = True
            done += _apart(owners, keep)
        adapter._merged = done
        adapter._merged_at = 1 + max(a._merged_at for a in bench.adapters.values())
    bench.use(bench.active)


def unmerge(adapter: Adapter) -> None:
    """See `Adapter.unmerge`."""
    if adapter._merged is None:
        raise AttunementError(f"unmerge: adapter {adapter.name!r} is not merged")
    if not adapter._restorable:
        raise AttunementError(f"unmerge: adapter {adapter.name!r} was merged with keep=False; load the base again")
    bench = bench_of(adapter.model)
    for other in bench.adapters.values():
        later = other is not adapter and other._merged_at > adapter._merged_at
        if later and _weights(adapter) & _weights(other):
            raise AttunementError(
                f"unmerge: {other.name!r} was merged after {adapter.name!r} at the same weights; unmerge it first"
            )
    with torch.no_grad():
        for _, module, name, before, _ in reversed(adapter._merged):
            if before is None or isinstance(before, nn.Parameter):
                module._parameters[name] = before
            else:
                module._parameters[name].data.copy_(before)  # type: ignore[union-attr]
    adapter._merged = None
    if adapter._untied:
        adapter.model.config.tie_word_embeddings, adapter._untied = True, False  # type: ignore[union-attr]
    if not any(other.merged for other in bench.adapters.values()):
        for other in bench.adapters.values():
            other._fingerprint = None
    bench.use(bench.active)


def merged_at(part: Part, model: nn.Module) -> str | None:
    """An adapter that is merged into the weight of a part, the last one."""
    those = [a for a in bench_of(model).adapters.values() if _place(part) in _weights(a)]
    return max(those, key=lambda a: a._merged_at).name if those else None


def _weights(adapter: Adapter) -> set[tuple[int, str]]:
    """Where it is merged."""
    return {(id(module), name) for _, module, name, *_ in adapter._merged or ()}


def _place(part: Part) -> tuple[int, str]:
    return id(part.site.module), part.site.parameter or ""


def _apart(owners: Mapping[int, Sequence[tuple[str, nn.Module, str]]], keep: bool) -> list[Merged]:
    """Give what is still tied copies of its own: transformers reads a model that says it ties nothing name by name."""
    done = []
    for _, *rest in owners.values():
        for _, module, name in rest:
            own: Tensor = module._parameters[name]  # type: ignore[assignment]
            if sum(m._parameters[n] is own for _, m, n in owners.get(id(own), ())) > 1:
                module._parameters[name] = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
                done.append(Merged(None, module, name, own if keep else None, keep))
    return done


def unmergeable(part: Part) -> str | None:
    """Why a part cannot be merged, or None."""
    method, site = part.method, part.site
    if "merge" in method.cannot:
        return f"{type(method).__name__} cannot be merged: {method.cannot['merge']}"
    if part.weight_form is None:
        return f"{type(method).__name__} changes what the module gives, not its weight"
    if site.layout.beside_only:
        return "the base is quantised; merge into a dequantised copy of the model instead"
    if hasattr(method, "bias") and site.bias not in site.module._parameters:
        zero = torch.zeros(site.outputs, dtype=working_dtype(site.weight))
        shift = method.bias(zero, **part.values("bias"))
        if site.layout.absorb(site.weight, shift) is None and bool((shift != 0).any()):
            return f"{base_of(type(site.module)).__name__} has no bias that could take the shift"
    if isinstance(site.layout, NormLayout) and part.form != "weight" and not _scales_by_its_weight(part):
        return f"the output of {base_of(type(site.module)).__name__} is not its weight times something"
    return None


def _scales_by_its_weight(part: Part) -> bool:
    """Whether twice the weight gives twice the output: not so for norms that multiply by one plus their weight."""
    module: Any = part.site.module
    forward = base_of(type(module)).forward  # type: ignore[attr-defined]
    if forward.__module__.startswith("torch.nn."):
        return True
    weight = module._parameters["weight"]
    x = torch.randn(2, 3, weight.shape[0], dtype=weight.dtype, device=weight.device)
    plan, module._attuned_plan = module._attuned_plan, None
    try:
        with torch.no_grad():
            once = forward(module, x)
            module._parameters["weight"] = nn.Parameter(weight * 2, requires_grad=False)
            twice = forward(module, x)
    finally:
        module._parameters["weight"] = weight
        module._attuned_plan = plan
    bias = module._parameters.get("bias")
    shift = 0 if bias is None else bias
    return torch.allclose(twice - shift, 2 * (once - shift), rtol=1e-2, atol=1e-4)


def _after(part: Part) -> list[tuple[str, Tensor]]:
    """The parameters of a module after a part, in the base's precision: (name, value)."""
    site = part.site
    module = site.module
    name = site.parameter or ""
    weight: Tensor = module._parameters[name]  # type: ignore[assignment]
    work = working_dtype(weight)
    after = [(name, part.value(weight.to(work)).to(weight.dtype))]
    if hasattr(part.method, "bias") and site.bias in module._parameters:
        bias = module._parameters[site.bias]
        rows = site.layout.size(module, name)[-2]
        held = weight.new_zeros(rows, dtype=work) if bias is None else bias.to(work)
        shifted = part.value(held, "bias")
        if bias is not None or bool((shifted != 0).any()):
            after.append((site.bias, shifted.to(weight.dtype)))
    return after
