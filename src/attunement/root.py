"""What the root of an adapted model has besides: its adapters, the active set, and the entrances that must know of them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.anatomy import CONTAINER, walk
from attunement.attach import exchange, restore
from attunement.attention import attention_extras
from attunement.compose import Active, Rows, checked, names_in
from attunement.course import Course
from attunement.errors import AttunementError
from attunement.part import Part
from attunement.plan import Acting
from attunement.rows import RowsElsewhere, RowsPlan, generate_rows, rows_plan_of, run_rows

if TYPE_CHECKING:
    from attunement.adapter import Adapter


class Bench:
    """The adapters of one model and which of them are active.

    Attributes:
        adapters: by name.
        active: the active set as `use` was given it.
        rows: how many rows the active set serves, 0 where it does not distinguish rows.
        applied: the active set whose plans are in place, `Rows` drawn to its top.
        repeat: how many copies of each row come, while `generate` expands beams or samples.
        generating: whether `generate` is under way, which can begin again where a site cannot tell rows apart.
        course: what plans have to know of the forward under way.
        frozen: whether each of the base's parameters required a gradient before the first adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.active: Active = None
        self.applied: Active = None
        self.rows, self.repeat = 0, 1
        self.generating = False
        self.course = Course(self)
        self.elsewhere = False  # a plan says so from the start
        self.one_by_one = False  # a site cannot tell rows apart: the model runs once per distinct adapter
        self.hooks: dict[str, list[Any]] = {}
        self.tapped: list[Part] = []  # the parts that hold an x between two modules
        self.frozen: dict[str, bool] = {}
        self.layers: list[nn.Module] = []  # which may recompute their activations

    # --- adapters come and go ---

    def add(self, adapter: Adapter) -> None:
        name = adapter.name
        if not self.adapters:
            words = ("gradient_checkpointing", "_gradient_checkpointing_func")
            self.layers = [module for module in self.model.modules() if any(hasattr(module, word) for word in words)]
            for path, module in walk(self.model):
                for word, parameter in module._parameters.items():
                    if parameter is not None:
                        self.frozen.setdefault(f"{path}.{word}" if path else word, parameter.requires_grad)
            for parameter in self.model.parameters():  # after all were asked: a tied one stands under several names
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
        for number, group in enumerate(adapter.groups_):
            if group.shared is not None:  # a Sequential or a list would run or count it
                listing = isinstance(self.model, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
                owner = group.sites[0].module if listing else self.model
                container(owner, name)._modules[f"shared-{number}"] = group.shared
        for part in adapter.parts:
            for module, does in part.acts():
                exchange(module, *([attention_extras] if does == "attend" else []))
            container(part.site.module, name)._modules[part.slot] = part.holder
        self.hooks[name] = [layer.register_forward_hook(_nothing) for layer in self._fast_layers(adapter)]
        self.adapters[name] = adapter

    def remove(self, adapter: Adapter) -> None:
        name = adapter.name
        del self.adapters[name]
        for hook in self.hooks.pop(name):
            hook.remove()
        if name in set(names_in(self.active)):
            self.active = None
        touched = [self.model, *modules_of(adapter)]
        for module in touched:
            held = module._modules.get(CONTAINER)
            if held is not None:
                held._modules.pop(_safe(name), None)
                if not held._modules:
                    del module._modules[CONTAINER]
        if self.adapters:
            busy = {id(m) for a in self.adapters.values() for m in modules_of(a)} | {id(self.model)}
            for module in touched:
                if id(module) not in busy:
                    restore(module)
            self.use(self.active)
            return
        for module in self.model.modules():
            if isinstance(kept := module.__dict__.get("_gradient_checkpointing_func"), Recompute):
                module._gradient_checkpointing_func = kept.checkpoint  # type: ignore[assignment]
        for module in touched:
            restore(module)
        del self.model.__dict__["_attuned_bench"]
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.frozen.get(parameter_name, True))

    def watch_recomputation(self) -> None:
        """Let every layer that recomputes its activations do so under the active set of its forward."""
        for module in self.layers:
            kept = module.__dict__.get("_gradient_checkpointing_func")
            if kept is not None and not isinstance(kept, Recompute):
                module._gradient_checkpointing_func = Recompute(kept, self)  # type: ignore[assignment]

    def _fast_layers(self, adapter: Adapter) -> Iterator[nn.Module]:
        """Encoder layers that would read weights past an adapted output; a hook legally turns that path off."""
        seen: set[int] = set()
        for part in adapter.parts:
            if part.form not in ("output", "input"):
                continue
            module = self.model
            for word in part.site.name.split(".") if part.site.name else []:
                if isinstance(module, nn.TransformerEncoderLayer) and id(module) not in seen:
                    seen.add(id(module))
                    yield module
                module = getattr(module, word)

    # --- the active set ---

    def use(self, active: Active) -> None:
        """Switch, and let exactly the active trainable adapters require gradients."""
        self.switch(active)
        self.mark()

    def switch(self, active: Active) -> None:
        """Switch; adapters that get active and are trainable require gradients from here on, others keep what they have.

        A backward pass may come after a `using` block has ended: its adapters must not stop requiring gradients.
        """
        tree = checked(active, self.adapters)
        self.watch_recomputation()  # which may have been enabled on a model that this one is a part of
        self.apply(tree)
        self.active = active
        self.one_by_one = bool(self.rows) and (
            self.elsewhere or any(getattr(m, "batch_first", True) is False for m in self.model.modules())
        )
        self.train(tree)

    def train(self, active: Active) -> None:
        """Let the trainable adapters of an active set require gradients, and leave others as they are."""
        for name in set(names_in(active)):
            if self.adapters[name].trainable:
                _require(self.adapters[name], True)

    def mark(self) -> None:
        """Require gradients of the adapters that are active and trainable, and of no other."""
        active = set(names_in(self.active))
        for name, adapter in self.adapters.items():
            _require(adapter, adapter.trainable and name in active)

    def apply(self, tree: Active) -> None:
        """Put the plans of an active set in place, all made before the first is exchanged."""
        plans = self.plans(tree)
        if not self.course.past:
            self.course.note(self.applied)
        self.elsewhere = any(isinstance(plan, RowsPlan) and plan.elsewhere for plan in plans.values())
        self.applied = tree
        self.rows = len(tree.items) if isinstance(tree, Rows) else 0
        self.tapped = [p for name in dict.fromkeys(names_in(tree)) for p in self.adapters[name].parts if p.taps]
        self.course.bench = self
        for module, plan in plans.items():
            object.__setattr__(module, "_attuned_plan", plan)
            object.__setattr__(module, "_attuned_course", self.course)
        self.course.note(tree)

    def plans(self, tree: Active) -> dict[nn.Module, Any]:
        """What each adapted module does under an active set."""
        modules: dict[int, nn.Module] = {}
        held: dict[int, dict[str, list[Acting]]] = {}
        for name, adapter in self.adapters.items():
            gone = {id(entry[0]) for entry in adapter._merged or ()}
            for part in adapter.parts:
                for module, does in part.acts():
                    modules[id(module)] = module
                    if id(part) not in gone:
                        held.setdefault(id(module), {}).setdefault(name, []).append((part, does))
        return {m: rows_plan_of(m, tree, held.get(i, {}), self.course) for i, m in modules.items()}

    def let_go(self) -> None:
        """Drop what taps still hold when a forward or a recomputation stopped half way."""
        for part in self.tapped:
            part.let_go()


