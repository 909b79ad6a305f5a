"""A recipe file: model, data, task, adapter and training in one YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, field_validator, model_validator

import attunement as at
from attunement.errors import AttunementError, nearest
from attunement.train.data import READERS, Data, suffix_of
from attunement.train.section import Section, read
from attunement.train.tasks import AnyTask, Base
from attunement.train.words import near, short


class _Yaml(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: the key `on` is a text and 2e-3 a number, as everybody means them."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, found) for tag, found in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.I), list("tTfF"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


class _Writer(yaml.SafeDumper):
    """YAML that is read alike by both versions: a text that one of them takes for something else is quoted."""


for _first, _resolvers in _Yaml.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Writer.add_implicit_resolver(_tag, _pattern, [_first])


def parse(text: str) -> Any:
    """YAML 1.2 as plain data."""
    return yaml.load(text, _Yaml)


def written(values: Any, width: int = 80) -> str:
    """Plain data as YAML, of which `parse` makes the same again."""
    text: str = yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=width)
    return text


OURS = {"output_dir", "seed", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "remove_unused_columns"}


SHORT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
"""What people call some training arguments."""


class Training(Section):
    """Arguments of `transformers.TrainingArguments`, any of them, by their own names. These have defaults of ours."""

    model_config = ConfigDict(extra="allow")

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Ten times what full fine-tuning takes: few tensors, far from where they end."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """That of task heads; the same by default. A new head often wants ten to a hundred times more than the rest."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training rows."""
    per_device_train_batch_size: Annotated[int, Field(gt=0)] = 32
    """Rows of a step, on each device."""
    per_device_eval_batch_size: Annotated[int, Field(gt=0)] = 64
    """Rows of a batch in evaluation."""
    train_sampling_strategy: str = "group_by_length"
    """Batches of rows of like length: padding is time. `random` for no grouping."""
    eval_strategy: str = "epoch"
    """When the evaluation rows are looked at: `no`, `epoch`, or `steps` with `eval_steps`."""
    save_strategy: str = "epoch"
    """When a checkpoint to resume from is written: `no`, `epoch`, or `steps` with `save_steps`."""
    save_total_limit: Annotated[int, Field(gt=0)] = 2
    """Checkpoints kept: the last and the best."""
    load_best_model_at_end: bool = True
    """Whether the saved adapter is the best evaluated one rather than the last."""
    logging_steps: float = 10
    """Steps between two reports of the loss."""
    ddp_find_unused_parameters: bool = False
    """Every parameter that trains takes part in every step, so distributed runs need not search for others."""
    report_to: str | list[str] = "none"
    """Trackers: `tensorboard`, `wandb`, ..."""

    @model_validator(mode="after")
    def known(self) -> Training:
        arguments = _arguments()
        for name in self.model_extra or {}:
            if name in OURS:
                raise ValueError(f"{name!r} is set by the recipe itself (output, seed), not under training")
            if name not in arguments:
                short = [SHORT[name]] if name in SHORT else []
                alike = short + [known for known in arguments if name in known.split("_")]
                hint = f"; nearest: {', '.join(map(repr, alike[:3]))}" if alike else nearest(name, arguments)
                raise ValueError(f"unknown training argument {name!r}{hint}")
        return self


