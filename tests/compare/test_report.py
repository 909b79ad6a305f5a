"""What the report says follows from the trials: its table, findings, files; and nothing in it comes from outside."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import synthetic
from scipy import stats

import attunement as at
from attunement.compare import findings, markup, pictures, recommend, records, report, table
from attunement.compare.records import Study, Trial
from attunement.compare.table import ALL


def of(settings: dict[str, Any], trials: list[Trial]) -> Study:
    return Study(settings["name"], settings, tuple(trials))


def simple(values: dict[str, list[float]], **more: Any) -> Study:
    """A study of one task where each label has these qualities, by seed."""
    trials = [
        Trial(id=f"{label}{seed}", task="t", method=f"own/{label}", label=label, seed=seed, quality=quality, **more)
        for label, qualities in values.items()
        for seed, quality in enumerate(qualities)
    ]
    return Study("simple", {}, tuple(trials))


@pytest.fixture(scope="module")
def made() -> Study:
    return of(*synthetic.study())


@pytest.fixture(scope="module")
def rows(made: Study) -> dict[str, list[table.Row]]:
    return table.rows(made)


def test_a_row_is_the_mean_over_its_final_runs(made: Study, rows: dict[str, list[table.Row]]) -> None:
    row = next(row for row in rows["mrpc"] if row.label == "lora")
    runs = [t for t in made.trials if (t.task, t.label, t.stage) == ("mrpc", "lora", "final")]
    qualities = [t.quality for t in runs]
    low, high = stats.t.interval(0.95, 2, loc=numpy.mean(qualities), scale=stats.sem(qualities))
    assert (row.quality.mean, row.quality.low, row.quality.high) == pytest.approx((numpy.mean(qualities), low, high))
    assert row.values["trainable"].mean == runs[0].trainable
    assert row.values["rate"].mean == runs[0].rate
    assert row.states == {"done": 3}


def test_every_method_has_a_row_in_every_task_and_the_best_comes_first(rows: dict[str, list[table.Row]]) -> None:
    assert list(rows) == [ALL, "banking77", "mrpc"]
    for found in rows.values():
        assert len(found) == 63
        means = [row.quality.mean for row in found if row.quality]
        assert means == sorted(means, reverse=True)
        assert [row.label for row in found if not row.quality] == ["c3a"]  # it failed everywhere: last, and there


def test_the_same_function_under_two_names_is_not_told_apart(made: Study, rows: dict[str, list[table.Row]]) -> None:
    found = {row.label: row for row in rows["banking77"]}
    one, other = found["lora"], found[synthetic.SAME[1]]
    assert one.values["quality"] == other.values["quality"]
    assert one.to_best.mean == other.to_best.mean
    pair = [t for t in made.trials if t.task == "banking77" and t.label in ("lora", synthetic.SAME[1])]
    alone = table.rows(Study("two", {}, tuple(pair)))["banking77"]
    assert all(row.among_best for row in alone)
    assert "2 of 2 methods cannot be told apart" in findings.findings(Study("two", {}, tuple(pair)), alone)[0].sentence


def test_a_broken_method_is_last_and_below_full_fine_tuning(rows: dict[str, list[table.Row]]) -> None:
    ranked = [row for row in rows["banking77"] if row.quality]
    assert ranked[-1].method == synthetic.BROKEN
    assert ranked[-1].to_full.sure
    assert ranked[-1].to_full.mean < 0
    assert ranked[-1].front == ()


def test_one_best_is_named_only_where_the_interval_says_so() -> None:
    clear = simple({"a": [0.90, 0.91, 0.90], "b": [0.70, 0.72, 0.71]})
    near = simple({"a": [0.90, 0.71, 0.80], "b": [0.70, 0.85, 0.71]})
    first = findings.findings(clear, table.rows(clear)["t"])[0]
    assert (first.answer, first.labels) == ("a", ("a",))
    assert "better than b; 19.3 points above b" in first.sentence
    first = findings.findings(near, table.rows(near)["t"])[0]
    assert (first.answer, first.labels) == ("a or b", ("a", "b"))
    assert "better than none" in first.sentence


def test_one_seed_decides_nothing() -> None:
    study = simple({"a": [0.9], "b": [0.1]})
    first = findings.findings(study, table.rows(study)["t"])[0]
    assert first.answer == "Not to be told"
    assert "with one seed nothing can be said" in first.sentence


def test_equal_seeds_decide_nothing() -> None:
    study = simple({"a": [0.9, 0.9], "b": [0.1, 0.1]})
    ranked = table.rows(study)["t"]
    first = findings.findings(study, ranked)[0]
    assert first.answer == "Not to be told"
    assert "where all seeds came to the same nothing can be said of the differences" in first.sentence
    page = report.page(study)
    assert "no interval, as each of 2 runs came to the same difference" in page
    near = simple({"a": [0.9, 0.9, 0.9], "b": [0.8, 0.99, 0.89], "c": [0.2, 0.21, 0.3]})
    ranked = table.rows(near)["t"]
    assert [row.level for row in ranked] == [False, True, False], "the best has no interval: those of the others decide"


def test_of_equal_means_none_is_first_by_its_name() -> None:
    alike = [0.9, 0.7, 0.8]
    study = simple({"a": alike, "b": alike[::-1], "c": [0.1, 0.2, 0.3]})
    kept = {"a": 200, "b": 100, "c": 50}
    trials = tuple(dataclasses.replace(one, backward_bytes=kept[one.label]) for one in study.trials)
    study = dataclasses.replace(study, trials=trials)
    ranked = table.rows(study)["t"]
    assert [row.label for row in ranked] == ["b", "a", "c"], "of equals the one that keeps less"
    assert "b and a have the highest mean, 80.0 %" in findings.findings(study, ranked)[0].sentence
    study = simple({"a": [0.2], "b": [0.2]})
    assert findings.findings(study, table.rows(study)["t"])[0].sentence.startswith("All 2 have 20.0 %;")
    study = simple({"a": [0.2], "b": [0.2], "c": [0.1]})
    assert findings.findings(study, table.rows(study)["t"])[0].sentence.startswith("a and b have the highest value")


def test_a_time_that_was_taken_once_tells_what_is_a_tenth_apart() -> None:
    study = simple({name: [0.8, 0.82, 0.81] for name in ("a", "b", "c", "d")})
    steps = {"a": 0.5, "b": 0.54, "c": 0.56, "d": 1.0}
    trials = tuple(dataclasses.replace(one, step=steps[one.label]) for one in study.trials)
    study = dataclasses.replace(study, trials=trials)
    said = {one.title: one for one in findings.findings(study, table.rows(study)["t"])}
    assert said["Fastest step"].labels == ("a", "b")
    assert "a takes 0.50× full fine-tuning’s" in said["Fastest step"].sentence


def test_a_best_rate_at_the_end_of_the_range_is_said(made: Study) -> None:
    finals = [
        records.Trial(id=f"f{n}", task="t", method=f"own/{n}", label=n, quality=0.8, rate=r)
        for n, r in (("low", 1e-3), ("high", 1e-1), ("between", 1e-2))
    ]
    tried = [
        dataclasses.replace(one, id=f"{one.label}{rate}", stage="search", rate=rate)
        for one in finals
        for rate in (1e-3, 1e-2, 1e-1)
    ]
    study = Study("ends", {}, (*tried, *finals))
    text = markup.rates(study, "t", table.rows(study)["t"])
    assert "the lowest that was tried for low, and the highest that was tried for high: further rates" in text


def still(values: dict[str, list[float]], bare: list[float], metric: str = "accuracy") -> findings.Finding | None:
    """What is found of methods, full fine-tuning and the model as it is."""
    names = {"full fine-tuning": "baseline/full", "zero-shot": "baseline/zero-shot"}
    trials = [
        dataclasses.replace(trial, method=names.get(trial.label, trial.method))
        for trial in simple(values | {"zero-shot": bare}, metric=metric).trials
    ]
    study = Study("still", {}, tuple(trials))
    found = findings.findings(study, table.rows(study)["t"])
    assert (found[0].title == findings.NO_GAIN) == ("zero-shot</dd>" in report.page(study))
    return found[0] if found[0].title == findings.NO_GAIN else None


def test_it_is_said_where_no_method_beats_the_model_as_it_is() -> None:
    below = still({"a": [0.60, 0.61, 0.62], "b": [0.5, 0.52, 0.51]}, [0.7])
    assert below.answer == "No method beats zero-shot"
    assert below.sentence == (
        "The model as it is, without any training, has 70.0 %, and none of the 2 methods is better."
    )
    full = still({"a": [0.60, 0.61, 0.62], "full fine-tuning": [0.90, 0.91, 0.92]}, [0.7])
    assert full.sentence.endswith("has 70.0 %, and a is not better. Better is only full fine-tuning.")
    near = still({"a": [0.60, 0.81, 0.72], "b": [0.5, 0.52, 0.51]}, [0.7])
    assert near.answer == "No method surely beats zero-shot"
    assert near.sentence.endswith("that of a, lies 1.0 points above it, and that may be chance.")
    alone = still({"a": [0.8]}, [0.7])
    assert alone.sentence.endswith("10.0 points above it, and with one seed nothing can be said of the differences.")
    assert still({"a": [0.80, 0.81, 0.82], "b": [0.5, 0.52, 0.51]}, [0.7]) is None
    assert still({"a": [1.60, 1.61, 1.62]}, [2.7], "loss") is None
    assert still({"a": [2.80, 2.81, 2.82]}, [2.7], "loss").answer == "No method beats zero-shot"


def test_intervals_stay_where_values_can_be() -> None:
    study = simple({"a": [0.99, 0.91, 0.98], "b": [0.5, 0.52, 0.51]}, calibration=None)
    errors = {("a", 0): 0.01, ("a", 1): 0.09, ("a", 2): 0.02}
    trials = [dataclasses.replace(t, calibration=errors.get((t.label, t.seed))) for t in study.trials]
    study = Study("ends", {}, tuple(trials))
    row = table.rows(study)["t"][0]
    assert (row.values["calibration"].low, row.values["quality"].high) == (0.0, 1.0)
    assert (markup.SPREAD[:2], table.window([row])[1]) == (("quality", "calibration"), 1.0)
    line = next(line for line in report.page(study).split("<tr ") if 'data-v="a"' in line)
    assert '0.040 <span class="half">0.000 to 0.148</span>' in line
    assert '96.0 % <span class="half">85.2 to 100.0</span>' in line
    kept = next(line for line in report.page(study).split("<tr ") if 'data-v="b"' in line)
    assert '51.0 % <span class="half">± 2.5</span>' in kept


def test_less_is_better_for_a_loss() -> None:
    study = simple({"a": [2.9, 2.91, 2.9], "b": [2.1, 2.12, 2.11]}, metric="loss", trainable=5)
    ranked = table.rows(study)["t"]
    assert [row.label for row in ranked] == ["b", "a"]
    assert ranked[0].front == ("trainable",)
    assert ranked[1].front == ()
    assert findings.findings(study, ranked)[0].answer == "b"


def test_a_task_that_a_method_lacks_leaves_it_out_of_the_mean_over_tasks(made: Study) -> None:
    trials = tuple(t for t in made.trials if not (t.label == "ia3" and t.task == "mrpc" and t.stage == "final"))
    found = table.rows(dataclasses.replace(made, trials=trials))
    assert next(row for row in found["banking77"] if row.label == "ia3").quality is not None
    assert next(row for row in found[ALL] if row.label == "ia3").quality is None


def test_the_files_beside_the_page_hold_the_table(tmp_path: Path) -> None:
    synthetic.write(tmp_path, count=8)
    report.write(tmp_path, pictures=False)
    plain = json.loads((tmp_path / "table.json").read_text())
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(plain) == len(lines) == 3 * 11
    for record, line in zip(plain, lines, strict=True):
        assert line["label"] == record["label"]
        assert (float(line["quality"]) if line["quality"] else None) == record["quality"]
    assert {"quality_low", "behind_best_p", "over_full_high", "backward_bytes", "pareto", "recipe"} <= set(plain[0])


def test_what_is_far_below_and_sure_of_nothing_is_no_cheap_way_to_keep_up() -> None:
    calm = {
        "full": [0.842, 0.845, 0.84],
        "steady": [0.84, 0.846, 0.841],
        **{f"m{i}": [0.84, 0.84, 0.85] for i in range(4)},
    }
    study = simple(calm | {"wild": [0.55, 0.95, 0.6]}, metric="accuracy")
    numbers = {"full": 9_000, "steady": 500, "wild": 10}
    trials = [
        dataclasses.replace(
            one,
            method="baseline/full" if one.label == "full" else one.method,
            trainable=numbers.get(one.label, 1_000),
        )
        for one in study.trials
    ]
    study = dataclasses.replace(study, trials=tuple(trials))
    said = {one.title: one for one in findings.findings(study, table.rows(study)["t"])}
    assert not next(row for row in table.rows(study)["t"] if row.label == "wild").to_full.sure  # type: ignore[union-attr]
    assert said["Fewest trained numbers"].labels == ("steady",)


def test_the_recipe_of_a_row_trains_it(made: Study, rows: dict[str, list[table.Row]]) -> None:
    from attunement.train.recipe import parse

    row = next(row for row in rows["banking77"] if row.label == "dora")
    recipe = parse(table.recipe(made, row))
    assert recipe["adapter"] == {"method": "low_rank/dora", "rank": 8, "on": "attention.{query,value}"}
    assert recipe["training"]["learning_rate"] == pytest.approx(row.values["rate"].mean, rel=1e-5)
    assert len(str(recipe["training"]["learning_rate"])) < 12, "no mean of equal numbers that is off in the last place"
    assert recipe["model"] == "all-MiniLM-L6-v2"
    assert recipe["data"] == {"train": "banking77.csv"}
    assert table.recipe(made, row).startswith("model:")
    settings = {**made.settings, "tasks": {"banking77": {**made.settings["tasks"]["banking77"], "per_class": 10}}}
    fewer = table.recipe(dataclasses.replace(made, settings=settings), row)
    settings["tasks"]["banking77"] |= {"model": {"path": "m", "revision": "12e4"}}
    told = parse(table.recipe(dataclasses.replace(made, settings=settings), row))
    assert told["model"]["revision"] == "12e4", "a text, which the reader would take for a number"
    assert fewer.startswith("# The study trained on 10 rows of each class; this takes all rows.\n")
    assert parse(fewer) == recipe


def test_a_recipe_imports_what_the_study_imports(made: Study, rows: dict[str, list[table.Row]]) -> None:
    study = dataclasses.replace(made, settings={**made.settings, "imports": ["own.py"]})
    assert "imports:\n- own.py" in table.recipe(study, rows["mrpc"][0])
    assert "imports" not in table.recipe(study, rows[ALL][0])  # the adapter section alone
    assert "imports" not in table.recipe(made, rows["mrpc"][0])


def test_the_page_is_one_file_with_nothing_from_outside(made: Study) -> None:
    page = report.page(made)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#within", "", page)
    assert "default-src 'none'" in page
    assert len(page) < 1_000_000


def test_the_page_is_the_same_for_the_same_study(made: Study) -> None:
    assert report.page(made) == report.page(of(*synthetic.study()))


class _Scripts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.tags, self.inside, self.text = [], [], False, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def test_labels_and_errors_are_text_wherever_they_stand() -> None:
    odd = "</script><img src=x onerror=alert(1)>@@js@@<!-- & \u2028"
    trials = simple({odd: [0.5, 0.6, 0.5], "b": [0.4, 0.5, 0.4]}).trials
    lost = Trial(
        id="x", task="t", method=f"{odd}/{odd}", label=odd, stage="search", state="failed", error=odd, rate=1e-3
    )
    page = report.page(Study(odd, {"name": odd, "methods": [odd]}, (*trials, lost)))
    parsed = _Scripts()
    parsed.feed(page)
    assert "img" not in parsed.tags
    assert len(parsed.scripts) == 3
    data = json.loads(parsed.scripts[1])
    assert odd in [row["label"] for row in data["tasks"][0]["rows"]]
    assert odd in parsed.text


def test_without_a_script_everything_that_is_text_is_there(made: Study) -> None:
    parsed = _Scripts()
    parsed.feed(report.page(made))
    for said in (
        "banking77",
        "The pruner stopped",
        "must match the size of tensor b (1536)",
        "the loss became nan at step 41",
        "Holm",
        "LoRA again",
        "trials: 6",
    ):
        assert said in parsed.text


def test_a_study_without_any_final_run_has_a_page() -> None:
    trials = [Trial(id="x", task="t", method="low_rank/lora", label="lora", stage="search", state="failed", error="no")]
    page = report.page(Study("young", {}, tuple(trials)))
    assert "No final run has finished yet." in page
    assert report.page(Study("empty", {}, ()))


def test_a_method_without_a_result_is_in_the_table_with_its_reason(made: Study) -> None:
    page = report.page(made)
    line = next(line for line in page.split("<tr ") if 'data-v="c3a"' in line)
    assert "No final run: RuntimeError: The size of tensor a (384)" in line
    young = Trial(id="x", task="t", method="low_rank/lora", label="lora", stage="search", quality=0.5, rate=1e-3)
    assert "No final run yet" in report.page(Study("young", {}, (young,)))


def test_of_all_tasks_the_table_has_the_means_on_each(made: Study) -> None:
    left = [t for t in made.trials if (t.task, t.label) != ("mrpc", "ia3")]
    study = dataclasses.replace(made, trials=tuple(left))
    found = table.rows(study)
    page = report.page(study, found)
    assert "Task by task" in page
    assert "for want of a result on one: ia3." in page
    own = {row.label: row for row in found["banking77"]}

    def line(label: str) -> str:
        return next(line for line in page.split("<tr ") if f'data-v="{label}"' in line)  # of all tasks: the first

    best = found["banking77"][0].label
    assert f'<td class="best" data-v="{own[best].quality.mean!r}">' in line(best)
    assert f'<td data-v="{own["ia3"].quality.mean!r}">' in line("ia3")
    assert "No mean: it has no result on mrpc" in line("ia3")
    assert "not of one scale" not in page
    mixed = [dataclasses.replace(t, metric="pearson") if t.task == "mrpc" else t for t in made.trials]
    assert "not of one scale: read the tasks one by one" in report.page(dataclasses.replace(made, trials=tuple(mixed)))


def test_it_says_what_was_pruned_refused_and_left_out_of_each_method(made: Study) -> None:
    refused = Trial(
        id="mrpc/prefix/refused",
        task="mrpc",
        method="prompts/prefix",
        label="prefix",
        stage="search",
        state="failed",
        error="no attention",
    )
    left = [t for t in made.trials if (t.task, t.label) != ("mrpc", "prefix")]
    study = dataclasses.replace(made, trials=(*left, refused), missing=("ia3 has had 1 of 3 seeds",))
    search = [t for t in left if t.stage == "search"]
    pruned = [t for t in search if t.state == "pruned"]
    said = markup.cut(study, ALL)
    assert f"The pruner stopped {len(pruned)} of {len(search)} search trials." in said
    label = pruned[0].label
    own = [t.task for t in pruned if t.label == label]
    tried = sum(t.label == label for t in search)
    tasks = ", ".join(f"{task} {own.count(task)}" for task in dict.fromkeys(own))
    assert f'<th scope="row">{label}</th><td class=text>{len(own)} of {tried}</td><td class=text>{tasks}</td>' in said
    assert "1 method cannot act on the model of mrpc." in said
    assert "<td class=text>no attention</td>" in said
    assert "The budget was spent: ia3 has had 1 of 3 seeds." in said
    assert "cannot act" not in markup.cut(study, "banking77")


def test_what_was_not_finished_is_said(made: Study) -> None:
    left = [t for t in made.trials if not (t.task == "mrpc" and t.label == "ia3" and t.stage == "final" and t.seed > 0)]
    assert "Not finished" not in report.page(made)
    assert "Not finished: ia3 on mrpc (1 of 3 final runs)." in report.page(
        dataclasses.replace(made, trials=tuple(left))
    )


def test_the_curve_of_a_row_is_the_mean_of_its_runs() -> None:
    runs = [
        Trial(
            id=str(i),
            task="t",
            method="m/m",
            label="m",
            seed=i,
            quality=0.5,
            curve=((0, 2.0 + i, None), (5, 1.0 + i, 0.5)),
        )
        for i in range(2)
    ]
    longer = dataclasses.replace(runs[0], curve=(*runs[0].curve, (9, 0.1, 0.9)))
    assert report.curve(runs) == [[0, 2.5, None], [5, 1.5, 0.5]]
    assert report.curve([longer, runs[1]]) == [[0, 2.5, None], [5, 1.5, 0.5]]  # a step that one run lacks is no mean
    many = dataclasses.replace(runs[0], curve=tuple((i, 1.0, None) for i in range(5000)))
    assert len(report.curve([many])) < 70


def test_the_pictures_are_the_same_for_the_same_study_and_hold_no_date(tmp_path: Path) -> None:
    study = of(*synthetic.study(count=6, tasks=1))
    found = table.rows(study)
    written = {path.name for path in pictures.write(tmp_path / "a", study, found)}
    assert written == {f"banking77-{kind}.{end}" for kind in ("pareto", "curves", "rates") for end in ("png", "svg")}
    pictures.write(tmp_path / "b", study, found)
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "banking77-pareto.svg").read_text()
    assert "<dc:date>" not in text
    assert (tmp_path / "a" / "banking77-pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_leaves_the_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.write(tmp_path, count=4, tasks=1)
    path = report.write(tmp_path, pictures=False)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(tmp_path, pictures=False)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_every_family_has_a_colour_and_a_mark_of_its_own() -> None:
    css = (Path(report.__file__).parent / "page" / "report.css").read_text()
    count = len(table.FAMILIES)
    own = {getattr(at, name).name.partition("/")[0] for name in at._methods}
    assert set(table.FAMILIES) >= own | {"recipes", "baseline"}
    assert len(set(markup.SHAPES)) == len(set(pictures.COLOURS)) == len(set(pictures.MARKS)) == count
    assert all(css.count(f"--f{i}: ") == 2 for i in range(count)), "in light and in dark"


def test_one_run_that_stood_still_is_not_what_a_run_takes() -> None:
    made = simple({"a": [0.5, 0.6, 0.7], "b": [0.5, 0.6, 0.7]})
    taken = {"a": (30.0, 1070.0, 31.0), "b": (20.0, 22.0, 21.0)}
    trials = [dataclasses.replace(one, seconds=taken[one.label][one.seed]) for one in made.trials]
    found = {
        row.label: row.values["seconds"] for row in table.rows(dataclasses.replace(made, trials=tuple(trials)))["t"]
    }
    assert {label: (value.mean, value.half) for label, value in found.items()} == {"a": (31.0, None), "b": (21.0, None)}


def test_nothing_is_said_to_keep_up_where_nothing_can_be_told(tmp_path: Path) -> None:
    own = {"full": [0.9], "probe": [0.1], "a": [0.88]}
    methods = {"full": "baseline/full", "probe": "baseline/probe", "a": "own/a"}
    for seeds in (1, 3):  # of one seed, and of equal ones
        study = simple({label: value * seeds for label, value in own.items()}, backward_bytes=1.0)
        study = dataclasses.replace(
            study, trials=tuple(dataclasses.replace(t, method=methods[t.label]) for t in study.trials)
        )
        ranked = table.rows(study)["t"]
        assert [row.label for row in ranked if row.among_best] == ["full"]
        found = findings.findings(study, ranked)
        assert [one.answer for one in found] == ["Not to be told"] * 2
        assert recommend.choices(study, {})[1][1].label == "a"


def test_the_best_beside_an_unsteady_one_has_its_name() -> None:
    steady, unsteady = [0.700, 0.702, 0.701], [0.55, 0.78, 0.60]
    study = simple({"a": steady, "b": unsteady, "c": [0.1, 0.11, 0.1]})
    first = findings.findings(study, table.rows(study)["t"])[0]
    assert first.answer == "a"
    assert first.sentence.startswith("a has the highest mean, 70.1 %")
    assert "The mean lies below that interval for b" in first.sentence


def test_names_with_signs_of_their_own_are_drawn(tmp_path: Path) -> None:
    study = simple({"a $_$": [0.9, 0.91], "b": [0.7, 0.72]}, backward_bytes=1e6)
    twice = tuple(dataclasses.replace(t, task=task, id=t.id + task) for t in study.trials for task in ("x y", "x-y"))
    report.write(tmp_path, dataclasses.replace(study, trials=twice))
    drawn = {path.name for path in (tmp_path / "pictures").glob("*-pareto.png")}
    assert drawn == {"all-tasks-pareto.png", "x-y-pareto.png", "x-y-2-pareto.png"}