def modules_of(adapter: Adapter) -> Iterator[nn.Module]:
    """Every module that an adapter touches."""
    for part in adapter.parts:
        yield part.site.module
        yield from (module for module, _ in part.acts())


def _require(adapter: Adapter, value: bool) -> None:
    for _, owner, _ in adapter.owners():
        wanted = value and not getattr(owner, "resting", False)
        for parameter in owner._parameters.values():
            if parameter is not None and parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)


def container(module: nn.Module, name: str) -> nn.Module:
    """The module under which an adapter's holders stand: two plain levels, since ModuleDict refuses some names."""
    if CONTAINER not in module._modules:
        if CONTAINER in module.__dict__ or hasattr(type(module), CONTAINER):
            raise AttunementError(f"adapt: {type(module).__name__} has an attribute {CONTAINER!r} of its own")
        module._modules[CONTAINER] = nn.Module()
    outer: nn.Module = module._modules[CONTAINER]  # type: ignore[assignment]
    if _safe(name) not in outer._modules:
        outer._modules[_safe(name)] = nn.Module()
    return outer._modules[_safe(name)]  # type: ignore[return-value]


_PLAIN = nn.Module()


@functools.cache
def _safe(name: str) -> str:
    """A child's name under which attribute access finds the child and not something of nn.Module."""
    return f"{name}~" if hasattr(_PLAIN, name) else name


def _nothing(*_: Any) -> None:
    return None


