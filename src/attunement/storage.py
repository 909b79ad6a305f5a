"""Adapters on disk: `adapter.safetensors` with the description in its header, and the same description as `adapter.json`.

The header is what `load` believes; replacing that one file is the moment at which a save has happened, so that a save
killed at any point leaves the previous adapter or the new one. Nothing is ever unpickled or executed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import StrictInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from attunement.adapter import Adapter
from attunement.adapting import attach, build, check_name
from attunement.anatomy import CONTAINER, Anatomy, Place, RowView, anatomy, walk
from attunement.choosing import passed_over, site_of
from attunement.errors import AttunementError, nearest, wanted
from attunement.fields import misfit
from attunement.method import Method, method_from
from attunement.part import Group
from attunement.site import Site, whole

if TYPE_CHECKING:
    from os import PathLike

TENSORS, DESCRIPTION, FORMAT = "adapter.safetensors", "adapter.json", 1
PEFT = "adapter_config.json"
_SAMPLES = 16


def save(adapter: Adapter, path: str | PathLike[str], format: str = "attunement") -> None:
    """Write an adapter to a folder; see `Adapter.save`.

    Raises:
        AttunementError: an unknown format, a path that is a file or holds an adapter in the other format, a metric that is
            no number, or what the format cannot express.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise AttunementError(f"save: {str(path)!r} is a file; an adapter is saved to a folder")
    other = {"attunement": PEFT, "peft": TENSORS}.get(format)
    if other is not None and (folder / other).exists():
        raise AttunementError(
            f"save: {str(path)!r} holds an adapter in the other format, in {other!r}; a folder holds one, so give another "
            "folder or take that one away"
        )
    if format == "peft":
        from attunement import peft

        peft.save(adapter, folder)
        return
    if format != "attunement":
        raise AttunementError(
            f"save: format must be 'attunement' or 'peft', got {format!r}{nearest(str(format), ('attunement', 'peft'))}"
        )
    text = json.dumps(describe(adapter), indent=1)
    tensors = {key: tensor.contiguous() for key, tensor in adapter.state().items()}
    if any(hasattr(p, "placements") for p in adapter.parameters()) and torch.distributed.get_rank() != 0:
        return  # every process took part in gathering the shards; one of them writes
    write_atomically(folder, tensors, {"attunement": text}, {DESCRIPTION: text}, TENSORS)


