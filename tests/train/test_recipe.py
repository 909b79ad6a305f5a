"""Recipe files: what is read, what an override changes, what is refused and with which sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import attunement as at
from attunement.train.recipe import Recipe, load, named_recipes, parse, schema, written
from attunement.train.section import read

MINIMAL = {"model": "some/model", "data": "rows.csv", "task": "classification"}


def test_shorthands_mean_what_the_long_forms_mean() -> None:
    short = read(Recipe, MINIMAL, "x")
    long = {"model": {"path": "some/model"}, "data": {"train": "rows.csv"}, "task": {"kind": "classification"}}
    assert short == read(Recipe, long, "x")
    one = read(Recipe, MINIMAL | {"adapter": "lora"}, "x")
    assert one == read(Recipe, MINIMAL | {"adapter": {"method": "lora"}}, "x")


def test_the_recipes_of_the_library_by_name() -> None:
    for name, fields in (("bitfit", {}), ("linear_probe", {}), ("new_tokens", {"count": 2})):
        given = {"method": name, **fields} if fields else name
        made = read(Recipe, MINIMAL | {"adapter": given}, "x")
        assert made.methods() == (getattr(at.recipes, name)(**fields), None)
        assert read(Recipe, made.plain(), "x") == made
    everywhere = read(Recipe, MINIMAL | {"adapter": {"method": "lora_everywhere", "rank": 2}}, "x").methods()[0]
    assert [method.rank for method in everywhere.values()] == [2]


def test_a_recipe_survives_its_own_plain_data() -> None:
    recipe = read(Recipe, MINIMAL | {"adapter": {"attention.query": {"method": "lora", "rank": 2}, "head": None}}, "x")
    assert read(Recipe, parse(written(recipe.plain())), "x") == recipe


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"trainin": {}}, r"unknown key 'trainin'.*nearest: 'training'"),
        ({"data": {"trian": "x.csv"}}, r"unknown key 'data.trian'.*nearest: 'train'"),
        ({"task": {"kind": "clasification"}}, r"task.kind must be one of .*nearest: 'classification'"),
        ({"task": {"kind": "classification", "poling": "mean"}}, r"unknown key 'task.poling'.*nearest: 'pooling'"),
        ({"task": {"kind": "classification", "pooling": "max"}}, r"task.pooling must be 'model', 'mean' or 'cls'"),
        ({"task": {}}, r"task needs a key 'kind'"),
        ({"training": {"learning_rat": 1}}, r"unknown training argument 'learning_rat'; nearest: 'learning_rate'"),
        ({"training": {"learning_rate": -1}}, r"training.learning_rate must be greater than 0, got -1"),
        ({"training": {"output_dir": "x"}}, r"'output_dir' is set by the recipe itself"),
        ({"data": {"holdout": 1.5}}, r"data.holdout must be less than 1"),
        ({"adapter": {"method": "lorra"}}, r"there is no 'lorra'; nearest: .*'lora'"),
        ({"adapter": {"method": "lora", "rnk": 8}}, r"has no field 'rnk'.*nearest: 'rank'"),
        ({"adapter": {"method": "lora", "rank": 0}}, r"rank must be greater than 0, got 0"),
        ({"adapter": {"attention.query": {"rank": 8}}}, r"adapter.attention.query: expected the name of a method"),
        ({"adapter": {}}, r"adapter: expected"),
        ({"adapter": ["lora"]}, r"adapter: expected the name of a method.*got \['lora'\]"),
        ({"adapter": "linear_prob"}, r"there is no 'linear_prob'; nearest: 'linear_probe', a recipe of at.recipes"),
        ({"adapter": {"method": "new_tokens"}}, r"the recipe 'new_tokens' needs the field 'count'"),
        ({"adapter": {"method": "bitfit", "on": "norm"}}, r"'bitfit' has places of its own"),
        ({"adapter": {"method": "bitfit", "rank": 2}}, r"'bitfit' has no field 'rank'; it takes none"),
        ({"adapter": {"norm": "bitfit"}}, r"adapter.norm: 'bitfit' is a recipe with places of its own"),
        ({"training": {"epochs": 2}}, r"unknown training argument 'epochs'; nearest: 'num_train_epochs'"),
        ({"training": {"learning_rate": "fast"}}, r"training.learning_rate must be a number, got 'fast'"),
        ({"data": 5}, r"data must have keys of its own \(source, .*got 5"),
        ({"output": "x" * 400 + "y", "seed": "x" * 400}, r"seed must be an integer, got 'x+\.\.\.x+'$"),
    ],
)
def test_refusals(values: dict, sentence: str) -> None:
    with pytest.raises(at.AttunementError, match=sentence) as caught:
        read(Recipe, MINIMAL | values, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    assert "\n" not in str(caught.value)
    assert "adapter: adapter" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_key_is_named() -> None:
    with pytest.raises(at.AttunementError, match="the key 'task' is missing"):
        read(Recipe, {"model": "m", "data": "d.csv"}, "recipe.yaml")


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "banking.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"adapter": {"attention.{query,value}": {"method": "lora", "rank": 2}}}))
    recipe = load(
        file,
        [
            "training.learning_rate=5e-4",
            "adapter.attention.{query,value}.rank=16",
            "task.pooling=mean",
            "model.dtype=bfloat16",
            "data.columns={label: intent}",
            "seed=3",
            "name=*.query",
        ],
    )
    assert recipe.training.learning_rate == 5e-4
    assert recipe.methods()[0]["attention.{query,value}"].rank == 16
    assert (recipe.task.pooling, recipe.task.kind, recipe.seed, recipe.name) == ("mean", "classification", 3, "*.query")
    assert (recipe.model.path, recipe.model.dtype) == ("some/model", "bfloat16")
    assert recipe.data.columns == {"label": "intent"}
    assert recipe.output == str(Path("runs/banking"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["training.learning_rte=1"], "unknown training argument 'learning_rte'; nearest: 'learning_rate'"),
        (["seed"], "expected key=value, got 'seed'"),
        (["seed.x=1"], "'seed' is not a mapping but 3"),
        (["task.labels=[a"], r"'task\.labels=\[a': not readable as YAML: .* expected ',' or '\]'"),
        (["name=2020-13-45"], "'name=2020-13-45': not readable as YAML: month must be in"),
    ],
)
def test_refused_overrides(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    file = tmp_path / "banking.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"seed": 3}))
    with pytest.raises(at.AttunementError, match=sentence):
        load(file, overrides)


def test_a_file_that_is_not_there_or_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "banking.yaml").write_text("model: [")
    (tmp_path / "list.yaml").write_text("- model")
    with pytest.raises(at.AttunementError, match=r"there is no recipe file .*nearest: .*banking.yaml"):
        load(tmp_path / "bankin.yaml")
    with pytest.raises(at.AttunementError, match="not readable as YAML"):
        load(tmp_path / "banking.yaml")
    with pytest.raises(at.AttunementError, match="expected keys such as model"):
        load(tmp_path / "list.yaml")
    (tmp_path / "rows.csv").write_text("text,label\n" + "a fine film,up\n" * 200)
    with pytest.raises(at.AttunementError, match=r"rows.csv looks like data: a recipe names it under `data`") as caught:
        load(tmp_path / "rows.csv")
    assert len(str(caught.value)) < 400


def test_schema_knows_every_key_and_method() -> None:
    made = json.loads(json.dumps(schema()))
    assert set(made["properties"]) == set(Recipe.model_fields)
    assert "warmup_steps" in made["$defs"]["Training"]["properties"]
    assert set(at.methods()) <= set(made["$defs"])
    assert made["$defs"]["low_rank/lora"]["properties"]["rank"]["exclusiveMinimum"] == 0


def test_schema_writes_methods_and_tasks_as_the_reader_takes_them() -> None:
    made = schema()
    alone = [entry["properties"] for entry in made["properties"]["adapter"]["anyOf"] if "properties" in entry]
    named = set()
    for properties in alone:
        for name in properties["method"]["enum"]:
            assert ("on" in properties) == (name not in named_recipes())
            named.add(name)
    assert named == {word for full in at.methods() for word in (full, full.partition("/")[2])} | set(named_recipes())
    (words,) = [entry["enum"] for entry in made["properties"]["adapter"]["anyOf"] if "enum" in entry]
    assert set(words) == named
    for name in words:
        if name != "new_tokens":  # which needs a count
            read(Recipe, MINIMAL | {"adapter": name}, "x")
    for word in made["properties"]["task"]["anyOf"][0]["enum"]:
        assert read(Recipe, MINIMAL | {"task": word}, "x").task.kind == word


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "{on: 2e-3, off: [1.5, 1e3, .5, 7, true, no], x: null, y: -1E-4}"
    assert parse(text) == {"on": 2e-3, "off": [1.5, 1000.0, 0.5, 7, True, "no"], "x": None, "y": -1e-4}


@pytest.mark.parametrize("read_back", [parse, yaml.safe_load])
def test_what_is_written_is_read_as_the_same(read_back: Callable[[str], object]) -> None:
    """By whichever version: 12e4 is a number in YAML 1.2 alone, `no` and 1:30 are not texts in 1.1 alone."""
    texts = [
        "12e4",
        "1e5",
        "12e+4",
        "-7E2",
        ".5e3",
        "7.",
        "no",
        "on",
        "y",
        "1:30",
        "0x1f",
        "0o17",
        "1_000",
        "2020-01-02",
    ]
    texts += [
        "",
        "~",
        "null",
        "TRUE",
        ".inf",
        "-.INF",
        ".nan",
        "=",
        "<<",
        "*.query",
        "a: b",
        "[a",
        "# x",
        " x ",
        "é\u2028\t\r\n",
    ]
    values = {
        "texts": texts,
        **{text: text for text in texts},
        "numbers": [1, -2.5, 1e30, 1e-5, float("inf"), True, None],
    }
    assert read_back(written(values)) == values


@pytest.mark.parametrize("name", ["rows.csv", "ro*.csv", "./rows.csv", "rows[1].csv"])
def test_files_beside_a_recipe_in_a_folder_with_brackets(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "[proj]"
    folder.mkdir()
    (folder / name.replace("*", "ws")).write_text("text,label\na,x\nb,y\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(MINIMAL | {"data": {"train": name, "holdout": 0}}))
    recipe = load(folder / "recipe.yaml")
    assert len(recipe.data.load(recipe.task.roles)["train"]) == 2
    (folder / "again.yaml").write_text(yaml.safe_dump(recipe.plain()))
    assert load(folder / "again.yaml").data == recipe.data


def test_a_split_is_not_the_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "hub"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(MINIMAL | {"data": {"source": "hub", "train": "train"}}))
    monkeypatch.chdir(tmp_path)
    data = load("recipe.yaml").data
    assert (data.source, data.train) == (str(tmp_path / "hub"), "train")
