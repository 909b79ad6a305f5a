"""`adapt`: from a recipe to an adapter that stands on its model. Everything is made and checked before anything changes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attunement.adapter import Adapter, using
from attunement.ahead import working
from attunement.anatomy import CONTAINER, anatomy, walk
from attunement.attach import exchange, sealed_forward
from attunement.choosing import KINDS, chosen
from attunement.errors import AttunementError
from attunement.method import Method, Tagged, Tensors, tagged, untold
from attunement.part import Group, Holder
from attunement.root import Bench, root_extras
from attunement.site import Site, owners_of, working_dtype
from attunement.statistics import Statistics, collect, needs_of


def adapt(
    model: nn.Module,
    recipe: Method | Mapping[Any, Method | None],
    on: Any = None,
    name: str = "default",
    data: Iterable[Any] | None = None,
) -> Adapter:
    """Put methods on sites of a model and make the new adapter the active one, alone.

    The model stays the same object, an instance of its class: until the last adapter is detached its `type` is a subclass
    of the same name, and its parameters require no gradients. Everything is checked first: `adapt` does all of it or
    raises and changes nothing.

    Args:
        model: any PyTorch model, or a part of one.
        recipe: a method, or a mapping from selections to methods; `"head": None` leaves a task head alone.
        on: the selection for a single method; by default the placement that the method was published with.
        name: the adapter's name on this model: letters, digits, "_" and "-".
        data: batches for methods that start from data (CorDA, EVA): the bare base runs over them once, in eval mode. A
            mapping is called as `model(**batch)`, a tuple as `model(*batch)`, a tensor as `model(batch)`.

    Raises:
        AttunementError: a selection that matches nothing, a site that cannot be taken, a name in use or unsafe, a model
            that PEFT has adapted, a patched forward, a hidden weight, a method that needs data and gets none.
    """
    check_name(model, name)
    groups = chosen(anatomy(model), recipe, on)
    statistics = _gathered(model, groups, data)
    return attach(build(model, _planned(groups, statistics), name, statistics))


def _gathered(model: nn.Module, groups: list[Group], data: Iterable[Any] | None) -> dict[Site, Statistics]:
    """What the methods of these groups need of the data, by site."""
    wanted = {site: needs_of(group.method) for group in groups if group.method.needs for site in group.sites}
    if not wanted:
        return {}
    if data is None:
        word = next(type(group.method).__name__ for group in groups if group.method.needs)
        raise AttunementError(
            f"adapt: {word} starts from data and got none; pass some batches of them: adapt(..., data=batches)"
        )
    with using(model, None) if "_attuned_bench" in model.__dict__ else contextlib.nullcontext():
        return collect(model, wanted, data)


def _planned(groups: list[Group], statistics: Mapping[Site, Statistics]) -> list[Group]:
    """The groups, each split by what its method's plan gives the sites."""
    made: list[Group] = []
    for group in groups:
        if type(group.method).plan is Method.plan:
            made.append(group)
            continue
        made.extend(shares(group, group.method.plan(group.sites, statistics)))
    return made


def shares(group: Group, plan: Mapping[Site, Method]) -> list[Group]:
    """A group split by what a plan gives its sites."""
    shares: list[Group] = []
    skipped = list(group.skipped)
    for site in group.sites:
        if (method := plan.get(site)) is None:
            skipped.append((site.key, f"{type(group.method).__name__} chose others"))
            continue
        share = next((one for one in shares if one.method == method), None)
        if share is None:
            shares.append(share := Group(method, group.on, []))
        share.sites.append(site)
    if not shares:
        raise AttunementError(f"adapt: {type(group.method).__name__} chose none of the sites of {group.on!r}")
    shares[0].skipped = skipped
    return shares


