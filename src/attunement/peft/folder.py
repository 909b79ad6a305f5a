"""A folder that PEFT wrote, or can read: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.anatomy import CONTAINER, anatomy
from attunement.errors import AttunementError, nearest
from attunement.method import Method
from attunement.methods.selective.train import Train
from attunement.peft.format import Format, own
from attunement.peft.formats import FORMATS, KINDS, LAYERS, LN_TUNING
from attunement.peft.lora import LORA
from attunement.peft.prompts import PROMPTS
from attunement.peft.prompts import read as read_prompts
from attunement.peft.prompts import write as write_prompts
from attunement.peft.tokens import BESIDE, ENDING, FIELDS, TRAINABLE_TOKENS, read_rows, write_rows
from attunement.site import owners_of
from attunement.site import whole as gathered

if TYPE_CHECKING:
    from attunement.adapter import Adapter
    from attunement.part import Part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# fields that say where the adapter stands (its tensors say it too), how it started, or what the file is
PASSED_OVER = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
    ),
    *("bias", "init_weights", "init_ia3_weights", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
    "ensure_weight_tying",
}
BESIDE_ITSELF = (".original_module", ".modules_to_save")  # `bias="all"` writes biases of whole modules a second time


# --- reading ---


def load(model: nn.Module, path: str | PathLike[str], name: str = "default", trainable: bool = False) -> Adapter:
    """Put an adapter that PEFT saved on a model; `name` is its name there.

    Raises:
        AttunementError: for a PEFT type or an option without a counterpart here, for modules that the model does not
            have, and for tensors that do not fit.
    """
    from attunement.adapting import attach, build, check_name
    from attunement.choosing import chosen

    check_name(model, name)
    recipe, tensors = read(path, model)
    adapter = build(model, chosen(anatomy(model), recipe, None), name)
    tensors = _placed(adapter, tensors)
    state = adapter.state()
    if unknown := sorted(tensors.keys() - state.keys()):
        raise AttunementError(f"peft: {unknown[0]!r} in {path} has no place in this model")
    if missing := sorted(dict(adapter.named_parameters()).keys() - tensors.keys()):
        raise AttunementError(f"peft: {path} has nothing for {missing[0]!r}")
    adapter.load_state({**state, **tensors})  # the file has no scales: they follow from its configuration
    adapter._trainable = trainable
    return attach(adapter)


def _placed(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have here: of a module's output, or shared where the file has them at each module."""
    found = dict(tensors)
    for part in adapter.parts:
        format, start = FORMATS.get(type(part.method)), f"{part.site.name}.weight."
        if format is None or (format.tied is None and part.site.parameter is not None):
            continue
        for key in [key for key in tensors if key.startswith(start)]:
            name = key.removeprefix(start)
            shared = None if format.tied is None else format.tied(part, name)
            found[f"{part.key}.{name}" if shared is None else f"shared.0.{shared}"] = found.pop(key)
    return found


