"""The three best choices under a limit: they fit, the best is first, and the reasons say no more than the intervals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from attunement.cli import app
from attunement.compare import records, shipped, table
from attunement.compare.recommend import amount, choices
from attunement.errors import AttunementError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("studies") / "made", count=30)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["recommend", *words], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("memory", "2GB", 2e9),
        ("memory", "1.5 MiB", 1.5 * 2**20),
        ("saved", "900", 900),
        ("trainable", "300k", 3e5),
        ("time", "0.8", 0.8),
        ("time", "80%", 0.8),
        ("time", "1.2x", 1.2),
    ],
)
def test_limits_are_read_with_their_units(option: str, text: str, value: float) -> None:
    assert amount(text, option) == pytest.approx(value)


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("memory", "2MG", r"--memory: the unit must be one of B, KB, MB, .*, got 'MG'; nearest: 'MB'"),
        ("memory", "much", r"--memory must be a number with its unit, such as 2GB, got 'much'"),
        ("time", "0", r"--time must be greater than 0, got '0'"),
    ],
)
def test_a_bad_limit_is_refused_with_the_nearest(option: str, text: str, said: str) -> None:
    with pytest.raises(AttunementError, match=said):
        amount(text, option)


def test_the_choices_fit_and_the_highest_quality_comes_first(folder: Path) -> None:
    study = records.read(folder)
    limits = {"time": 0.8, "memory": 420e6}
    task, found = choices(study, limits, "banking77")
    assert task == "banking77"
    assert len(found) == 3
    fitting = [
        row
        for row in table.rows(study)["banking77"]
        if row.quality
        and row.method != table.STILL
        and row.values["step"].mean <= 0.8
        and row.values["peak_memory"].mean <= 420e6
    ]
    assert found[0].label == fitting[0].label
    assert {one.label for one in found} <= {row.label for row in fitting}
    for one in found:
        assert "peak memory" in one.reason
        assert "step time of full fine-tuning" in one.reason
        assert "learning_rate" in one.recipe


def test_of_those_that_cannot_be_told_apart_the_cheaper_are_named() -> None:
    def trials(label: str, qualities: list[float], memory: int) -> list[records.Trial]:
        made = {"task": "t", "method": f"own/{label}", "label": label, "peak_memory": memory}
        return [records.Trial(id=f"{label}{i}", seed=i, quality=q, **made) for i, q in enumerate(qualities)]

    noisy = [0.80, 0.86, 0.77], [0.84, 0.78, 0.79], [0.78, 0.83, 0.79]
    every = [
        *trials("a", noisy[0], 300),
        *trials("b", noisy[1], 200),
        *trials("c", noisy[2], 100),
        *trials("d", [0.1, 0.1, 0.11], 50),
    ]
    _, found = choices(records.Study("s", {}, tuple(every)), {"memory": 1000})
    assert [one.label for one in found] == ["a", "c", "b"]
    assert "it is better than 1 of the 3 others" in found[0].reason
    unsteady = [*every, *trials("e", [0.1, 0.5, 0.9], 10)]
    _, found = choices(records.Study("s", {}, tuple(unsteady)), {"memory": 1000}, count=9)
    (last,) = [one for one in found if one.label == "e"]
    assert found.index(last) > 2, "what varies from 10 % to 90 % is no cheap equal of 81 %"
    assert "which is not sure" in last.reason
    assert "cannot be told from that of a, and it needs less: 100 bytes peak memory" in found[1].reason


def test_hardly_less_time_is_no_reason() -> None:
    steps = {"a": 0.50, "b": 0.47, "c": 0.30}
    qualities = {"a": [0.80, 0.86, 0.77], "b": [0.84, 0.78, 0.79], "c": [0.78, 0.83, 0.79]}
    every = [
        records.Trial(id=f"{n}{i}", task="t", method=f"own/{n}", label=n, seed=i, quality=q, step=steps[n])
        for n, found in qualities.items()
        for i, q in enumerate(found)
    ]
    _, found = choices(records.Study("s", {}, tuple(every)), {"time": 1.0})
    assert [one.label for one in found] == ["a", "c", "b"]
    assert "The next in" in found[2].reason


def test_a_recipe_of_the_committed_results_runs_where_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attunement.train.recipe import load

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(run("--task", "banking77", "--recipe", "1"))
    recipe = load("recipe.yaml")
    assert Path(str(recipe.data.train)).is_file()
    assert "use_cpu" not in recipe.training.model_fields_set


def test_a_limit_that_nothing_meets_names_what_comes_nearest(folder: Path) -> None:
    with pytest.raises(
        AttunementError, match=r"no method of made up stays within 1\.0 MB peak memory; nearest: \w.* with \d"
    ):
        choices(records.read(folder), {"memory": 1e6})


def test_it_is_said_where_nothing_beats_the_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert "beats zero-shot" not in run(str(folder), "--task", "mrpc")
    known = records.read(folder)
    top = [dataclasses.replace(t, quality=0.99) if t.method == table.STILL else t for t in known.trials]
    records.write(tmp_path, known.settings, top)
    said = "No method beats zero-shot. The model as it is, without any training, has 99.0 %, and none of the"
    assert said in run(str(tmp_path), "--task", "mrpc")
    assert json.loads(run(str(tmp_path), "--task", "mrpc", "--json"))["notes"][0].startswith(said)


def test_a_study_of_old_that_lacks_runs_is_not_finished(folder: Path, tmp_path: Path) -> None:
    known = records.read(folder)
    left = [t for t in known.trials if not (t.task == "mrpc" and t.label == "ia3" and t.stage == "final" and t.seed)]
    records.write(tmp_path, known.settings, left)
    assert "This study is not finished: ia3 (1 of 3 final runs)." in run(str(tmp_path), "--task", "mrpc")
    assert "not finished" not in run(str(tmp_path), "--task", "banking77")


def test_unknown_studies_and_tasks_are_refused_with_the_nearest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "runs" / "compare" / "banking", count=4, tasks=1)
    assert "banking77" in run("banking")
    with pytest.raises(AttunementError, match="'bankin' is no folder of a study; known: banking; nearest: 'banking'"):
        run("bankin")
    with pytest.raises(
        AttunementError, match=r"has no task 'mrcp'; it has all tasks, banking77, mrpc; nearest: 'mrpc'"
    ):
        run(str(folder), "--task", "mrcp")


def test_the_command_prints_choices_with_reasons_and_recipes(folder: Path) -> None:
    text = run(str(folder), "--task", "banking77", "--saved", "1MB")
    assert [line[:2] for line in text.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3."]
    assert text.count("learning_rate:") == 3
    made = json.loads(run(str(folder), "--task", "banking77", "--saved", "1MB", "--json"))
    assert len(made["choices"]) == 3
    assert all(one["saved_bytes"] <= 1e6 for one in made["choices"])
    recipe = run(str(folder), "--task", "banking77", "--saved", "1MB", "--recipe", "2")
    assert recipe == made["choices"][1]["recipe"]


def test_of_several_tasks_it_says_who_has_no_result_on_all(folder: Path, tmp_path: Path) -> None:
    known = records.read(folder)
    left = [t for t in known.trials if (t.task, t.label) != ("mrpc", "ia3")]
    records.write(tmp_path, known.settings, left)
    assert "Without a result on every task, and so not compared here: ia3;" in " ".join(run(str(tmp_path)).split())
    assert "Without a result" not in run(str(tmp_path), "--task", "banking77")
    assert "Without a result" not in run(str(folder))


def test_without_a_study_the_committed_results_are_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(shipped.load, "__defaults__", (path,))
    with pytest.raises(AttunementError, match=r"no study was named and this installation holds no committed results"):
        run()
    assert shipped.collect(folder.parent, path) == 1
    assert path.stat().st_size < 200_000
    text = run("--task", "mrpc", "--memory", "2GB")
    assert "the committed results" in text
    assert "attune compare measures on your own" in text
    own = json.loads(run(str(folder), "--task", "mrpc", "--json"))
    same = json.loads(run("--task", "mrpc", "--json"))
    assert [one["label"] for one in own["choices"]] == [one["label"] for one in same["choices"]]
    with pytest.raises(AttunementError, match=r"no committed study has a task 'mrcp'; .* nearest: 'mrpc'"):
        run("--task", "mrcp")
    with pytest.raises(AttunementError, match=r"holds no study"):
        shipped.collect(tmp_path / "nowhere", path)