def check_name(model: Any, name: Any) -> None:
    """Refuse what is no model, is adapted by others, or a name that is unsafe or taken."""
    if not isinstance(model, nn.Module):
        raise AttunementError(f"adapt: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
        raise AttunementError(
            f"adapt: an adapter's name is 1 to 64 letters, digits, '_' or '-', beginning with no '-'; got {name!r}"
        )
    bench = model.__dict__.get("_attuned_bench")
    if bench is not None and name in bench.adapters:
        raise AttunementError(
            f"adapt: there is already an adapter {name!r} on this model; detach it or choose another name"
        )
    for path, module in walk(model):
        if type(module).__module__.startswith("peft.") or "peft_config" in module.__dict__:
            raise AttunementError(
                f"adapt: {path or type(module).__name__} has been adapted by PEFT; merge or unload that first, "
                "or load its checkpoint here with attunement.load"
            )
        if path and "_attuned_bench" in module.__dict__:
            raise AttunementError(
                f"adapt: {path} is adapted on its own; adapt the same module again, or detach there first"
            )
        if bench is None and CONTAINER in module._modules:
            raise AttunementError("adapt: this module is part of an adapted model; adapt that model instead")


def build(
    model: nn.Module,
    groups: list[Group],
    name: str,
    statistics: Mapping[Site, Statistics] | None = None,
    given: Mapping[Site, Tensors] | None = None,
) -> Adapter:
    """An adapter with its tensors, not yet on the model: nothing has changed.

    Args:
        statistics: what data said, for the initial values of the sites that are in it.
        given: initial values that come from elsewhere.
    """
    for group in groups:
        for site in group.sites:
            for module in filter(None, (site.module, site.place.entry)):
                if (sealed := sealed_forward(module)) is not None:
                    raise AttunementError(f"adapt: {site.name}: {sealed}")
                if any(type(p) is not nn.Parameter and hasattr(p, "placements") for p in module._parameters.values()):
                    raise AttunementError(f"adapt: {site.name} is sharded already; adapt before fully_shard")
            site.among = group.sites
        shared = tagged(group.method.shared(group.sites))
        if shared:
            first = group.sites[0]
            group.shared = Holder(_placed(shared, first))
            group.shared_kinds = {word: kind for word, (kind, _) in shared.items()}
        kind = KINDS[group.method.acts_on][1]
        singles = {site: _singles(site) for site in group.sites if given is None or site not in given}
        with working(group.method, [one for each in singles.values() for one in each]):
            for site in group.sites:
                tensors = _initial(group.method, site, singles.get(site), statistics, given)
                modules = _built(group.method, site)
                names = (*tensors, *shared, *modules, *group.method.asks)
                if said := untold(group.method, group.method.form(site), names):
                    raise AttunementError(f"adapt: {site.key}: {said}")
                group.parts.append(kind(group.method, site, tensors, group.shared, modules))
        for one in group.parts:
            one.meet(group.parts)
    adapter = Adapter(name, model, groups)
    seen: dict[str, int] = {}
    for part in adapter.parts:
        seen[part.key] = count = seen.get(part.key, 0) + 1
        if count > 1:
            part.key, part.slot = f"{part.key}~{count}", f"{part.slot}~{count}"
    _share_tied(adapter)
    return adapter


def attach(adapter: Adapter) -> Adapter:
    """Put a built adapter on its model: exchange classes, register holders, make it the active one."""
    model = adapter.model
    exchange(model, root_extras)
    bench = model.__dict__.get("_attuned_bench")
    if bench is None:
        bench = model.__dict__["_attuned_bench"] = Bench(model)
    bench.add(adapter)
    bench.use(adapter.name)
    return adapter


def _share_tied(adapter: Adapter) -> None:
    """A parameter that a method replaces stays tied: every module that owns it reads the same holder."""
    parts = [part for part in adapter.parts if part.method.acts_on == "parameter"]
    owners = owners_of(adapter.model) if parts else {}
    taken: set[int] = set()
    for part in parts:
        own = part.site.module._parameters[part.site.parameter or ""]
        others = [(m, n) for _, m, n in owners[id(own)] if m is not part.site.module]
        if id(own) in taken:
            raise AttunementError(f"adapt: {part.key} is tied to a parameter that is selected too; select one of them")
        taken.add(id(own))
        if odd := [n for _, n in others if n != part.site.parameter]:
            raise AttunementError(
                f"adapt: {part.key} is tied to a parameter of another name, {odd[0]!r}; untie them first"
            )
        part.twins = tuple(m for m, _ in others)


def _singles(site: Site) -> list[Site]:
    """A site for each of its matrices."""
    return [site.single(index) for index in range(math.prod(site.batch))] if site.batch else [site]


def _initial(
    method: Method,
    site: Site,
    singles: list[Site] | None,
    statistics: Mapping[Site, Statistics] | None,
    given: Mapping[Site, Tensors] | None,
) -> dict[str, Tagged]:
    if singles is None:
        assert given is not None
        return _placed(tagged(given[site]), site)
    known = None if statistics is None else statistics.get(site)
    if not site.batch:
        return _placed(tagged(method.tensors(site) if known is None else method.calibrate(site, known)), site)
    each = [
        tagged(method.tensors(one) if known is None else method.calibrate(one, known.single(index)))
        for index, one in enumerate(singles)
    ]
    stacked = {
        name: Tagged(kind, torch.stack([one[name].value for one in each])) for name, (kind, _) in each[0].items()
    }
    return _placed(stacked, site)


def _built(method: Method, site: Site) -> dict[str, nn.Module]:
    modules = dict(method.build(site))
    near = next(site.module.parameters(), None)
    for module in modules.values():
        module.train(site.module.training)
        if near is not None:
            module.to(_device(site, near), working_dtype(near))
        for parameter in module.parameters():
            parameter.requires_grad_()
    return modules


def _device(site: Site, near: Tensor) -> Any:
    hook = site.module.__dict__.get("_hf_hook")  # offloaded weights rest on "meta" and come to this device to run
    return getattr(hook, "execution_device", None) if near.is_meta and hook is not None else near.device


def _placed(tensors: Mapping[str, Tagged], site: Site) -> dict[str, Tagged]:
    """On the device of the site, float64 over a float64 base, float32 otherwise."""
    near = site.module._parameters.get(site.parameter or "weight")
    near = next(site.module.parameters(), None) if near is None else near
    if near is None:
        return dict(tensors)
    device, dtype = _device(site, near), working_dtype(near)
    placed = {}
    for name, (kind, value) in tensors.items():
        wanted = dtype if value.is_floating_point() else value.dtype
        fits = value.dtype is wanted and value.device == device and not value.requires_grad and value.is_contiguous()
        placed[name] = Tagged(kind, value if fits else value.detach().to(device, wanted).contiguous())
    return placed
