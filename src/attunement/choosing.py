"""From a recipe to sites: what the places that a selection means offer to a method, and why some offer nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from attunement.anatomy import CONTAINER, Anatomy, Place
from attunement.attention import AttentionPart, attention_site
from attunement.errors import AttunementError, nearest
from attunement.fields import misfit
from attunement.heads import introduce
from attunement.method import Method, is_additive, weight_form
from attunement.method import method as method_named
from attunement.method import methods as method_names
from attunement.network import NetworkPart, network_site
from attunement.part import Group, Part
from attunement.selection import select
from attunement.sequence import SequencePart, sequence_site
from attunement.site import (
    NORM_FIRST,
    OPAQUE,
    PLAIN,
    READ_ONLY,
    Layout,
    Site,
    base_of,
    children_read,
    layout_of,
)


def is_ours(name: str) -> bool:
    """Whether a dotted name is that of an adapter's module or tensor."""
    return CONTAINER in name.split(".")


def chosen(structure: Anatomy, recipe: Any, on: Any) -> list[Group]:
    """The methods of a recipe with the sites that their selections give."""
    if isinstance(recipe, Method):
        pairs: list[tuple[Any, Any]] = [(on, recipe)]
    elif isinstance(recipe, Mapping) and recipe:
        if on is not None:
            raise AttunementError("adapt: `on` goes with a single method; a mapping has its selections as keys")
        pairs = list(recipe.items())
    else:
        if isinstance(recipe, type) and issubclass(recipe, Method):
            raise AttunementError(
                f"adapt: {recipe.__name__} is a class; call it for a method, as in {recipe.__name__}()"
            )
        named = _by_name(recipe) if isinstance(recipe, str) else ""
        if callable(recipe) and hasattr(recipe, "__name__"):
            named = f"; {recipe.__name__} is a function: call it for a recipe, as in {recipe.__name__}()"
        raise AttunementError(f"adapt: expected a method or a mapping of selections to methods, got {recipe!r}{named}")
    for selection, method in pairs:
        if not (isinstance(method, Method) or (method is None and selection == "head")):
            raise AttunementError(f"adapt: {selection!r} must have a method such as LoRA(rank=8), got {method!r}")
    if all(method is None for _, method in pairs):
        raise AttunementError("adapt: the recipe has no method; 'head': None only leaves a head out")
    heads = (
        {}
        if any(names_head(selection) for selection, _ in pairs)
        else {place.name: place for place in structure.task_heads}
    )
    groups = [_group(structure, selection, method, heads) for selection, method in pairs if method is not None]
    taken = {site.name for group in groups if group.method.acts_on == "parameter" for site in group.sites}
    if left := [place for name, place in heads.items() if name not in taken]:
        groups.append(_group(structure, "head", method_named("train")(), {}, left))
    seen: dict[tuple[type, str], str] = {}
    for group in groups:
        for site in group.sites:
            if (before := seen.setdefault((type(group.method), site.key), group.on)) != group.on:
                word = type(group.method).__name__
                raise AttunementError(f"adapt: {site.key} is selected twice for {word}, by {before!r} and {group.on!r}")
    return groups


def _by_name(name: str) -> str:
    """What a text in place of a recipe was meant for, as the end of a sentence."""
    from attunement import recipes

    made = {word: one for word, one in vars(recipes).items() if getattr(one, "__module__", "") == recipes.__name__}
    known = [word for full in method_names() for word in (full, full.partition("/")[2])]
    word = name.casefold()
    if inspect.isfunction(made.get(word)):
        asked = [one.name for one in inspect.signature(made[word]).parameters.values() if one.default is one.empty]
        return f"; a recipe by name is at.recipes.{word}({', '.join(asked)})"
    if word in known:
        return f"; a method by name is at.method({word!r})()"
    return f"; a method by name is at.method(name)(), a recipe at.recipes.name(){nearest(word, [*known, *made])}"


def names_head(selection: Any) -> bool:
    """Whether a selection speaks of task heads, which are then trained as it says and not as a matter of course."""
    return isinstance(selection, str) and bool(re.search(r"(?<![A-Za-z0-9_])head(?![A-Za-z0-9_])", selection))