def write_atomically(
    folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], texts: Mapping[str, str], name: str
) -> None:
    """Write tensors and texts beside the folder, then move them into it: the tensors first, in one rename."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        save_file({k: v.to("cpu") for k, v in tensors.items()}, draft / name, metadata=metadata)
        for word, text in texts.items():
            (draft / word).write_text(text, encoding="utf-8")
        for file in draft.iterdir():
            _sync(file)
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():
                raise
            for word in (name, *texts):  # the adapter before stands there, or another process was faster
                os.replace(draft / word, folder / word)
        _sync(folder.parent)
    except OSError as error:
        raise AttunementError(f"save: {str(folder)!r} could not be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise AttunementError(f"save: {str(folder)!r} could not be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(adapter: Adapter) -> dict[str, Any]:
    """An adapter without its tensors, as plain data."""
    from attunement import __version__

    config = getattr(adapter.model, "config", None)
    paths = {module: path for path, module in adapter.model.named_modules()}
    origin = str(getattr(config, "_name_or_path", "") or "")
    local = os.path.isabs(origin) or Path(origin).is_dir()  # its name says what it is, its place nothing to others
    return {
        "format": FORMAT,
        "attunement": __version__,
        "name": adapter.name,
        "base": {"class": type(adapter.model).__name__, "id": Path(origin).name if local else origin},
        "methods": [
            {
                "method": group.method.describe(),
                "on": group.on,
                "sites": [
                    {
                        "name": site.name,
                        "parameter": site.parameter,
                        "role": site.role,
                        "block": site.block,
                        "stack": site.stack,
                        "view": site.view,
                        "transposed": site.place.transposed,
                        "entry": None if site.place.entry is None else paths[site.place.entry],
                    }
                    for site in (part.site for part in group.parts)
                ],
            }
            for group in adapter.groups_
        ],
        "fingerprint": fingerprint(adapter),
        "metrics": {name: _figure(name, value) for name, value in adapter.metrics.items()},
    }


def _figure(name: str, value: Any) -> Any:
    """A metric as JSON has it: a number of numpy or torch as a plain one."""
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):  # no such number, or several
        value = value.item()
    try:
        json.dumps({name: value})
    except (TypeError, ValueError):
        said = f"{type(value).__name__}{list(value.shape) if hasattr(value, 'shape') else ''}"
        raise AttunementError(f"save: adapter.metrics[{name!r}] must be a number, got {said}") from None
    return value


# --- which base an adapter belongs to ---


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """Size, precision and a few values of every touched weight, less what the adapter itself carries."""
    if adapter._fingerprint is not None:
        return adapter._fingerprint
    prints = {}
    tied = any(part.twins for part in adapter.parts)
    paths = {module: path for path, module in adapter.model.named_modules()} if tied else {}
    for part in adapter.parts:
        site = part.site
        if site.parameter is not None:
            prints[part.key] = _print(site, part.method.carried(site.weight, **part.values("carried")))
            if part.method.acts_on == "parameter":
                prints[part.key]["tied"] = sorted(paths[twin] for twin in part.twins if twin in paths)
        elif (near := _beneath(adapter, site.module)) is not None:
            name, parameter = near
            prints[f"{name} beneath {part.key}"] = _said(parameter, parameter.detach())
        for other in site.partners.values():
            prints[f"{other.key} beside {part.key}"] = _print(other, other.weight)
    return prints


def _print(site: Site, values: Tensor) -> dict[str, Any]:
    return _said(site.module._parameters[site.parameter or ""], values, site.weight.shape)  # type: ignore[arg-type]


def _said(parameter: Tensor, values: Tensor, shape: Sequence[int] = ()) -> dict[str, Any]:
    return {
        "shape": list(shape or parameter.shape),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "values": _sampled(values),
    }


def _beneath(adapter: Adapter, module: nn.Module) -> tuple[str, Tensor] | None:
    """A parameter that says which base a site without one stands on: the first matrix that no part of the adapter changes.

    Not an embedding, which words may have been added to.
    """
    changed = {id(p) for part in adapter.parts if part.site.parameter for p in part.site.module._parameters.values()}
    found = (
        (f"{path}.{name}" if path else name, parameter)
        for path, inner in walk(module)
        if CONTAINER not in path.split(".") and not isinstance(inner, nn.Embedding)
        for name, parameter in inner._parameters.items()
        if parameter is not None and parameter.is_floating_point() and parameter.dim() > 1
    )
    return next((one for one in found if id(one[1]) not in changed), None)


def _sampled(values: Tensor) -> list[float]:
    flat = values.flatten()
    if not flat.numel() or flat.is_meta:
        return []
    where = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return [float(f"{value:.7g}") for value in whole(flat)[where.to(flat.device)].tolist()]


def _check_base(adapter: Adapter, saved: Mapping[str, Any], strict: bool) -> None:
    """Refuse a base whose weights differ from those that the adapter was made on."""
    here, modules = fingerprint(adapter), dict(adapter.model.named_modules())
    for key, print_ in saved.items():
        own = here.get(key)
        if own is None:
            continue
        if list(own["shape"]) != list(print_["shape"]):
            raise AttunementError(
                f"load: {key} has shape {own['shape']} here and {print_['shape']} in the adapter's base"
            )
        before, now = [name for name in print_.get("tied", ()) if name in modules], own.get("tied", [])
        if strict and "tied" in print_ and before != now:
            raise AttunementError(
                f"load: {key} is tied to {', '.join(now) or 'nothing'} here and was to {', '.join(before) or 'nothing'} in the "
                "adapter's base; load the right base, or pass strict=False"
            )
        a, b = print_["values"], own["values"]
        if not strict or not a or not b or len(a) != len(b):
            continue
        size = math.sqrt(sum(x * x for x in a))
        apart = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / (size or 1.0)
        if not apart <= _tolerance(print_["dtype"], own["dtype"]):
            raise AttunementError(
                f"load: the base differs from the one the adapter was made on: {key} is {apart:.1%} apart; "
                "load the right base, or pass strict=False"
            )


def _tolerance(saved: str, here: str) -> float:
    """How far values may be apart: another rounding of the same base is the same base."""
    if saved == here:
        return 1e-5
    rounding = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
    return max(rounding.get(saved, 0.4), rounding.get(here, 0.4))


# --- load ---


class _SiteSaid(TypedDict):
    name: str
    parameter: str | None
    role: str
    block: StrictInt | None
    stack: str
    view: NotRequired[tuple[StrictInt, StrictInt, StrictInt] | None]
    transposed: NotRequired[bool]
    entry: NotRequired[str | None]


class _MethodSaid(TypedDict):
    method: str


class _GroupSaid(TypedDict):
    method: _MethodSaid
    on: str
    sites: list[_SiteSaid]


class _PrintSaid(TypedDict):
    shape: list[int]
    dtype: str
    values: list[float]
    tied: NotRequired[list[str]]


class _Said(TypedDict):
    """What `describe` gives, as far as `load` reads it."""

    name: str
    base: NotRequired[dict[str, Any] | None]
    methods: list[_GroupSaid]
    fingerprint: NotRequired[dict[str, _PrintSaid] | None]
    metrics: NotRequired[dict[str, Any] | None]


_SAID = TypeAdapter(_Said)


def load(
    model: nn.Module,
    path: str | PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    strict: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Put a saved adapter on a model and make it the active one, alone.

    Args:
        path: a folder that `save` wrote, a folder that PEFT wrote, or `user/repository` on the hub.
        name: the name on this model; by default the one it was saved under.
        trainable: whether training goes on; by default a loaded adapter is frozen.
        strict: refuse a base whose touched weights are not those that the adapter was made on.
        revision: on the hub, a branch, tag or commit.
        token: for a private repository on the hub; by default the one that `hf auth login` or HF_TOKEN gave.

    Raises:
        AttunementError: a file that is missing, truncated or no safetensors file; tensors that are missing, unexpected,
            ill-shaped or not finite; a site that the model does not have; a method that is not registered; another base.
    """
    folder = _folder(path, revision, token)
    if not (folder / TENSORS).exists() and (folder / PEFT).exists():
        from attunement import peft

        return peft.load(model, folder, name or "default", trainable)
    tensors, said = opened(folder)
    name = name or str(said.get("name"))
    check_name(model, name)
    try:
        adapter = rebuilt(model, tensors, said, name, strict)
    except AttunementError as error:
        made_on = (said.get("base") or {}).get("class")
        if made_on in (None, type(model).__name__):
            raise
        run = f"; at.open_run({str(folder.parent)!r}) gives that" if (folder.parent / "recipe.yaml").exists() else ""
        raise AttunementError(f"{error}; the adapter was made on a {made_on}{run}") from None
    adapter._trainable = trainable
    return attach(adapter)