class Recipe(Section):
    """A whole training run."""

    model: Base
    """What is adapted: a folder, a hub id, or a mapping with `path`."""
    data: Data
    """The rows: a file, or a mapping."""
    task: AnyTask
    """What is learned: `kind` is classification, regression, causal-lm or image-classification."""
    adapter: dict[str, Any] = Field(default={"method": "lora"})
    """One method, `lora` or `{method: lora, rank: 8, on: "attention.{query,value}"}`; a recipe of `at.recipes`, `bitfit` or
    `{method: lora_everywhere, rank: 16}`; or selections with a method each."""
    training: Training = Field(default_factory=Training)
    """How it is learned."""
    imports: list[str] = Field(default=[])
    """Modules (`my_package.methods`) or Python files beside the recipe (`own.py`) that register methods of your own.
    They are run when the recipe is trained, and never when a finished run is opened."""
    name: str = "default"
    """The adapter's name."""
    output: str | None = None
    """The folder of the run; `runs/<name of the recipe file>` by default."""
    seed: int = 0
    """Of initial values, dropout and the order of rows."""

    @field_validator("model", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("task", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("imports", mode="before")
    @classmethod
    def _import(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("adapter", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        methods_of(value)
        return value

    def methods(self) -> tuple[Any, str | None]:
        """What `at.adapt` takes: a method or a mapping of selections to methods, and `on`."""
        return methods_of(self.adapter)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `transformers.TrainingArguments`."""
        ours = {"seed": self.seed, "output_dir": self.output, "remove_unused_columns": not self.task.lazy}
        if self.task.lazy and self.training.train_sampling_strategy == "group_by_length":
            ours["train_sampling_strategy"] = "random"  # pictures have one size
        return self.training.model_dump(exclude={"head_learning_rate"}) | ours

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data; `load` of it as YAML gives the recipe again."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["adapter"] = self.model_dump(mode="json", include={"adapter"})["adapter"]  # `head: null` says something
        if not self.imports:
            del values["imports"]
        return values

    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted key; fields of methods and training arguments that were left out as their defaults."""
        method, on = self.methods()
        if isinstance(method, Mapping):
            adapter = {place: one.describe() for place, one in method.items() if one is not None}
        else:
            adapter = method.describe() | {"on": on}
        return flat({"training": _defaults()}) | flat(self.plain() | {"adapter": adapter})


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides (dotted keys, values in YAML).

    Files and folders in it are looked for beside it, then in the current folder; those of overrides in the current
    folder. What it `imports` is imported.

    Raises `AttunementError` for a file that is not there or is not YAML, for an unknown key and for a wrong value.
    """
    path = Path(path)
    values = mapping(path, "recipe", "model, data, task")
    placed(values, path.parent)
    for override in overrides:
        _override(values, override)
    placed(values, Path())
    import_all(values.get("imports"), str(path))
    recipe: Recipe = read(Recipe, values, str(path))
    return recipe if recipe.output else recipe.model_copy(update={"output": str(Path("runs") / path.stem)})


def mapping(path: Path, kind: str, keys: str) -> dict[str, Any]:
    """The keys and values in the YAML file of a recipe or a study.

    Args:
        kind: what the file is to hold, `keys`: some of its keys, as the sentences say it.

    Raises `AttunementError` for a file that is not there, is not YAML or holds something else.
    """
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AttunementError(f"there is no {kind} file {str(path)!r}{nearest(str(path), beside)}")
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, or bytes that are no UTF-8
        raise AttunementError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        table = f" ({path.name} looks like data: a {kind} names it under `data`)"
        table = table if suffix_of(path.name) in READERS else ""
        raise AttunementError(f"{path}: expected keys such as {keys}; got {short(values)}{table}")
    return values


def placed(values: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe full, where they are there as seen from `folder`; see `load`."""
    for key, inner in {"model": ("path",), "data": ("source", "train", "eval", "test"), "imports": ()}.items():
        value = values.get(key)
        if isinstance(value, str):
            values[key] = _beside(value, folder)
        elif isinstance(value, list):
            values[key] = [_beside(one, folder) if isinstance(one, str) else one for one in value]
        elif isinstance(value, dict):
            texts = {word: value[word] for word in inner if isinstance(value.get(word), str)}
            value |= {
                word: _beside(text, folder)
                for word, text in texts.items()
                if word in ("path", "source") or suffix_of(text) in READERS  # else a split, whatever folders there are
            }


def _beside(text: str, folder: Path) -> str:
    """A file, glob or folder as seen from `folder`, or the text as it is: a split, a module, a hub id."""
    path = Path(text).expanduser()
    is_file = suffix_of(text) in (*READERS, "py")
    here, found = str(folder.absolute() / path), []
    for base in (folder.absolute(), Path.cwd()):
        place, pattern = str(base / path), os.path.join(glob.escape(str(base)), path)
        if Path(place).is_file() if is_file else Path(place).is_dir():
            found.append(place)
        elif is_file and glob.glob(pattern, recursive=True):
            found.append(pattern)
    if found or text.startswith((".", "~")):
        return str(Path(found[0] if found else here).resolve()) if not is_file else (found or [here])[0]
    return text


def import_all(names: Any, where: str) -> None:
    """Import modules, by dotted name or by the path of a Python file, for the methods that they register.

    Raises `AttunementError` for what is not there, with the line where one that is there went wrong.
    """
    for name in [names] if isinstance(names, str) else names or []:
        if not isinstance(name, str):
            continue  # reading the recipe says what is wrong
        try:
            name = str(Path(name).resolve()) if name.endswith(".py") else name
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except AttunementError as error:
            raise AttunementError(f"{where}: imports: {near(name)}: {error}") from None
        except FileNotFoundError:
            raise AttunementError(f"{where}: imports: there is no file {near(name)!r}") from None
        except Exception as error:  # whatever a file of the user's own may raise
            frames = traceback.extract_tb(error.__traceback__)
            last = next((frame for frame in reversed(frames) if frame.filename == name), frames[-1])
            at_line = f" ({near(last.filename)}, line {last.lineno})" if "importlib" not in last.filename else ""
            said = f"{near(name)} cannot be imported: {type(error).__name__}: {error}{at_line}"
            raise AttunementError(f"{where}: imports: {said}") from error


def _import_file(path: Path) -> None:
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() != path.resolve():
            raise AttunementError(f"another module is called {path.stem!r}; rename the file")
        return
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[path.stem]
        raise


def methods_of(spec: Any) -> tuple[Any, str | None]:
    """A recipe's `adapter` as what `at.adapt` takes; see `Recipe.adapter`."""
    if not isinstance(spec, Mapping) or not spec:
        raise AttunementError(
            "adapter: expected the name of a method, {method: ..., field: value} or selections with a method each, "
            f"got {short(spec)}"
        )
    if "method" in spec:
        fields = dict(spec)
        on, name = fields.pop("on", None), fields.pop("method")
        if name not in named_recipes():
            return _method({"method": name, **fields}, "adapter"), on
        if on is not None:
            raise AttunementError(f"adapter: the recipe {name!r} has places of its own; leave `on` out")
        return _recipe(name, fields), None
    return {selection: _method(value, f"adapter.{selection}") for selection, value in spec.items()}, None


def named_recipes() -> dict[str, Any]:
    """The functions of `at.recipes`, by name; a method of the same name goes before."""
    methods = {word for full in at.methods() for word in (full, full.partition("/")[2])}
    public = {k: v for k, v in inspect.getmembers(at.recipes, inspect.isfunction) if not k.startswith("_")}
    return {k: v for k, v in public.items() if v.__module__ == at.recipes.__name__ and k not in methods}


def _recipe(name: str, fields: dict[str, Any]) -> Any:
    function = named_recipes()[name]
    known = inspect.signature(function).parameters
    if unknown := next((field for field in fields if field not in known), None):
        said = f"it takes {', '.join(known)}{nearest(unknown, known)}" if known else "it takes none"
        raise AttunementError(f"adapter: the recipe {name!r} has no field {unknown!r}; {said}")
    missing = [k for k, parameter in known.items() if parameter.default is parameter.empty and k not in fields]
    if missing:
        raise AttunementError(f"adapter: the recipe {name!r} needs the field {missing[0]!r}")
    try:
        return function(**fields)
    except AttunementError as error:
        raise AttunementError(f"adapter: {error}") from None


def _method(value: Any, where: str) -> Any:
    if value is None:
        return None  # `head: null` leaves the head out
    fields = {"method": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or not isinstance(fields.get("method"), str):
        raise AttunementError(
            f"{where}: expected the name of a method or {{method: ..., field: value}}, got {short(value)}"
        )
    if (name := fields["method"]) in named_recipes():
        raise AttunementError(f"{where}: {name!r} is a recipe with places of its own; write `adapter: {name}`")
    try:
        return at.method(fields["method"])(**{key: v for key, v in fields.items() if key != "method"})
    except AttunementError as error:
        said = str(error)
        near_by = difflib.get_close_matches(name, named_recipes(), cutoff=0.6)
        if near_by and said.startswith("method: there is no"):
            said = f"method: there is no {name!r}; nearest: {near_by[0]!r}, a recipe of at.recipes"
        raise AttunementError(f"{where}: {said}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key. A selection has dots of its own: the longest key that is already there wins."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise AttunementError(f"expected key=value, got {override!r}; for example training.learning_rate=5e-4")
    place, parts = values, key.split(".")
    while len(parts) > 1:
        size = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in place), 1)
        name, parts = ".".join(parts[:size]), parts[size:]
        inner = place.get(name)
        shorthand = {"model": "path", "data": "train", "task": "kind"}.get(name, "method")
        place[name] = {} if inner is None else {shorthand: inner} if isinstance(inner, str) else inner
        place = place[name]
        if not isinstance(place, dict):
            raise AttunementError(f"{key}: {name!r} is not a mapping but {place!r}")
    try:
        place[".".join(parts)] = parse(text)
    except (yaml.YAMLError, ValueError) as error:
        if not text.startswith("*"):  # in YAML a reference to what stands before it, where nothing stands here
            raise AttunementError(f"{override!r}: not readable as YAML: {' '.join(str(error).split())}") from None
        place[".".join(parts)] = text


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    made = Recipe.model_json_schema()
    made["$schema"], made["title"] = "https://json-schema.org/draft/2020-12/schema", "Attunement recipe"
    defs = made["$defs"]
    for key, shorthand in {"model": "a folder or a hub id", "data": "a file"}.items():
        found = made["properties"][key]
        made["properties"][key] = {"anyOf": [{"type": "string", "description": shorthand}, found]}
    kinds = [key for key, value in defs.items() if "kind" in value.get("properties", {})]
    tasks = [defs[key]["properties"]["kind"]["const"] for key in kinds]
    made["properties"]["task"] = {"anyOf": [{"enum": tasks}, made["properties"]["task"]]}
    for key in kinds:
        defs[key]["required"] = ["kind", *defs[key].get("required", [])]
    defs["Training"]["additionalProperties"] = False
    defs["Training"]["properties"] |= {
        name: {"description": field.metadata.get("help", "")}
        for name, field in _arguments().items()
        if name not in OURS and name not in Training.model_fields
    }
    methods = []
    for name in at.methods():
        method = TypeAdapter(at.method(name)).json_schema(ref_template=f"#/$defs/{name}/{{model}}")
        defs |= {f"{name}/{key}": value for key, value in method.pop("$defs", {}).items()}
        words = [full for full in (name, name.partition("/")[2]) if at.method(full) is at.method(name)]
        method["properties"] = {"method": {"enum": words}} | method.get("properties", {})
        method["required"] = ["method", *method.get("required", [])]
        defs[name] = method | {"additionalProperties": False}
        alone = method["properties"] | {"on": {"type": "string", "description": "a selection of sites"}}
        methods.append({**method, "properties": alone, "additionalProperties": False})
    one = [{"$ref": f"#/$defs/{name.replace('/', '~1')}"} for name in at.methods()]
    short_names = [full for name in at.methods() for full in (name, name.partition("/")[2])]
    recipes = [
        {
            "type": "object",
            "description": (inspect.getdoc(function) or "").split("\n")[0],
            "properties": {"method": {"enum": [name]}}
            | {field: {} for field in inspect.signature(function).parameters},
            "required": ["method"],
            "additionalProperties": False,
        }
        for name, function in named_recipes().items()
    ]
    methods = [{"enum": [*short_names, *named_recipes()]}, *methods, *recipes]
    several = {"type": "object", "additionalProperties": {"anyOf": [{"type": ["string", "null"]}, *one]}}
    made["properties"]["adapter"] |= {"anyOf": [*methods, {**several, "not": {"required": ["method"]}}]}
    for key in ("additionalProperties", "type"):
        made["properties"]["adapter"].pop(key, None)
    made["properties"]["imports"] = {"anyOf": [{"type": "string"}, made["properties"]["imports"]]}
    return made


@functools.cache
def _arguments() -> dict[str, dataclasses.Field]:
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


def _defaults() -> dict[str, Any]:
    """What training arguments are where a recipe says nothing of them."""
    return {
        name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for name, field in _arguments().items()
        if name not in OURS
    }