def _group(
    structure: Anatomy, selection: Any, method: Method, heads: Mapping[str, Place], places: list[Place] | None = None
) -> Group:
    word = selection.strip() if isinstance(selection, str) else ""
    explicit = selection is not None and word != "*" and not word.startswith("type:")
    selection = method.placement if selection is None else selection
    if places is None:
        try:
            places = [p for p in select(structure, selection) if not is_ours(p.name)]
        except AttunementError as error:
            if explicit or word:
                raise
            place = repr(selection)
            if not isinstance(selection, str):
                place = (selection.__doc__ or "places of its own").split("\n")[0].rstrip(".")
                place = place[:1].lower() + place[1:]
            said = f"adapt: {type(method).__name__} goes to {place} by default, which this model has not: say where"
            raise AttunementError(f"{said} with on=...; {error}") from None
    group = Group(method, selection if isinstance(selection, str) else getattr(selection, "__name__", "predicate"), [])
    sites: dict[tuple[int, str], Site] = {}
    for made in (made for place in places for made in sites_of(structure, method, place)):
        if isinstance(made, Site):
            if not explicit and any(made.name == name or made.name.startswith(f"{name}.") for name in heads):
                continue  # a task head is trained as a whole
            reason = misfit(method, made) or passed_over(structure.model, method, made)
            if reason is None:
                sites[id(made.module), made.slot] = made
                continue
            # which parameters of a module a method trains is for its fields to say
            where, refused = made.key, explicit and method.acts_on != "parameter"
        else:
            (where, reason), refused = made, explicit
        if refused:
            raise AttunementError(f"adapt: {type(method).__name__} cannot act on {where}: {reason}")
        group.skipped.append((where, reason))
    group.sites = list(sites.values())
    if not group.sites:
        why = f"; {group.skipped[0][0]}: {group.skipped[0][1]}" if group.skipped else ""
        raise AttunementError(f"adapt: {type(method).__name__} has no site that it can act on in {group.on!r}{why}")
    return group


def sites_of(structure: Anatomy, method: Method, place: Place) -> Iterator[Site | tuple[str, str]]:
    """The sites that a place offers to a method, or (where, why not)."""
    inside = _matrices_in(structure, place) if method.acts_on == "matrix" else []
    if method.acts_on == "parameter" and place.parameter is None and place.view is None:
        for one in _parameters_in(place):
            made = site_of(structure, method, one)
            yield made if isinstance(made, Site) else (f"{one.name}.{one.parameter}", made)
    else:
        for one in inside or [place]:
            made = site_of(structure, method, one)
            if isinstance(made, Site):
                yield made
            elif not inside:  # what is no matrix in a sublayer was not meant
                yield place.name or type(place.module).__name__, made


def _matrices_in(structure: Anatomy, place: Place) -> list[Place]:
    """The places of the matrices in a sublayer, a block or a container; none where the place is one itself."""
    if place.members:
        return list(place.members)
    if place.parameter is not None or "weight" in place.module._parameters or not place.module._modules:
        return []
    prefix = f"{place.name}." if place.name else ""
    return [
        p
        for p in structure.places
        if p.name.startswith(prefix) and p.view is None and not p.members
        if p.parameter or "weight" in p.module._parameters
    ]


def _parameters_in(place: Place) -> Iterator[Place]:
    """A place for every parameter of a module and what is inside it."""
    for one in {id(member.module): member for member in place.members}.values() or [place]:
        for name, module in one.module.named_modules(prefix=one.name):
            for word, parameter in () if is_ours(name) else module._parameters.items():
                if parameter is not None:
                    yield Place(name, module, one.role, one.block, one.stack, parameter=word)


def site_of(structure: Anatomy | None, method: Method, place: Place) -> Site | str:
    """A place as a site for the kind of thing that a method acts on, or why it is none (the end of a sentence).

    `structure` is read for sites of several modules and for methods that name partners.
    """
    return KINDS[method.acts_on][0](structure, method, place)


def _matrix(structure: Any, method: Method, place: Place) -> Site | str:
    parameter = place.parameter or "weight"
    layout = layout_of(place.module, parameter, place.transposed)
    if isinstance(layout, str):
        return layout
    site = Site(place, parameter, layout, place.view)
    if site.inputs == 1 and not hasattr(method, "output") and layout.matrix is not OPAQUE.matrix:
        return "a norm's weight is a vector"
    if layout.beside_only and not is_additive(method) and method.form(site) not in ("output", "input"):
        return "the base is quantised, which only additive changes can run beside"
    if hasattr(method, "bias") and not site.called and site.bias not in place.module._parameters:
        return f"{type(place.module).__name__} has no {site.bias!r} to go with its {parameter!r}"
    if method.partners:
        introduce(structure, method, site)
    return site