def opened(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a saved adapter and its description."""
    file = folder / TENSORS
    tensors, metadata = read(file)
    try:
        said = json.loads(metadata["attunement"])
        said["methods"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise AttunementError(f"load: {str(file)!r} has no description of an adapter in its header") from None
    if said.get("format") != FORMAT:
        raise AttunementError(f"load: the adapter has format {said.get('format')!r}, this version reads {FORMAT}")
    try:
        _SAID.validate_python(said)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in first["loc"]).lstrip(".")
        missing = first["type"] == "missing"
        wrong = "is missing" if missing else f"must be {wanted(first['msg'])}, got {reprlib.repr(first['input'])}"
        raise AttunementError(f"load: {key} in the header of {str(file)!r} {wrong}") from None
    return tensors, said


def rebuilt(
    model: nn.Module, tensors: Mapping[str, Tensor], said: Mapping[str, Any], name: str, strict: bool = True
) -> Adapter:
    """An adapter from its tensors and its description, not yet on the model: nothing has changed."""
    groups, structure = [], functools.cache(lambda: anatomy(model))
    for entry in said["methods"]:
        method = method_from(entry["method"])
        groups.append(
            Group(method, str(entry["on"]), [_site(model, method, site, structure) for site in entry["sites"]])
        )
    adapter = build(model, groups, name)
    adapter.metrics = dict(said.get("metrics") or {})
    _check_base(adapter, said.get("fingerprint") or {}, strict)
    adapter.load_state(tensors)
    return adapter


def _folder(path: str | PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise AttunementError(f"load: {str(path)!r} is a folder here, which has no revision {revision!r}")
        return folder
    text = str(path)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise AttunementError(
            f"load: there is no folder {text!r}; expected a folder with {TENSORS}, or 'user/repository' on the hub"
        )
    from attunement import hub

    return hub.snapshot(text, revision, token)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file."""
    if not file.exists() and (file.parent / "adapter" / file.name).exists():
        raise AttunementError(
            f"load: {str(file.parent)!r} is the folder of a run: at.open_run({str(file.parent)!r}) gives its model with the "
            f"adapter; the adapter alone is in {str(file.parent / 'adapter')!r}"
        )
    if not file.exists():
        raise AttunementError(f"load: there is no {file.name!r} in {str(file.parent)!r}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AttunementError(f"load: {str(file)!r} is truncated or no safetensors file: {error}") from None


def _site(model: nn.Module, method: Method, said: Mapping[str, Any], structure: Callable[[], Anatomy]) -> Site:
    """A site of this model from its description; `structure` is the model's anatomy, made where it is needed."""
    entry, view = said.get("entry"), said.get("view")
    module = _module(model, said["name"])
    where = {word: said[word] for word in ("role", "block", "stack")}
    made: Site | str
    if said["parameter"] is None and method.acts_on != "output":  # a site of several modules
        alike = [p for p in structure().places if all(getattr(p, word) == value for word, value in where.items())]
        sites = [site_of(structure(), method, place) for place in alike]
        made = next((site for site in sites if isinstance(site, Site) and site.name == said["name"]), "it is not there")
    else:
        place = Place(
            name=said["name"],
            module=module,
            parameter=said["parameter"],
            view=RowView(*view) if view else None,
            transposed=bool(said.get("transposed")),
            entry=None if entry is None else _module(model, entry),
            **where,
        )
        made = site_of(structure() if method.partners else None, method, place)
    if isinstance(made, str):
        raise AttunementError(f"load: {said['name']}.{said['parameter'] or method.acts_on}: {made}")
    if (reason := misfit(method, made) or passed_over(model, method, made)) is not None:
        raise AttunementError(f"load: {type(method).__name__} cannot act on {made.key}: {reason}")
    return made


def _module(model: nn.Module, path: str) -> nn.Module:
    module: Any = model
    for word in path.split(".") if path else ():
        module = module._modules.get(word)
        if module is None:
            known = dict(model.named_modules())
            raise AttunementError(f"load: this {type(model).__name__} has no module {path!r}{nearest(path, known)}")
    return module  # type: ignore[no-any-return]
