"""A study file: which methods are compared on which tasks, how their rates are searched, and how often they are run.

    name: banking
    model: sentence-transformers/all-MiniLM-L6-v2
    data: {train: train.csv, test: test.csv}
    task: {kind: classification, pooling: mean}
    training: {num_train_epochs: 3}
    methods: [lora, "bottleneck/*", {method: lora, rank: 2, as: LoRA of rank 2}]
    search: {trials: 6}
    seeds: 3

Several tasks stand under `tasks`, each with its own model, data, task and training.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

import attunement as at
from attunement.choosing import names_head
from attunement.compare.records import ALL
from attunement.errors import AttunementError, nearest
from attunement.train.data import Data
from attunement.train.recipe import Recipe, Training, import_all, mapping, methods_of, named_recipes, placed
from attunement.train.section import Section, read
from attunement.train.tasks import AnyTask, Base, CausalLM, Regression
from attunement.train.words import near, short

FULL, PROBE, ZERO = "baseline/full", "baseline/probe", "baseline/zero-shot"
LOWER = ("loss", "rmse", "perplexity")
"""Metrics of which less is better: their negative is the quality."""


class StudyTask(Section):
    """One task of a study: model, data, task and training as in a recipe, and which rows are used."""

    model: Base
    """What is adapted: a folder, a hub id, or a mapping with `path`."""
    data: Data
    """`train` is trained on, `test` is what the final seeds are measured on and the search never sees. The search is
    measured on `eval` where `test` is given too, otherwise on rows held out of `train`."""
    task: AnyTask
    """What is learned."""
    training: Training = Field(default_factory=Training)
    """How it is learned, for all methods alike; the learning rate is what the study searches."""
    metric: str | None = None
    """By which methods are compared; the task's own by default."""
    per_class: PositiveInt | None = None
    """Training rows of each class; all by default."""
    rows: PositiveInt | None = None
    """Training rows in all; all by default."""
    test_rows: PositiveInt | None = None
    """Rows of `test` that are used, drawn by `data.seed`; all by default."""
    forgetting: Data | None = None
    """A second data set of the same task: how much the loss on its `test`, `eval` or `train` rows rises is reported."""

    @field_validator("model", "data", "task", "forgetting", mode="before")
    @classmethod
    def _short(cls, value: Any, info: Any) -> Any:
        key = {"model": "path", "task": "kind"}.get(info.field_name, "train")
        return {key: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _checked(self) -> StudyTask:
        if "learning_rate" in self.training.model_fields_set:
            raise ValueError("training.learning_rate is what a study searches; give its bounds as search.low and .high")
        if "head_learning_rate" in self.training.model_fields_set:
            raise ValueError("training.head_learning_rate is what the linear probe's search finds; see search.heads")
        known = metrics_of(self.task)
        if self.metric is not None and self.metric not in known:
            raise ValueError(
                f"metric must be one of {', '.join(known)}, got {self.metric!r}{nearest(self.metric, known)}"
            )
        return self

    @property
    def quality(self) -> str:
        """The name of what is compared: greater is better."""
        metric = self.metric or self.task.metric
        return f"negative {metric}" if metric in LOWER else metric

    def recipe(
        self, adapter: Mapping[str, Any], rate: float | None, seed: int, output: str, head_rate: float | None = None
    ) -> Recipe:
        """The recipe of one trial."""
        training = self.training.model_dump(exclude_unset=True) | {
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
        if rate is not None:
            training["learning_rate"] = rate
        if head_rate is not None:
            training["head_learning_rate"] = head_rate
        values = {"adapter": dict(adapter), "training": training, "seed": seed, "output": output}
        plain = {key: getattr(self, key).model_dump(exclude_unset=True) for key in ("model", "data")}
        task = self.task.model_dump()
        made: Recipe = read(Recipe, {**plain, "task": task, **values}, "trial")
        return made


class Search(Section):
    """How the learning rate of each method is found; every method gets the same number of trials."""

    trials: PositiveInt = 6
    """Rates that are tried for each method."""
    low: PositiveFloat = 1e-4
    """The lowest rate of a method; full fine-tuning is searched from a tenth of it."""
    high: PositiveFloat = 1e-1
    """The highest rate of a method; full fine-tuning is searched up to a tenth of it."""
    spread: PositiveInt = 4
    """First trials at rates spread evenly over the logarithm of the range; those after go where the sampler (TPE) says."""
    pruner: bool = True
    """Stop a trial that is behind the median of those before it at the same evaluation, from the second one on."""
    evaluations: PositiveInt = 4
    """Times that a trial is measured on the held-out rows."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training rows held out where neither `data.eval` nor unused training rows serve."""
    rows: PositiveInt = 1000
    """Rows that a search trial is measured on at most."""
    heads: Literal["probe", "same"] = "probe"
    """At which rate a task head trains beside a method: at the one that the search of the linear probe has found, so that
    what is searched is the method's own, or at the same as the method. A head that a recipe names is the recipe's."""
    known: bool = True
    """Whether the first trial takes the rate that an earlier study found for the same method, model and kind of task."""

    @model_validator(mode="after")
    def _ordered(self) -> Search:
        if self.low >= self.high:
            raise ValueError(f"search.low must be less than search.high, got {self.low:g} and {self.high:g}")
        return self


class Study(Section):
    """A whole study."""

    name: str
    """Also that of its folder, `runs/compare/<name>`, unless `output` is given."""
    tasks: dict[str, StudyTask]
    """By name. A study of one task may have the keys of that task at the top instead."""
    methods: list[str | dict[str, Any]]
    """Names, globs (`low_rank/*`), recipes of `at.recipes`, or a recipe's `adapter` section; `as` gives it a label and
    `rates: [low, high]` another range. Full fine-tuning, a linear probe and the model as it is are always added."""
    search: Search = Field(default_factory=Search)
    """How rates are found."""
    seeds: PositiveInt = 3
    """Final runs of each method at its best rate, measured on rows that the search never saw."""
    seed: int = 0
    """The first seed: of the search and of the first final run."""
    budget: str | float | None = None
    """Seconds, or `90s`, `30m`, `2h`: when it is spent no further trial is started."""
    processes: PositiveInt | None = None
    """How many processes of `accelerate launch` train each trial together; by default as many as were started."""
    storage: str | None = None
    """The address of the database, as SQLAlchemy writes it (`postgresql://...`); SQLite in the folder by default."""
    output: str | None = None
    """The folder of the study."""
    imports: list[str] = Field(default=[])
    """Modules or Python files that register methods of your own."""

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value):
            raise ValueError(f"name must be 1 to 64 letters, digits, '_', '-' or '.', got {value!r}")
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [one.strip() for one in value.split(",")] if isinstance(value, str) else value

    @field_validator("imports", mode="before")
    @classmethod
    def _import(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> Study:
        if not self.tasks:
            raise ValueError("tasks: expected at least one task")
        if ALL in self.tasks:
            raise ValueError(f"tasks: {ALL!r} is what the mean over them is called; name the task otherwise")
        seconds(self.budget)
        entries(self)
        return self

    @property
    def folder(self) -> Path:
        """Where everything of the study is written."""
        return Path(self.output or Path("runs") / "compare" / self.name)

    @property
    def url(self) -> str:
        """The address of its database."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    def plain(self) -> dict[str, Any]:
        """The study as plain data, from which another process makes it again; with the password of its database."""
        values = self.model_dump(mode="json", exclude_none=True)
        for task in values["tasks"].values():
            for key in ("learning_rate", "head_learning_rate"):
                task["training"].pop(key, None)  # a default that no trial takes
        return values

    def settings(self) -> dict[str, Any]:
        """What `study.yaml` and the page hold and what makes two studies the same; paths as seen from the current folder,
        the address of the database without its password."""
        values = self.plain()
        values.pop("output", None)
        values |= {"storage": masked(values["storage"])} if "storage" in values else {}
        for task in values["tasks"].values():
            task["model"]["path"] = _near(task["model"]["path"])
            for rows in filter(None, (task["data"], task.get("forgetting"))):
                rows |= {k: _near(rows[k]) for k in ("source", "train", "eval", "test") if k in rows}
        imports = [near(name) for name in values.pop("imports")]
        return values | ({"imports": imports} if imports else {})


SECRETS = (
    (re.compile(r"(?<=://)([^:/@\s]*):[^@\n]*@(?:\S*@)?"), r"\1:***@"),
    (re.compile(r"(?<![/\w])(\w+):(?!//)\S*@"), r"\1:***@"),  # of an address that is none
    (re.compile(r"(?<=[?&])([^=&\s]*(?:pas|pwd|secret|token)[^=&\s]*)=[^&\s]*", re.IGNORECASE), r"\1=***"),
)


def masked(text: str) -> str:
    """A text without the passwords of the addresses in it: `postgresql://user:***@host/name`."""
    for secret, shown in SECRETS:
        text = secret.sub(shown, text)
    return text


def _near(path: str) -> str:
    return near(os.path.normpath(path)) if os.path.isabs(path) else path


@dataclass(frozen=True)
class Entry:
    """One method of a study.

    Attributes:
        method: `low_rank/lora`, `recipes/bitfit`, `mixed` or a baseline; `label`: short and unique in the study.
        adapter: the adapter section of its recipe; `low`, `high`: where its rate is searched.
    """

    method: str
    label: str
    adapter: dict[str, Any]
    low: float
    high: float

    @property
    def leaves_head(self) -> bool:
        """Whether it says nothing of task heads, which then train beside it."""
        if self.method in (ZERO, FULL):
            return self.method == FULL
        try:
            recipe, on = methods_of(self.adapter)
        except AttunementError:
            return False  # it cannot be made
        return not any(map(names_head, recipe if isinstance(recipe, Mapping) else [on]))

    @property
    def recipe(self) -> str:
        """The adapter section as JSON."""
        return json.dumps(self.adapter, ensure_ascii=False)


def entries(study: Study) -> list[Entry]:
    """The baselines, then the methods of a study in their order, each once.

    Raises `AttunementError` for an unknown method or field, naming the nearest, and for two methods of one label.
    """
    low, high = study.search.low, study.search.high
    made = [
        Entry(ZERO, "zero-shot", {}, low, high),
        Entry(PROBE, "linear probe", {"method": "linear_probe"}, low, high),
        Entry(FULL, "full fine-tuning", {"method": "full"}, low / 10, high / 10),
    ]
    for spec in study.methods:
        for one in _expanded(spec):
            made.append(_entry(one, low, high))
    found: dict[str, Entry] = {}
    for entry in made:
        twin = found.setdefault(entry.label, entry)
        if twin is not entry and (twin.adapter, twin.method) != (entry.adapter, entry.method):
            raise AttunementError(
                f"methods: two of them are called {entry.label!r}; give one another name with `as: ...`"
            )
    return list(found.values())


def _expanded(spec: Any) -> list[dict[str, Any]]:
    if isinstance(spec, Mapping):
        return [dict(spec)]
    if not any(sign in spec for sign in "*?["):
        return [{"method": spec}]
    names = at.methods(spec)
    if not names:
        families = sorted({f"{name.partition('/')[0]}/*" for name in at.methods()})
        raise AttunementError(f"methods: none matches {spec!r}{nearest(spec, [*families, *at.methods()])}")
    return [{"method": name} for name in names]


def _entry(spec: dict[str, Any], low: float, high: float) -> Entry:
    label, rates = spec.pop("as", None), spec.pop("rates", [low, high])
    if not (isinstance(rates, list) and len(rates) == 2 and all(isinstance(r, int | float) for r in rates)):
        raise AttunementError(f"methods: rates must be [low, high], got {short(rates)}")
    if not 0 < rates[0] < rates[1]:
        raise AttunementError(f"methods: rates must be [low, high] with 0 < low < high, got {rates}")
    name = spec.get("method")
    if name is None:
        word = "mixed"
    elif isinstance(name, str) and name in named_recipes():
        word = f"recipes/{name}"
    else:
        word = at.method(name).name if isinstance(name, str) else "?"
        spec["method"] = word
    try:
        methods_of(spec)
    except AttunementError:
        if len(spec) > 1 or "needs its field" not in _said(spec):
            raise  # what a glob names and cannot be made without a field is recorded as refused, with its reason
    if label is None and word == "mixed":
        raise AttunementError(f"methods: selections with a method each need a name; add `as: ...` to {short(spec)}")
    if label is None:
        fields = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "method")
        label = word.rpartition("/")[2] + (f" ({fields})" if fields else "")
    return Entry(word, str(label), spec, float(rates[0]), float(rates[1]))


def _said(spec: dict[str, Any]) -> str:
    try:
        methods_of(spec)
    except AttunementError as error:
        return str(error)
    return ""


def metrics_of(task: Any) -> list[str]:
    """The metrics that an evaluation of a task gives."""
    if isinstance(task, CausalLM):
        return ["loss", "token_accuracy", "perplexity"]
    return ["pearson", "spearman", "rmse", "loss"] if isinstance(task, Regression) else ["accuracy", "macro_f1", "loss"]


def seconds(text: str | float | None) -> float | None:
    """A length of time in seconds: 90, "90s", "30m", "2h", "1h30m". Raises `AttunementError` for any other word."""
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", str(text))
    try:
        whole = re.fullmatch(r"(?:\d+(?:\.\d+)?\s*[smhd]\s*)+", str(text).strip())
        value = sum(float(count) * units[unit] for count, unit in found) if whole else float(text)
    except ValueError:
        value = -1.0
    if value <= 0:
        raise AttunementError(f"budget: expected a length of time such as 90s, 30m or 2h, got {text!r}")
    return value


def launchers(count: int) -> list[str]:
    """What starts so many processes that train each trial together, as it is typed: accelerate's way and torchrun's."""
    return [
        f"accelerate launch --num_processes {count} -m attunement",
        f"torchrun --nproc-per-node {count} -m attunement",
    ]


def made(values: Mapping[str, Any], where: str, folder: Path | None = None) -> Study:
    """A study from plain data; paths in it are looked for in `folder`, then in the current one.

    Raises `AttunementError` for the first thing that is wrong with it.
    """
    values = dict(values)
    own = [key for key in StudyTask.model_fields if key in values]
    if own:
        if "tasks" in values:
            raise AttunementError(f"{where}: {own[0]!r} stands beside 'tasks'; put it into one of them")
        values["tasks"] = {str(values.get("name", "task")): {key: values.pop(key) for key in own}}
    tasks = values.get("tasks")
    for place in (Path(), *([] if folder is None else [folder]))[::-1]:
        for task in tasks.values() if isinstance(tasks, Mapping) else ():
            if isinstance(task, dict):
                placed(task, place)
                second = {"data": task.get("forgetting")}
                placed(second, place)
                if second["data"] is not None:
                    task["forgetting"] = second["data"]
    if folder is not None:
        placed(values, folder)
    import_all(values.get("imports"), where)
    try:
        study: Study = read(Study, values, where)
    except AttunementError as error:
        said = str(error).replace(f"{where}: {where}", where)
        if own:  # nobody wrote `tasks`
            said = said.replace(f"tasks.{next(iter(values['tasks']))}.", "")
        raise AttunementError(said) from None
    return study


def load(path: str | Path) -> Study:
    """The study in a YAML file; its name is that of the file unless it says so.

    Raises `AttunementError` for a file that is not there or is not YAML, for an unknown key and for a wrong value.
    """
    path = Path(path)
    values = mapping(path, "study", "name, tasks, methods")
    stem = path.parent.resolve().name if path.stem == "study" else path.stem
    return made({"name": stem} | values, str(path), path.parent)