def _parameter(_: Any, __: Method, place: Place) -> Site | str:
    name = place.parameter or "weight"
    if place.view is not None:
        return "only whole parameters are trained; select the fused matrix"
    if (value := place.module._parameters.get(name)) is None:
        return f"{type(place.module).__name__} has no parameter {name!r}"
    if isinstance(place.module, nn.RNNBase):
        return f"{type(place.module).__name__} hides its weights in flat copies that its forward reads"
    if not value.is_floating_point():
        return "its values are quantised"
    return Site(place, name, PLAIN)


def _output(_: Any, method: Method, place: Place) -> Site | str:
    module, kind = place.module, type(place.module).__name__
    reads = hasattr(method, "input") or method.reads_input()
    if place.view is not None:
        return "only the whole output of a fused matrix is a site; select that"
    if isinstance(module, nn.Embedding) and reads:
        return "what enters an Embedding are ids"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and method.reads_input():
        return "what enters a convolution has other positions than what leaves it"
    if hasattr(method, "input") and place.entry not in (None, module):
        return "what enters this sublayer enters several modules; select one of them"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"a {kind} runs or lists its children; choose its last module"
    if place.parameter is not None and place.parameter != "weight":
        return f"{place.parameter} is read by its module, not called: there is no output of its own"
    if base_of(type(module)).__name__ == READ_ONLY:
        return "MultiheadAttention reads this weight and never calls the module: it has no output of its own"
    layout = layout_of(module, "weight")
    last, ending = (module, layout) if not isinstance(layout, str) else _last(module)
    site = Site(place, None, OPAQUE if isinstance(layout, str) else layout)
    if not isinstance(layout, str):
        *_, site.outputs, inputs = layout.size(module, "weight")
        site.inputs = getattr(module, "in_channels", inputs if inputs > 1 else site.outputs)
    elif last is not None and ending.channels == 1:
        if reads:
            return f"what enters {kind}, which convolves, has other positions or channels than what leaves it"
        site.layout = NORM_FIRST  # maps, with the channels of the last convolution or norm in second place
        site.outputs = site.inputs = ending.size(last, "weight")[-2]
    elif widths := [p.shape[-1] for p in module.parameters() if p.dim() >= 2]:
        site.outputs = site.inputs = widths[0]
    else:
        return f"the width of what {kind} gives is not known"
    if place.entry is not None and not isinstance(entry := layout_of(place.entry, "weight"), str):
        site.inputs = entry.size(place.entry, "weight")[-1]
    return site


def _last(module: nn.Module) -> tuple[nn.Module | None, Layout]:
    """The last module inside that has a weight of a known layout, and that layout: what is likely to make the output."""
    for part in reversed(list(module.modules())):
        layout = layout_of(part, "weight")
        if not isinstance(layout, str) and part._parameters.get("weight") is not None:
            return part, layout
    return None, OPAQUE


def passed_over(model: nn.Module, method: Method, site: Site) -> str | None:
    """Why a method cannot act on a module whose weight its parent reads instead of calling it (Mamba's mixer), or None."""
    above, _, child = site.name.rpartition(".")
    parent = model
    for word in above.split(".") if above else ():
        parent = parent._modules[word]  # type: ignore[assignment]
    if not child or child not in children_read(base_of(type(parent))):
        return None
    if isinstance(parent, nn.TransformerEncoderLayer):  # a hook turns its fast path off: see Bench
        return None
    site.called = False  # what can act on the weight acts there
    if weight_form(method) is not None and site.parameter is not None:
        return None
    return f"{type(parent).__name__} reads the weight of its {child!r}: there is no output that is sure to be used"


KINDS: dict[str, tuple[Callable[[Any, Method, Place], Site | str], type[Part]]] = {
    "matrix": (_matrix, Part),
    "parameter": (_parameter, Part),
    "output": (_output, Part),
    "sequence": (sequence_site, SequencePart),
    "attention": (attention_site, AttentionPart),
    "network": (network_site, NetworkPart),
}
"""What a method may act on: how a place becomes a site for it, and the class of what stands there."""
