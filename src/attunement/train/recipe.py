"""A recipe file: model, data, task, adapter and training in one YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, field_validator, model_validator

import attunement as at
from attunement.errors import AttunementError, nearest
from attunement.train.data import Data
from attunement.train.section import Section, read
from attunement.train.tasks import AnyTask, Base


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


def parse(text: str) -> Any:
    """YAML 1.2 as plain data."""
    return yaml.load(text, _Yaml)


OURS = {"output_dir", "seed", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "remove_unused_columns"}


class Training(Section):
    """Arguments of `transformers.TrainingArguments`, any of them, by their own names. These have defaults of ours."""

    model_config = ConfigDict(extra="allow")

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Ten times what full fine-tuning takes: few tensors, far from where they end."""
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
                raise ValueError(f"unknown training argument {name!r}{nearest(name, arguments)}")
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
    """One method, `{method: lora, rank: 8, on: "attention.{query,value}"}`, or selections with a method each."""
    training: Training = Field(default_factory=Training)
    """How it is learned."""
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

    @field_validator("adapter")
    @classmethod
    def _methods(cls, value: dict[str, Any]) -> dict[str, Any]:
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
        return self.training.model_dump() | ours

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data; `load` of it as YAML gives the recipe again."""
        return self.model_dump(mode="json", exclude_none=True)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides (dotted keys, values in YAML).

    Raises `AttunementError` for a file that is not there or is not YAML, for an unknown key and for a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AttunementError(f"there is no recipe file {str(path)!r}{nearest(str(path), beside)}")
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AttunementError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise AttunementError(f"{path}: expected keys such as model, data, task; got {values!r}")
    for override in overrides:
        _override(values, override)
    recipe: Recipe = read(Recipe, values, str(path))
    return recipe if recipe.output else recipe.model_copy(update={"output": str(Path("runs") / path.stem)})


def methods_of(spec: Mapping[str, Any]) -> tuple[Any, str | None]:
    """A recipe's `adapter` as what `at.adapt` takes; see `Recipe.adapter`."""
    if "method" in spec:
        fields = dict(spec)
        on = fields.pop("on", None)
        return _method(fields, "adapter"), on
    if not spec:
        raise AttunementError("adapter: expected {method: ..., ...} or selections with a method each, got nothing")
    return {selection: _method(value, f"adapter.{selection}") for selection, value in spec.items()}, None


def _method(value: Any, where: str) -> Any:
    if value is None:
        return None  # `head: null` leaves the head out
    fields = {"method": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or "method" not in fields:
        raise AttunementError(f"{where}: expected the name of a method or {{method: ..., field: value}}, got {value!r}")
    try:
        return at.method(fields["method"])(**{key: v for key, v in fields.items() if key != "method"})
    except AttunementError as error:
        raise AttunementError(f"{where}: {error}") from None


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
    place[".".join(parts)] = parse(text)


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    made = Recipe.model_json_schema()
    made["$schema"], made["title"] = "https://json-schema.org/draft/2020-12/schema", "Attunement recipe"
    defs = made["$defs"]
    for key, shorthand in {"model": "a folder or a hub id", "data": "a file"}.items():
        found = made["properties"][key]
        made["properties"][key] = {"anyOf": [{"type": "string", "description": shorthand}, found]}
    kinds = [key for key, value in defs.items() if "kind" in value.get("properties", {})]
    words = [defs[key]["properties"]["kind"]["const"] for key in kinds]
    made["properties"]["task"] = {"anyOf": [{"enum": words}, made["properties"]["task"]]}
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
        short = [full for full in (name, name.partition("/")[2]) if at.method(full) is at.method(name)]
        method["properties"] = {"method": {"enum": short}} | method.get("properties", {})
        method["required"] = ["method", *method.get("required", [])]
        defs[name] = method | {"additionalProperties": False}
        alone = method["properties"] | {"on": {"type": "string", "description": "a selection of sites"}}
        methods.append({**method, "properties": alone, "additionalProperties": False})
    one = [{"$ref": f"#/$defs/{name.replace('/', '~1')}"} for name in at.methods()]
    several = {"type": "object", "additionalProperties": {"anyOf": [{"type": ["string", "null"]}, *one]}}
    made["properties"]["adapter"] |= {"anyOf": [*methods, {**several, "not": {"required": ["method"]}}]}
    made["properties"]["adapter"].pop("additionalProperties", None)
    return made


@functools.cache
def _arguments() -> dict[str, dataclasses.Field]:
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}