def read(path: str | PathLike[str], model: nn.Module) -> tuple[dict[str, Method | None], dict[str, Tensor]]:
    """A PEFT folder as a recipe for `adapt`, and tensors by the names that `Adapter.load_state` takes."""
    from attunement import storage

    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise AttunementError(f"peft: {str(folder / CONFIG)!r} cannot be read: {error}") from None
    kind, kinds = config.get("peft_type"), (*KINDS, *PROMPTS)
    if kind not in kinds:
        raise AttunementError(
            f"peft: {folder} holds {kind!r}; this library reads {', '.join(kinds)}{nearest(str(kind), kinds)}"
        )
    if kind in PROMPTS:
        return read_prompts(config, storage.read(folder / WEIGHTS)[0], model)
    format = KINDS[kind]
    known = PASSED_OVER | FIELDS | (format.fields if format is not None else set())
    if other := sorted(field for field, value in config.items() if value and field not in known):
        raise AttunementError(f"peft: {folder} uses {other[0]}={config[other[0]]!r}, which has no counterpart here")
    if not (folder / WEIGHTS).exists():
        raise AttunementError(f"peft: {folder} has no {WEIGHTS}; a pickled adapter_model.bin is not read")
    contents, _ = storage.read(folder / WEIGHTS)
    shared = format.shared if format is not None else {}
    stored = format is not None and format.stored(config)
    if stored and not contents.keys() >= shared.keys():
        raise AttunementError(f"peft: {folder} has no {', '.join(sorted(shared.keys() - contents.keys()))}")
    modules = _modules(model)
    numbered = format.numbered if format is not None else {}
    stacks: dict[str, dict[int, Tensor]] = {}
    pools: dict[str, dict[str, Tensor]] = {}
    adapted: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in contents.items():
        if key in shared:
            if stored:
                state[f"shared.0.{shared[key]}"] = tensor  # the format's method is the first of the recipe below
            continue
        if format is not None and key.endswith(format.repeated):
            continue
        if number := next((key.removeprefix(word) for word in numbered if key.startswith(word)), None):
            stacks.setdefault(numbered[key.removesuffix(number)], {})[int(number)] = tensor
            continue
        kept, _, word = key.removeprefix("base_model.").partition(".")
        if format is not None and format.category is not None and kept in format.suffixes:
            pools.setdefault(word, {})[kept] = tensor
            continue
        key = key.removeprefix(PREFIX)
        if any(f"{word}." in key for word in BESIDE_ITSELF):
            continue
        if key.endswith(ENDING):
            rows[key.removesuffix(ENDING).removesuffix(BESIDE)] = tensor
            continue
        suffix = next((suffix for suffix in (format.suffixes if format else ()) if key.endswith(f".{suffix}")), None)
        if suffix is not None:
            adapted.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = tensor
            continue
        module, _, parameter = key.rpartition(".")
        copied = module.endswith(".base_layer") and parameter == "weight"  # PEFT writes targeted embeddings along
        module = module.removesuffix(".base_layer").removesuffix(".ln_tuning_layers")
        if (copied or parameter in getattr(modules.get(module), "_buffers", {})) and module in modules:
            if not torch.equal(own(modules[module], parameter).to("cpu", tensor.dtype), tensor):
                raise AttunementError(
                    f"peft: {module}.{parameter} was changed with the adapter, and is not trained here"
                )
            continue
        trained.setdefault(module, {})[parameter] = tensor
    _untwinned(model, trained)
    state.update({f"shared.0.{ours}": torch.stack([rows[i] for i in sorted(rows)]) for ours, rows in stacks.items()})
    if shared and not adapted:  # all that the file has is shared: where it goes is in the configuration alone
        adapted = {name: {} for name in _targeted(config, modules)}
    if missing := sorted((adapted.keys() | trained.keys() | rows.keys()) - modules.keys()):
        raise AttunementError(f"peft: this model has no module {missing[0]!r}{nearest(missing[0], modules)}")
    places: dict[Method, list[str]] = {}
    for module, tensors in adapted.items():
        assert format is not None
        if (layer := type(modules[module]).__name__) in LAYERS - set(format.layers):
            raise AttunementError(f"peft: {module} is a {layer}, on which {kind} in PEFT has no counterpart here")
        if getattr(modules[module], "groups", 1) != 1:
            raise AttunementError(f"peft: {module} is a grouped convolution, whose adapter in PEFT spans the groups")
        tensors = {**tensors, **(pools.get(format.category(module), {}) if format.category is not None else {})}
        try:
            method, values = format.read(config, module, modules[module], tensors)
        except KeyError as error:
            raise AttunementError(f"peft: {module} has {', '.join(sorted(tensors))} but no {error}") from None
        places.setdefault(method, []).append(module)
        state.update({f"{module}.weight.{name}": value for name, value in values.items()})
    for module, tensors in trained.items():
        if other := sorted(tensors.keys() - modules[module]._parameters.keys()):
            raise AttunementError(
                f"peft: {module}.{other[0]} is saved but is no parameter, and only parameters are trained"
            )
        only: Any = next(iter(tensors)) if len(tensors) == 1 and tensors.keys() <= {"weight", "bias"} else "all"
        places.setdefault(Train(only=only), []).append(module)
        state.update({f"{module}.{parameter}.copy": value for parameter, value in tensors.items()})
    for module, chosen in read_rows(config, rows, modules).items():
        places.setdefault(chosen, []).append(module)
        state[f"{module}.weight.copy"] = rows[module]
    if not places:
        raise AttunementError(f"peft: {folder / WEIGHTS} holds no adapter tensors")
    recipe: dict[str, Method | None] = {_selection(method, names, modules): method for method, names in places.items()}
    return {**recipe, "head": None}, state  # a head that the file does not have stays as it is


def _untwinned(model: nn.Module, trained: dict[str, dict[str, Tensor]]) -> None:
    """Keep one of the modules that share a parameter: PEFT trains a copy of each, which here is one if they are equal."""
    for owners in owners_of(model).values():
        found = [(path, name) for path, _, name in owners if name in trained.get(path, {})]
        if len(owners) == 1 or not found:
            continue
        (path, name), *others = found
        for other, _, word in owners:
            if (other, word) not in found or not torch.equal(trained[other][word], trained[path][name]):
                raise AttunementError(
                    f"peft: the file trains {path}.{name} apart from {other}.{word}, to which this model ties it; "
                    "untie them first"
                )
        for other, word in others:
            del trained[other][word]
            if not trained[other]:
                del trained[other]


