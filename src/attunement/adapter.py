"""`adapt`, `use`, `detach`, and the handle they work on: an `Adapter`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.anatomy import CONTAINER, Anatomy, Place, anatomy
from attunement.attach import Holder, Part, exchange, sealed_forward
from attunement.compose import Active, checked
from attunement.errors import AttunementError
from attunement.method import Method, Tagged, is_additive, tagged, weight_form
from attunement.method import method as method_named
from attunement.root import Bench, bench_of, root_extras
from attunement.selection import select
from attunement.site import OPAQUE, PLAIN, Site, base_of, children_read, layout_of, working_dtype

if TYPE_CHECKING:
    from os import PathLike

    from rich.console import Console, ConsoleOptions, RenderResult

Selection = "str | Callable[[Any], bool]"


class Group:
    """One method of an adapter with the sites it acts on."""

    def __init__(self, method: Method, on: str, sites: list[Site]) -> None:
        self.method, self.on, self.sites = method, on, sites
        self.parts: list[Part] = []
        self.shared: Holder | None = None
        self.shared_kinds: dict[str, str] = {}
        self.skipped: list[tuple[str, str]] = []

    def holders(self) -> list[Holder]:
        """Every module that owns tensors of this method."""
        return [*([] if self.shared is None else [self.shared]), *(part.holder for part in self.parts)]


class Adapter:
    """A named set of tensors on a model: saveable, removable, mergeable.

    Attributes:
        name: its name on the model.
        model: the model it stands on.
        groups_: its methods, each with its parts.
        parts: one for each method and site, with `.site`, `.method` and `.key`.
        metrics: figures that `save` writes along, such as {"accuracy": 0.91}.
    """

    def __init__(self, name: str, model: nn.Module, groups: list[Group]) -> None:
        self.name, self.model, self.groups_ = name, model, groups
        self.metrics: dict[str, float] = {}
        self.info: dict[str, Any] = {}
        self._trainable = True
        self._merged: list[tuple[Part, str, Tensor | None, bool]] | None = None  # what `unmerge` puts back
        self._fingerprint: dict[str, Any] | None = None  # of the base before any merge, while one is in place
        self._untied = False  # whether its merge changed the model's config
        self._merged_at = 0  # counts merges on this model, so that they come off in order

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for group in self.groups_ for part in group.parts)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self.parts)} parts, {self.count():,} trainable parameters)"

    # --- tensors ---

    def owners(self) -> Iterator[tuple[str, nn.Module, Mapping[str, str]]]:
        """Every module that owns tensors of this adapter: the prefix of their saved names, the module, their kinds."""
        for number, group in enumerate(self.groups_):
            if group.shared is not None:
                yield f"shared.{number}", group.shared, group.shared_kinds
            for part in group.parts:
                yield part.key, part.holder, part.kinds

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors, under the names they have when saved."""
        for prefix, owner, _ in self.owners():
            for name, parameter in owner._parameters.items():
                assert parameter is not None
                yield f"{prefix}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors."""
        return (parameter for _, parameter in self.named_parameters())

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state(self) -> dict[str, Tensor]:
        """Every tensor that is saved (trained and fixed ones, not seeded ones), detached, by name."""
        return {key: whole(getattr_tensor(owner, name)) for key, (owner, name) in self._saved().items()}

    def _saved(self) -> dict[str, tuple[nn.Module, str]]:
        return {
            f"{prefix}.{name}": (owner, name)
            for prefix, owner, kinds in self.owners()
            for name, kind in kinds.items()
            if kind != "seeded"
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put saved values in place, after checking names both ways, shapes and finiteness.

        Raises:
            AttunementError: naming the first tensor that is missing, unexpected, ill-shaped or not finite.
        """
        own = self._saved()
        where = f"adapter {self.name!r}"
        if missing := sorted(own.keys() - state.keys()):
            raise AttunementError(f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}")
        if extra := sorted(state.keys() - own.keys()):
            raise AttunementError(f"{where}: {len(extra)} tensors were not expected, first {extra[0]!r}")
        for key, (owner, name) in own.items():
            here, came = getattr_tensor(owner, name), state[key]
            if here.shape != came.shape:
                raise AttunementError(f"{where}: {key!r} must have shape {tuple(here.shape)}, got {tuple(came.shape)}")
            if came.is_floating_point() and not torch.isfinite(came).all():
                raise AttunementError(f"{where}: {key!r} has values that are not finite")
        with torch.no_grad():
            for key, (owner, name) in own.items():
                here = getattr_tensor(owner, name)
                here.copy_(_like(here, state[key]))

    # --- training ---

    @property
    def trainable(self) -> bool:
        """Whether its tensors require gradients while it is active."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        bench_of(self.model).mark()

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: `lr` and `weight_decay` times the factors of each method (LoRA+, ...)."""
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for group in self.groups_:
            rates = group.method.rates()
            for owner in group.holders():
                for name, parameter in owner._parameters.items():
                    factors = rates.get(name, {})
                    key = (factors.get("lr", 1.0), factors.get("weight_decay", 1.0))
                    found.setdefault(key, []).append(parameter)  # type: ignore[arg-type]
        return [{"params": p, "lr": lr * a, "weight_decay": weight_decay * b} for (a, b), p in found.items()]

    def penalty(self) -> Tensor:
        """The sum of the terms that its methods add to the loss; a 0-d zero where there are none."""
        terms = [
            part.method.penalty(**part.values("penalty"))  # type: ignore[attr-defined]
            for part in self.parts
            if "penalty" in part.takes
        ]
        if terms:
            return torch.stack([term.reshape(()) for term in terms]).sum()
        return torch.zeros((), device=next((p.device for p in self.parameters()), None))

    def before_step(self) -> None:
        """Call after the backward pass and before the optimiser's step; does nothing unless a method schedules."""
        for group in self.groups_:
            group.method.before_step(self)

    # --- the base ---

    @property
    def merged(self) -> bool:
        """Whether its change stands in the base's weights at present."""
        return self._merged is not None

    def merge(self, *, keep: bool = True, partial: bool = False, untie: bool = False) -> None:
        """Write the change into the base's weights, computed in float32 (float64 over float64) and rounded once.

        Args:
            keep: hold a CPU copy of the weights, so that `unmerge` restores them bit for bit.
            partial: leave the parts that cannot be merged in place beside the merged ones, instead of refusing.
            untie: give a tied weight its own copy first; without it, merging into a tied weight is refused.

        Raises:
            AttunementError: where a part cannot be merged, is not finite, or the base is quantised or tied.
        """
        from attunement.merging import merge

        merge(self, keep=keep, partial=partial, untie=untie)

    def unmerge(self) -> None:
        """Put the base's weights back, bit for bit. Adapters merged later at the same weights come off first."""
        from attunement.merging import unmerge

        unmerge(self)

    def save(self, path: str | PathLike[str], format: str = "attunement") -> None:
        """Write the adapter to a folder, atomically; `format="peft"` writes PEFT's format instead. See `load`."""
        from attunement import storage

        storage.save(self, path, format)

    def push(self, repository: str, **options: Any) -> str:
        """Upload the adapter to the Hugging Face hub as `user/repository`; returns the address."""
        from attunement import storage

        return storage.push(self, repository, **options)

    def detach(self) -> None:
        """Take the adapter off: classes, keys and bits of the model are what they were. A kept merge is undone first."""
        detach(self.model, self.name)

    def summary(self) -> Summary:
        """What was adapted, how much of it is trained, and what it takes on disk: prints as a table."""
        return Summary(self)


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor, gathered where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(here: Any, value: Tensor) -> Tensor:
    """A value as it must come to be copied into `here`: sharded where that is."""
    if not hasattr(here, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(here.device), here.device_mesh, here.placements)


def getattr_tensor(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module by name."""
    tensor: Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers[name] if tensor is None else tensor
    assert tensor is not None
    return tensor


class Summary:
    """`print(adapter.summary())`."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        state = adapter.state()
        self.trainable = adapter.count()
        base = sum(p.numel() for name, p in adapter.model.named_parameters() if not _is_ours(name))
        self.share = self.trainable / max(base, 1)
        self.saved_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        adapter = self.adapter
        table = Table(title=f"adapter {adapter.name!r}", title_justify="left")
        for column in ("method", "on", "sites", "trained", "scale"):
            table.add_column(column, justify="right" if column in ("sites", "trained", "scale") else "left")
        for group in adapter.groups_:
            count = sum(p.numel() for owner in group.holders() for p in owner.parameters())
            buffers = [b for h in group.holders() if (b := h._buffers.get("scale")) is not None and not b.is_meta]
            scales = {float(b.flatten()[0]) for b in buffers}
            scale = ", ".join(f"{s:g}" for s in sorted(scales)) if scales else ""
            table.add_row(Text(type(group.method).__name__), Text(group.on), str(len(group.parts)), f"{count:,}", scale)
        yield table
        yield Text(
            f"{self.trainable:,} trainable parameters, {self.share:.2%} of the model; {size_of(self.saved_bytes)} when saved"
        )
        for group in adapter.groups_:
            if group.skipped:
                name, reason = group.skipped[0]
                more = f" and {len(group.skipped) - 1} more" if len(group.skipped) > 1 else ""
                yield Text(f"{type(group.method).__name__} skipped {name}{more}: {reason}", style="dim")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def size_of(count: float) -> str:
    """A number of bytes as a person reads it: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _is_ours(name: str) -> bool:
    return CONTAINER in name.split(".")


# --- adapt ---


def adapt(
    model: nn.Module,
    recipe: Method | Mapping[Any, Method | None],
    on: Any = None,
    name: str = "default",
) -> Adapter:
    """Put methods on sites of a model and make the new adapter the active one, alone.

    The model stays the same object of the same type; its parameters stop requiring gradients until the last adapter is
    detached. Everything is checked first: `adapt` does all of it or raises and changes nothing.

    Args:
        model: any PyTorch model, or a part of one.
        recipe: a method, or a mapping from selections to methods; `"head": None` leaves a task head alone.
        on: the selection for a single method; by default the placement that the method was published with.
        name: the adapter's name on this model: letters, digits, "_" and "-".

    Raises:
        AttunementError: a selection that matches nothing, a site that cannot be taken, a name in use or unsafe, a model
            that PEFT has adapted, a patched forward, a hidden weight.
    """
    check_name(model, name)
    structure = anatomy(model)
    return attach(build(model, chosen(structure, recipe, on), name))


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
    for path, module in model.named_modules():
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


def chosen(structure: Anatomy, recipe: Any, on: Any) -> list[Group]:
    """The methods of a recipe with the sites that their selections give."""
    if isinstance(recipe, Method):
        pairs: list[tuple[Any, Any]] = [(on, recipe)]
    elif isinstance(recipe, Mapping) and recipe:
        if on is not None:
            raise AttunementError("adapt: `on` goes with a single method; a mapping has its selections as keys")
        pairs = list(recipe.items())
    else:
        raise AttunementError(f"adapt: expected a method or a mapping of selections to methods, got {recipe!r}")
    for selection, method in pairs:
        if not (isinstance(method, Method) or (method is None and selection == "head")):
            raise AttunementError(f"adapt: {selection!r} must have a method such as LoRA(rank=8), got {method!r}")
    heads = {} if any(_names_head(selection) for selection, _ in pairs) else {p.name: p for p in structure.task_heads}
    groups = [_group(structure, selection, method, heads) for selection, method in pairs if method is not None]
    taken = {site.name for group in groups if group.method.acts_on == "parameter" for site in group.sites}
    if left := [place for name, place in heads.items() if name not in taken]:
        groups.append(_group(structure, "head", method_named("train")(), {}, left))
    _refuse_twice(groups)
    return groups


def _names_head(selection: Any) -> bool:
    return isinstance(selection, str) and re.search(r"(^|[^A-Za-z0-9_])head($|[^A-Za-z0-9_])", selection) is not None


def _group(
    structure: Anatomy, selection: Any, method: Method, heads: Mapping[str, Place], places: list[Place] | None = None
) -> Group:
    word = selection.strip() if isinstance(selection, str) else ""
    explicit = selection is not None and word != "*" and not word.startswith("type:")
    selection = method.placement if selection is None else selection
    places = [p for p in select(structure, selection) if not _is_ours(p.name)] if places is None else places
    group = Group(method, selection if isinstance(selection, str) else getattr(selection, "__name__", "predicate"), [])
    inside = tuple(f"{name}." for name in heads)
    for place in places:
        for site in sites_of(structure, method, place):
            if isinstance(site, Site):
                if not explicit and (site.name in heads or (inside and site.name.startswith(inside))):
                    continue  # a task head is trained as a whole
                reason = method.refuse(site) or passed_over(structure.model, method, site)
                if reason is None:
                    group.sites.append(site)
                    continue
                where, filtered = site.key, method.acts_on == "parameter"
            else:
                where, reason, filtered = *site, False
            if explicit and not filtered:
                raise AttunementError(f"adapt: {type(method).__name__} cannot act on {where}: {reason}")
            group.skipped.append((where, reason))
    unique = {(id(site.module), site.slot): site for site in group.sites}
    group.sites = list(unique.values())
    if not group.sites:
        why = f"; {group.skipped[0][0]}: {group.skipped[0][1]}" if group.skipped else ""
        raise AttunementError(f"adapt: {type(method).__name__} has no site that it can act on in {group.on!r}{why}")
    return group


def _refuse_twice(groups: Sequence[Group]) -> None:
    seen: dict[tuple[type, str], str] = {}
    for group in groups:
        for site in group.sites:
            before = seen.setdefault((type(group.method), site.key), group.on)
            if before != group.on:
                raise AttunementError(
                    f"adapt: {site.key} is selected twice for {type(group.method).__name__}, by {before!r} and {group.on!r}"
                )


def sites_of(structure: Anatomy, method: Method, place: Place) -> Iterator[Site | tuple[str, str]]:
    """The sites that a place offers to a method, or (where, why not)."""
    where = place.name or type(place.module).__name__
    if method.acts_on == "parameter":
        yield from _parameter_sites(place)
    elif method.acts_on == "output":
        yield output_site(method, place)
    else:
        inner = place.members or (_matrices_under(structure, place) if _is_container(place) else ())
        if not inner:
            made = _matrix_site(method, place)
            yield made if isinstance(made, Site) else (where, made)
        for member in inner:
            made = _matrix_site(method, member)
            if isinstance(made, Site):
                yield made


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_container(place: Place) -> bool:
    return place.parameter is None and "weight" not in place.module._parameters and bool(place.module._modules)


def _matrices_under(structure: Anatomy, place: Place) -> list[Place]:
    prefix = f"{place.name}." if place.name else ""
    return [
        p
        for p in structure.places
        if p.name.startswith(prefix)
        and p.view is None
        and not p.members
        and (p.parameter or "weight" in p.module._parameters)
    ]


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


def _matrix_site(method: Method, place: Place) -> Site | str:
    parameter = place.parameter or "weight"
    layout = layout_of(place.module, parameter, place.transposed)
    if isinstance(layout, str):
        return layout
    site = Site(place, parameter, layout, place.view)
    if site.inputs == 1 and not hasattr(method, "output") and layout.matrix is not OPAQUE.matrix:
        return "a norm's weight is a vector"
    if layout.beside_only and not is_additive(method) and not hasattr(method, "output"):
        return "the base is quantised, which only additive changes can run beside"
    if hasattr(method, "bias") and not site.called and site.bias not in place.module._parameters:
        return f"{type(place.module).__name__} has no {site.bias!r} to go with its {parameter!r}"
    return site


def output_site(method: Method, place: Place) -> Site | tuple[str, str]:
    """The output of a module as a site, or (where, why not)."""
    module = place.module
    where = place.name or type(module).__name__
    if place.view is not None:
        return where, "only the whole output of a fused matrix is a site; select that"
    if isinstance(module, nn.Embedding) and (hasattr(method, "input") or method.reads_input()):
        return where, "what enters an Embedding are ids"
    if isinstance(module, _CONVOLUTIONS) and method.reads_input():
        return where, "what enters a convolution has other positions than what leaves it"
    if hasattr(method, "input") and place.entry not in (None, module):
        return where, "what enters this sublayer enters several modules; select one of them"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return where, f"a {type(module).__name__} runs or lists its children; choose its last module"
    if place.parameter is not None and place.parameter != "weight":
        return where, f"{place.parameter} is read by its module, not called: there is no output of its own"
    layout = layout_of(module, "weight")
    site = Site(place, None, OPAQUE if isinstance(layout, str) else layout)
    if not site.called or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return where, "MultiheadAttention reads this weight and never calls the module: it has no output of its own"
    matrix = None if isinstance(layout, str) else layout.size(module, "weight")
    if matrix is not None:
        site.outputs, site.inputs = matrix[-2], matrix[-1] if matrix[-1] > 1 else matrix[-2]
        site.inputs = getattr(module, "in_channels", site.inputs)
    else:
        widths = [p.shape[-1] for p in module.parameters() if p.dim() >= 2]
        if not widths:
            return where, f"the width of what {type(module).__name__} gives is not known"
        site.outputs = site.inputs = widths[0]
    if place.entry is not None:
        entry = layout_of(place.entry, "weight")
        if not isinstance(entry, str):
            site.inputs = entry.size(place.entry, "weight")[-1]
    return site


def _parameter_sites(place: Place) -> Iterator[Site | tuple[str, str]]:
    if place.view is not None:
        yield place.name, "only whole parameters are trained; select the fused matrix"
        return
    owners = [place]
    if place.parameter is None:
        within = list({id(m.module): m for m in place.members}.values()) or [place]
        owners = [
            Place(name=name, module=module, role=one.role, block=one.block, stack=one.stack)
            for one in within
            for name, module in one.module.named_modules(prefix=one.name)
            if not _is_ours(name)
        ]
    for owner in owners:
        names = [place.parameter] if place.parameter is not None else list(owner.module._parameters)
        for name in names:
            value = owner.module._parameters[name]
            if value is None:
                continue
            if isinstance(owner.module, nn.RNNBase):
                yield (
                    f"{owner.name}.{name}",
                    f"{type(owner.module).__name__} hides its weights in flat copies that its forward reads",
                )
            elif not value.is_floating_point():
                yield f"{owner.name}.{name}", "its values are quantised"
            else:
                yield Site(owner, name, PLAIN)


def build(model: nn.Module, groups: list[Group], name: str) -> Adapter:
    """An adapter with its tensors, not yet on the model: nothing has changed."""
    for group in groups:
        for site in group.sites:
            for module in filter(None, (site.module, site.place.entry)):
                if (sealed := sealed_forward(module)) is not None:
                    raise AttunementError(f"adapt: {site.name}: {sealed}")
                if any(type(p) is not nn.Parameter and hasattr(p, "placements") for p in module._parameters.values()):
                    raise AttunementError(f"adapt: {site.name} is sharded already; adapt before fully_shard")
        shared = tagged(group.method.shared(group.sites))
        if shared:
            first = group.sites[0]
            group.shared = Holder(_placed(shared, first))
            group.shared_kinds = {word: kind for word, (kind, _) in shared.items()}
        for site in group.sites:
            group.parts.append(Part(group.method, site, _initial(group.method, site), group.shared))
    adapter = Adapter(name, model, groups)
    seen: dict[str, int] = {}
    for part in adapter.parts:
        seen[part.key] = count = seen.get(part.key, 0) + 1
        if count > 1:
            part.key, part.slot = f"{part.key}~{count}", f"{part.slot}~{count}"
    _share_tied(model, adapter)
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


def _share_tied(model: nn.Module, adapter: Adapter) -> None:
    """A parameter that a method replaces stays tied: every module that owns it reads the same holder."""
    parts = [part for part in adapter.parts if part.method.acts_on == "parameter"]
    if not parts:
        return
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    taken: set[int] = set()
    for part in parts:
        own = part.site.module._parameters[part.site.parameter or ""]
        others = [(m, n) for m, n in owners[id(own)] if m is not part.site.module]
        if id(own) in taken:
            raise AttunementError(f"adapt: {part.key} is tied to a parameter that is selected too; select one of them")
        taken.add(id(own))
        if odd := [n for _, n in others if n != part.site.parameter]:
            raise AttunementError(
                f"adapt: {part.key} is tied to a parameter of another name, {odd[0]!r}; untie them first"
            )
        part.twins = tuple(m for m, _ in others)


def _initial(method: Method, site: Site) -> dict[str, Tagged]:
    if not site.batch:
        return _placed(tagged(method.tensors(site)), site)
    count = 1
    for size in site.batch:
        count *= size
    each = [tagged(method.tensors(site.single(index))) for index in range(count)]
    stacked = {
        name: Tagged(kind, torch.stack([one[name].value for one in each])) for name, (kind, _) in each[0].items()
    }
    return _placed(stacked, site)


def _placed(tensors: Mapping[str, Tagged], site: Site) -> dict[str, Tagged]:
    """On the device of the site, float64 over a float64 base, float32 otherwise."""
    near = site.module._parameters.get(site.parameter or "weight")
    near = next(site.module.parameters(), None) if near is None else near
    if near is None:
        return dict(tensors)
    hook = site.module.__dict__.get("_hf_hook")  # offloaded weights rest on "meta" and come to this device to run
    device = getattr(hook, "execution_device", None) if near.is_meta and hook is not None else near.device
    dtype = working_dtype(near)
    placed = {}
    for name, (kind, value) in tensors.items():
        wanted = dtype if value.is_floating_point() else value.dtype
        fits = value.dtype is wanted and value.device == device and not value.requires_grad
        placed[name] = Tagged(kind, value if fits else value.detach().to(device, wanted))
    return placed


# --- the active set ---


def use(model: nn.Module, active: Active) -> None:
    """Make a name, `None` (the bare base) or a composition the active set.

    Raises:
        AttunementError: for a name that this model does not have, with the nearest one.
    """
    bench_of(model).use(active)


@contextlib.contextmanager
def using(model: nn.Module, active: Active) -> Iterator[None]:
    """The active set within a `with` block; the one before it comes back afterwards."""
    bench = bench_of(model)
    before = bench.active
    bench.switch(active)
    try:
        yield
    finally:
        bench.switch(before)
        if not torch.is_grad_enabled():  # no backward pass will come for what ran in the block
            bench.mark()


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name, in the order they came."""
    bench = model.__dict__.get("_attuned_bench")
    return dict(bench.adapters) if bench is not None else {}


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off a model, or all of them. After the last one the model is what it was before the first.

    An adapter merged with a copy is unmerged first; one merged with `keep=False` leaves its change in the weights.
    """
    bench = bench_of(model)
    names = list(reversed(bench.adapters)) if name is None else [name]
    for one in names:
        checked(one, bench.adapters)
        adapter = bench.adapters[one]
        if adapter.merged and all(kept for *_, kept in adapter._merged or ()):
            adapter.unmerge()
        bench.remove(adapter)
