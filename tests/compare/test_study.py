"""Study files: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_studies import plain

import attunement as at
from attunement.compare.database import difference
from attunement.compare.study import entries, load, made, masked, seconds
from attunement.compare.trial import Ground, split
from attunement.errors import AttunementError


def test_methods_are_named_expanded_and_labelled(tiny: Any) -> None:
    mixed = {"attention.query": {"method": "lora"}, "norm": {"method": "train"}, "as": "both"}
    spare = {"method": "lora", "rank": 4, "as": "small", "rates": [1e-3, 1e-2]}
    found = entries(tiny(methods=["lora", "scaling/*", "bitfit", spare, mixed, "low_rank/lora"]))
    assert [one.label for one in found[:4]] == ["zero-shot", "linear probe", "full fine-tuning", "lora"]
    of = {one.label: one for one in found}
    assert len(of) == len(found)
    assert {"ia3", "ssf"} <= set(of)
    assert of["bitfit"].method == "recipes/bitfit"
    assert (of["small"].method, of["small"].low, of["small"].high) == ("low_rank/lora", 1e-3, 1e-2)
    assert of["small"].adapter == {"method": "low_rank/lora", "rank": 4}
    assert of["both"].method == "mixed"
    assert of["full fine-tuning"].high == pytest.approx(of["lora"].high / 10)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["lorra"]}, r"there is no 'lorra'; nearest: .*'lora'"),
        ({"methods": ["low_rnk/*"]}, r"none matches 'low_rnk/\*'; nearest: 'low_rank/\*'"),
        ({"methods": [{"method": "lora", "rnk": 2}]}, "LoRA has no field 'rnk'.*nearest: 'rank'"),
        ({"methods": ["lora", {"method": "lora", "rank": 2, "as": "lora"}]}, "two of them are called 'lora'"),
        ({"methods": [{"attention.query": {"method": "lora"}}]}, "need a name; add `as"),
        ({"methods": [{"method": "lora", "rates": [1, 0.1]}]}, "0 < low < high"),
        ({"metric": "acuracy"}, "metric must be one of accuracy, macro_f1, loss, got 'acuracy'; nearest: 'accuracy'"),
        ({"serch": {}}, "unknown key 'serch'.*nearest: 'search'"),
        ({"search": {"low": 1.0, "high": 0.1}}, "search.low must be less than search.high, got 1 and 0.1"),
        ({"training": {"learning_rate": 1e-3}}, "learning_rate is what a study searches"),
        ({"budget": "0s"}, "expected a length of time such as 90s, 30m or 2h, got '0s'"),
        ({"budget": "soon"}, "expected a length of time such as 90s, 30m or 2h, got 'soon'"),
        ({"name": "../up"}, "name must be 1 to 64 letters"),
        ({"tasks": {}}, "stands beside 'tasks'"),
        ({"task": {"kind": "classification", "poling": "mean"}}, "unknown key 'task.poling'; known here: .*'pooling'"),
        ({"task": None}, "^tiny: task must have keys of its own"),
    ],
)
def test_a_refusal_is_one_sentence(tiny: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttunementError, match=sentence) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_no_task_has_the_name_of_their_mean() -> None:
    good = {"model": "m", "data": "d.csv", "task": "classification"}
    with pytest.raises(AttunementError, match="'all tasks' is what the mean over them is called"):
        made({"name": "s", "methods": ["lora"], "tasks": {"good": good, "all tasks": good}}, "s")


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"model": "m", "data": "d.csv"}, "s: the key 'tasks.bad.task' is missing"),
        (
            {"model": "m", "data": "d.csv", "tsk": "classification"},
            "s: unknown key 'tasks.bad.tsk'; known here: model, data, task, .*; nearest: 'task'",
        ),
        ({"model": "m", "data": {"trian": "d.csv"}, "task": "classification"}, "'tasks.bad.data.trian'; .* 'train'"),
        (
            {"model": "m", "data": "d.csv", "task": {"kind": "regression", "lables": []}},
            "'tasks.bad.task.lables'; known",
        ),
        ({"model": "m", "data": 3, "task": "classification"}, r"bad.data must have keys of its own \(source, config"),
    ],
)
def test_in_one_of_several_tasks_the_fault_is_named(task: dict[str, Any], sentence: str) -> None:
    good = {"model": "m", "data": "d.csv", "task": "classification"}
    with pytest.raises(AttunementError, match=sentence):
        made({"name": "s", "methods": ["lora"], "tasks": {"good": good, "bad": task}}, "s")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3/cret@host:5432/studies", "postgresql://me:***@host:5432/studies"),
        (
            "postgresql+psycopg://me:s3@cret@host/x?sslmode=require",
            "postgresql+psycopg://me:***@host/x?sslmode=require",
        ),
        ("postgresql://host/x?user=me&password=s3cret", "postgresql://host/x?user=me&password=***"),
        ("postgresql:/me:s3cret@host/x", "postgresql:***@host/x"),
        (
            "compare a.yaml --storage 'postgresql://me:s3 cret@h/x' -h",
            "compare a.yaml --storage 'postgresql://me:***@h/x' -h",
        ),
        ("postgresql://me@host/x", "postgresql://me@host/x"),
        ("sqlite:////runs/compare/x/study.db", "sqlite:////runs/compare/x/study.db"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_the_password_of_the_database_is_in_no_settings(tiny: Any) -> None:
    study = tiny(storage="postgresql://me:s3cret@host/studies")
    assert study.settings()["storage"] == "postgresql://me:***@host/studies"
    assert study.url == study.plain()["storage"] == "postgresql://me:s3cret@host/studies", "what opens it has it"


def test_a_path_may_be_seen_from_elsewhere() -> None:
    for here, there in (("rows/train.csv", "/home/me/rows/train.csv"), ("/home/me/rows/train.csv", "train.csv")):
        assert difference({"data": {"train": here}}, {"data": {"train": there}}) == ""
    assert "train" in difference({"data": {"train": "train.csv"}}, {"data": {"train": "/home/me/test.csv"}})
    assert "train" in difference({"data": {"train": "rain.csv"}}, {"data": {"train": "/home/me/train.csv"}})


def test_files_are_found_beside_the_study(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    values = plain(tmp_path, bert)
    values["data"] = {"train": "train.csv", "test": "test.csv"}
    del values["name"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir("/")
    study = load(tmp_path / "mine.yaml")
    assert study.name == "mine"
    assert study.tasks["mine"].data.train == str(tmp_path / "train.csv")
    assert made(study.plain(), "again") == study
    with pytest.raises(AttunementError, match=r"there is no study file '.*min.yaml'; nearest: '.*mine.yaml'"):
        load(tmp_path / "min.yaml")


def test_committed_studies_are_read() -> None:
    few, twelve = (load(Path(__file__).parents[2] / "docs" / "studies" / name / "study.yaml") for name in (
        "banking77-few", "twelve"))  # fmt: skip
    assert {one.method for one in entries(few)} >= set(at.methods())
    assert set(twelve.tasks) >= {"banking77", "sst2", "mrpc", "rte"}
    assert len(entries(twelve)) == 12 + 3


def test_no_row_is_trained_on_and_measured_on(tiny: Any) -> None:
    def rows(table: Any) -> list[str]:
        return [f"{text} {label}" for text, label in zip(table["text"], table["label"], strict=True)]

    study = tiny()
    task = next(iter(study.tasks.values()))
    table = task.data.read(task.data.train, task.task.roles)
    numbered = [f"{i} {text}" for i, text in enumerate(table["text"])]
    table = table.remove_columns("text").add_column("text", numbered)

    class Numbered:
        """The data of the task with texts that are all different."""

        def __init__(self, **given: Any):
            self.train, self.test, self.eval, self.seed = "train", None, None, 0
            self.__dict__ |= given

        def read(self, where: str, roles: Any) -> Any:
            return table.select(range(20)) if where == "eval" else table

    def parts(search: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **changes: Any) -> Any:
        return split(
            task.model_copy(update={"data": Numbered(**(data or {})), "rows": None} | changes),
            study.search.model_copy(update=search or {}),
            "task",
        )

    few = parts(per_class=10)
    assert (len(few["train"]), len(few["search"])) == (20, 20)
    assert sorted(few["train"]["label"]) == ["down"] * 10 + ["up"] * 10
    for found in (few, parts(), parts(rows=30), parts(search={"rows": 5}, per_class=30)):
        tested, measured = set(rows(found["test"])), set(rows(found["measured"]))
        assert not tested & (set(rows(found["train"])) | measured | set(rows(found["search"])))
        assert not measured & set(rows(found["search"]))
        assert tested
        assert measured
    with pytest.raises(AttunementError, match=r"per_class is 60, and the class '(up|down)' has"):
        parts(per_class=60)


def test_data_that_cannot_be_compared_on_are_refused(tiny: Any, tmp_path: Path) -> None:
    one = tmp_path / "one.csv"
    one.write_text("text,label\n" + "a film,up\n" * 20)
    study = tiny(data={"train": str(one)}, rows=None)
    with pytest.raises(AttunementError, match="expected at least two classes, all 20 rows have the label 'up'"):
        Ground("x", next(iter(study.tasks.values())), study.search, tmp_path)
    study = tiny(data={"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "tst.csv")})
    with pytest.raises(AttunementError, match=r"there is no file '.*tst.csv'; nearest: '.*test.csv'"):
        Ground("x", next(iter(study.tasks.values())), study.search, tmp_path)
    names = "a line with the names of the columns and rows below it"
    empty = (("none.csv", "", names), ("none.csv", "text,label\n", names), ("none.jsonl", "", "at least one row"))
    for name, text, wanted in empty:
        (tmp_path / name).write_text(text)
        study = tiny(data={"train": str(tmp_path / name)})
        with pytest.raises(AttunementError, match=rf"{name} has no rows: expected {wanted}$"):
            Ground("x", next(iter(study.tasks.values())), study.search, tmp_path)
    short = tmp_path / "short.csv"
    short.write_text("text,label\na film,up\n")
    study = tiny(data={"train": str(short)})
    with pytest.raises(AttunementError, match="has 1 rows, too few"):
        Ground("x", next(iter(study.tasks.values())), study.search, tmp_path)


def test_the_head_is_drawn_by_the_seed_and_the_rest_is_pretrained(tiny: Any, tmp_path: Path) -> None:
    study = tiny()
    ground = Ground("x", next(iter(study.tasks.values())), study.search, tmp_path)
    zero, one = ground.model(0).state_dict(), ground.model(1).state_dict()
    assert [key for key in zero if not np.array_equal(zero[key].numpy(), one[key].numpy())] == ["head.weight"]


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("1h30m", 5400), (45, 45), ("2.5 h", 9000), (None, None)])
def test_lengths_of_time(text: Any, value: Any) -> None:
    assert seconds(text) == value