# --- writing ---


def save(adapter: Adapter, path: str | PathLike[str]) -> None:
    """Write an adapter in PEFT's format, without learning-rate factors and penalties, which it does not have.

    Raises:
        AttunementError: for several methods at once, a method or a layer that PEFT does not know, rows of a fused
            matrix, parts of a module trained.
    """
    from attunement.storage import write_atomically

    config, tensors = written(adapter)
    text = json.dumps(config, indent=2, sort_keys=True)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_atomically(Path(path), contiguous, {"format": "pt"}, {CONFIG: text}, WEIGHTS)


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter as PEFT has them."""
    base = {"base_model_name_or_path": _base_name(adapter.model)}
    if (prompts := write_prompts(adapter)) is not None:
        return base | prompts[0], prompts[1]
    state = adapter.state()
    modules = _modules(adapter.model)
    parts = {part.site.name: part for part in adapter.parts if not isinstance(part.method, Train)}
    in_rows = [part for part in adapter.parts if isinstance(part.method, Train) and part.method.rows is not None]
    trained = [part for part in adapter.parts if isinstance(part.method, Train) and part.method.rows is None]
    tensors: dict[str, Tensor] = {}
    kinds = {FORMATS.get(type(part.method)) for part in parts.values()}
    types = sorted({type(part.method).__name__ for part in parts.values()})
    if len(types) > 1:
        raise AttunementError(f"peft: PEFT keeps one method per adapter, this one has {' and '.join(types)}")
    names = {module: name for name, module in modules.items()}
    saved = [(part, [part.site.name, *(names[twin] for twin in part.twins if twin in names)]) for part in trained]
    whole = _whole_modules(saved, modules)
    config: dict[str, Any] = {**base, "task_type": None}
    if types:
        (format,) = kinds
        if format is None:
            known = sorted({method.__name__ for method in FORMATS})
            raise AttunementError(f"peft: PEFT has no {types[0]}; it has {', '.join(known)} and whole modules")
        if both := sorted(parts.keys() & (whole | {part.site.name for part in in_rows})):
            how = "whole" if both[0] in whole else "in rows"
            raise AttunementError(
                f"peft: {both[0]} is trained {how} and adapted by {types[0]}; PEFT has one or the other"
            )
        for name, part in parts.items():
            _check(part, format)
            mine = {key.rpartition(".")[2]: value for key, value in state.items() if key.rpartition(".")[0] == part.key}
            made = format.write(part, mine)
            for suffix, value in made.items():
                whole_name = format.category is not None and suffix.endswith(f".{format.category(name)}")
                tensors[f"base_model.{suffix}" if whole_name else f"{PREFIX}{name}.{suffix}"] = value
        config |= {"peft_type": format.kind, "target_modules": _targets(parts, modules), **format.config(parts)}
        if format.tied is not None and format.category is None and isinstance(config["target_modules"], str):
            raise AttunementError(
                f"peft: PEFT's {types[0]} shares by the last word of a module's name, by which these cannot be selected"
            )
        if format.shared and format.stored(config):
            first = next(iter(parts.values()))
            tensors.update({theirs: gathered(first.tensor(ours)) for theirs, ours in format.shared.items()})
        for theirs, ours in format.numbered.items():
            stack = gathered(next(iter(parts.values())).tensor(ours))
            tensors.update({f"{theirs}{number}": row for number, row in enumerate(stack)})
        config |= {"modules_to_save": sorted(whole) or None}
        marker = ""
    elif in_rows:
        if trained:
            raise AttunementError(
                f"peft: PEFT trains rows beside a LoRA or alone, and {trained[0].site.key} is trained too"
            )
        embeddings = [part.site.name for part in in_rows]
        config |= {"peft_type": TRAINABLE_TOKENS, "target_modules": _targets(embeddings, modules)}
        marker = ""
    else:
        norms = {part.site.name for part in trained if part.site.role == "norm"}
        if not norms:
            raise AttunementError(
                "peft: PEFT saves whole modules only beside a method or tuned norms; this adapter has neither"
            )
        rest = sorted(set(whole) - norms)
        config |= {"peft_type": LN_TUNING, "target_modules": _targets(norms, modules), "modules_to_save": rest or None}
        marker = ".ln_tuning_layers"
    if in_rows:
        if types and config["peft_type"] != LORA.kind:
            raise AttunementError(
                f"peft: {in_rows[0].site.key} is trained in some rows, which PEFT has beside LoRA and not {types[0]}"
            )
        ties = bool(getattr(getattr(adapter.model, "config", None), "tie_word_embeddings", False))
        said, found = write_rows(in_rows, bool(types), ties)
        config |= said
        tensors.update({f"{PREFIX}{name}": value for name, value in found.items()})
    if config["peft_type"] == LORA.kind and any(_is_tied_head(adapter.model, part) for part in trained):
        config["ensure_weight_tying"] = True  # it then trains them as one; other types have copies of equal values
    for part, owners in saved:
        inner = marker if part.site.role == "norm" else ""
        for owner in owners:
            module, prefix = modules[owner], f"{PREFIX}{owner}{inner}"
            copy = state[f"{part.key}.copy"]
            tensors[f"{prefix}.{part.site.parameter}"] = copy if owner == owners[0] else copy.clone()
            for name in module._buffers.keys() - module._non_persistent_buffers_set:  # a module's whole state
                tensors[f"{prefix}.{name}"] = own(module, name)
    return config, tensors


def _is_tied_head(model: nn.Module, part: Part) -> bool:
    """Whether PEFT can tie the modules of a trained parameter: to the input embedding, and what is linear alone."""
    if not part.twins or not hasattr(model, "get_input_embeddings"):
        return False
    first, owners = model.get_input_embeddings(), (part.site.module, *part.twins)  # type: ignore[operator]
    return first in owners and all(one is first or isinstance(one, nn.Linear) for one in owners)


def _check(part: Part, format: Format) -> None:
    site, what = part.site, type(part.method).__name__
    layer = type(site.module).__name__
    if site.view is not None or site.parameter not in (None, "weight") or site.batch:
        raise AttunementError(f"peft: {site.key} is a part of a fused or stacked weight; PEFT adapts whole layers")
    if layer not in format.layers:
        raise AttunementError(
            f"peft: PEFT has no {what} for {layer} ({site.name}), only for {', '.join(format.layers)}"
        )
    if getattr(site.module, "groups", 1) != 1:
        raise AttunementError(f"peft: {site.name} is a grouped convolution, whose adapter in PEFT spans the groups")


def _whole_modules(saved: Iterable[tuple[Part, list[str]]], modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules that are trained in every parameter, theirs and of what is inside: PEFT saves no less."""
    found: dict[str, set[str]] = {}
    for part, owners in saved:
        for name in owners:
            found.setdefault(name, set()).add(str(part.site.parameter))
    for name, parameters in found.items():
        named = {key for key, value in modules[name]._parameters.items() if value is not None}
        if left := sorted(named - parameters):
            raise AttunementError(f"peft: {name} is trained without its {left[0]}; PEFT saves whole modules")
        inside = {other: module._parameters for other, module in modules.items() if other.startswith(f"{name}.")}
        if left := [o for o, own in inside.items() if o not in found and any(p is not None for p in own.values())]:
            raise AttunementError(f"peft: {name} is trained without {left[0]} inside it; PEFT saves whole modules")
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