class Recompute:
    """A checkpoint function whose recomputation runs under the active set of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], bench: Bench) -> None:
        self.checkpoint, self.bench = checkpoint, bench

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bench = self.bench
        tree, batch = bench.applied, bench.course.batch
        if any(part.spans for part in bench.tapped):
            return function(*args, **kwargs)
        ran: list[bool] = []  # the first run is the forward's own, whose end lets go by itself

        def again(*inputs: Any, **options: Any) -> Any:
            if not ran:
                ran.append(True)
                return function(*inputs, **options)
            course, now = bench.course, bench.applied
            its, task = course.batch, course.task
            course.batch, course.task = batch, torch._C._current_graph_task_id()
            if other := now is not tree and now != tree:
                bench.apply(tree)
                bench.train(tree)
            try:
                return function(*inputs, **options)
            finally:
                bench.let_go()
                if other:
                    bench.apply(now)
                course.batch, course.task = its, task

        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant", False)
        if reentrant and torch.is_grad_enabled():
            args = _some_gradient(args)
        return self.checkpoint(again, *args, **kwargs)


def _some_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reentrant checkpointing gives no gradients unless an input requires one, and under a frozen base none does."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.requires_grad for t in tensors):
        return args
    first = next((t for t in tensors if t.is_floating_point()), None)
    if first is None:
        return args
    return tuple(first.detach().requires_grad_() if a is first else a for a in args)


def bench_of(model: nn.Module) -> Bench:
    """The bench of an adapted model; a sentence where there is none."""
    bench = model.__dict__.get("_attuned_bench")
    if bench is None:
        raise AttunementError(
            f"this {type(model).__name__} has no adapters; adapt or load one first, on this very module"
        )
    return bench  # type: ignore[no-any-return]


def root_extras(base: type, forward: Callable[..., Any]) -> dict[str, Any]:
    """What the class of a root has besides: each only where the base class has it."""

    @functools.wraps(forward)
    def root_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bench = getattr(self, "_attuned_bench", None)
        if bench is not None and torch.is_grad_enabled():
            bench.course.meet()
        if bench is None or not (bench.rows or bench.tapped):
            return forward(self, *args, **kwargs)
        try:
            return run_rows(bench, forward, args, kwargs) if bench.rows else forward(self, *args, **kwargs)
        finally:
            bench.let_go()

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "save_pretrained on an adapted model writes the base alone; save an adapter with adapter.save(folder)",
            stacklevel=2,
        )
        state = kwargs.pop("state_dict", None) or self.state_dict()
        kwargs["state_dict"] = {k: v for k, v in state.items() if f".{CONTAINER}." not in f".{k}"}
        return base.save_pretrained(self, *args, **kwargs)  # type: ignore[attr-defined]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        bench = self._attuned_bench
        if not all(part.caches for part in bench.tapped):
            kwargs["use_cache"] = False
        if not bench.rows:
            return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
        config = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        repeat = [kwargs.get(w, getattr(config, w, None)) or 1 for w in ("num_beams", "num_return_sequences")]
        if bench.one_by_one:
            return generate_rows(bench, base.generate, args, kwargs)  # type: ignore[attr-defined]
        bench.repeat, bench.generating = max(repeat), True
        try:
            return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
        except RowsElsewhere:
            bench.one_by_one = True
        finally:
            bench.repeat, bench.generating = 1, False
        return generate_rows(bench, base.generate, args, kwargs)  # type: ignore[attr-defined]

    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        base._set_gradient_checkpointing(self, *args, **kwargs)  # type: ignore[attr-defined]
        if self._attuned_bench is not None:
            self._attuned_bench.watch_recomputation()

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs.get("new_num_tokens"):
            return self.get_input_embeddings()
        raise AttunementError(
            "resize_token_embeddings: resize before adapting; an adapter keeps to the sizes it was made for"
        )

    def get_parameter(self: Any, target: str) -> Any:
        path, _, name = target.rpartition(".")
        held = self.get_submodule(path)._parameters.get(name)  # what reads as the adapted value is no parameter
        return base.get_parameter(self, target) if held is None else held  # type: ignore[attr-defined]

    extras = {
        "get_parameter": get_parameter,
        "save_pretrained": save_pretrained,
        "generate": generate,
        "_set_gradient_checkpointing": _set_gradient_checkpointing,
        "resize_token_embeddings": resize_token_embeddings,
    }
    kept: dict[str, Any] = {}
    for name, function in extras.items():
        if (own := getattr(base, name, None)) is not None:
            kept[name] = functools.wraps(own)(function)
    return {"forward": root_forward, **kept}