# --- names ---


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by name, without what adapters keep inside them."""
    return {name: module for name, module in model.named_modules() if f".{CONTAINER}" not in f".{name}"}


def _targeted(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that `target_modules` means, as PEFT reads it."""
    if other := next((field for field in ("exclude_modules", "layers_to_transform") if config.get(field)), None):
        raise AttunementError(
            f"peft: the file has no tensor of a module, and {other}={config[other]!r} is not read here"
        )
    wanted = config.get("target_modules") or ()
    if isinstance(wanted, str):
        return [name for name in modules if re.fullmatch(wanted, name)]
    return [name for name in modules if name in wanted or name.endswith(tuple(f".{word}" for word in wanted))]


def _ends(names: Collection[str], modules: Mapping[str, nn.Module]) -> list[str] | None:
    """The last words of module names, where they select these modules and no others."""
    last = {name.rpartition(".")[2] for name in names}
    return sorted(last) if {name for name in modules if name.rpartition(".")[2] in last} == set(names) else None


def _targets(names: Collection[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """`target_modules`: the short list that servers expect where it is exact, else a regular expression."""
    return _ends(names, modules) or "|".join(map(re.escape, sorted(names)))


def _selection(method: Method, names: Collection[str], modules: Mapping[str, nn.Module]) -> str:
    if not isinstance(method, Train) and (ends := _ends(names, modules)) is not None:
        return rf"re:(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})"
    # in other brackets than the former: a recipe may train biases of the very modules that a method adapts
    return f"re:({'|'.join(map(re.escape, sorted(names)))})"


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
