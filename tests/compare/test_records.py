"""What a study leaves behind comes back as it was, and a write that fails leaves the last good one."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import synthetic

from attunement.compare import records
from attunement.compare.records import Trial
from attunement.errors import AttunementError
from attunement.train.recipe import parse

ONE = Trial(
    id="a",
    task="t",
    method="low_rank/lora",
    label="LoRA",
    rate=1e-3,
    quality=0.5,
    curve=((0, 2.5, None), (9, 0.5, 0.5)),
)


def test_trials_settings_and_curves_come_back(tmp_path: Path) -> None:
    settings, trials = synthetic.study(count=8)
    settings["methods"] = [{"method": "lora", "rank": 4, "on": "attention.{query,value}", "as": "LoRA é"}]
    records.write(tmp_path, settings, trials)
    back = records.read(tmp_path)
    assert back.trials == tuple(trials)
    assert back.settings == settings
    assert back.name == "made up"


def test_texts_with_quotes_newlines_and_markup_come_back(tmp_path: Path) -> None:
    odd = 'LoRA, "r=8"\n</script><b>&amp;'
    trial = Trial(id="a", task=odd, method="own/x", label=odd, error=odd, state="failed")
    records.write(tmp_path, {"name": odd}, [trial])
    assert records.read(tmp_path).trials == (trial,)


def test_texts_that_look_like_numbers_are_texts_to_a_reader_of_studies(tmp_path: Path) -> None:
    settings = {"name": "12e4", "model": {"path": "m", "revision": "1e5"}, "task": {"labels": ["no", "7."]}}
    records.write(tmp_path, settings, [ONE])
    assert parse((tmp_path / records.SETTINGS).read_text()) == records.read(tmp_path).settings == settings


def test_a_row_a_trial_in_the_stated_columns(tmp_path: Path) -> None:
    records.write(tmp_path, {}, [ONE])
    with (tmp_path / "trials.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == records.columns()
    assert row["rate"] == "0.001"
    assert row["calibration"] == ""
    assert "curve" not in row


def test_a_study_from_before_heads_had_a_rate_is_read(tmp_path: Path) -> None:
    records.write(tmp_path, {}, [ONE])
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "head_rate"} for row in csv.DictReader(file)]
    with (tmp_path / "trials.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    assert records.read(tmp_path).trials == (ONE,)


def test_what_is_not_finite_is_unknown() -> None:
    trial = Trial(
        id="a",
        task="t",
        method="m/m",
        label="m",
        quality=float("nan"),
        step=float("inf"),
        curve=[[1, float("nan"), 0.5]],
    )
    assert trial.quality is None
    assert trial.step is None
    assert trial.curve == ((1, None, 0.5),)


def test_an_unknown_state_is_refused_with_the_nearest() -> None:
    with pytest.raises(AttunementError, match=r"trial a: state must be one of .* got 'prunned'; nearest: 'pruned'"):
        Trial(id="a", task="t", method="m/m", label="m", state="prunned")


def test_a_full_disk_leaves_the_last_good_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(tmp_path, {"name": "x"}, [ONE])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write(tmp_path, {"name": "y"}, [ONE, ONE])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trials.csv", "id,task\na,t\n", "expected the columns of a study, method, label"),
        ("study.yaml", "a: [", "study.yaml: expected YAML"),
        ("study.yaml", "- a", "expected the settings of a study, got list"),
        ("curves.json", "{", "curves.json: expected JSON"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    records.write(tmp_path, {}, [ONE])
    (tmp_path / name).write_text(text)
    with pytest.raises(AttunementError, match=said.replace("[", r"\[")):
        records.read(tmp_path)


def test_a_damaged_figure_is_refused_by_its_line(tmp_path: Path) -> None:
    records.write(tmp_path, {}, [ONE, ONE])
    path = tmp_path / "trials.csv"
    path.write_text(path.read_text()[::-1].replace("5.0", "?.0", 1)[::-1])
    with pytest.raises(AttunementError, match=r"trials.csv, line 3: quality must be a number, got '0\.\?'"):
        records.read(tmp_path)


def test_a_folder_without_a_study_is_refused_with_the_nearest(tmp_path: Path) -> None:
    records.write(tmp_path / "banking", {}, [ONE])
    with pytest.raises(AttunementError, match=r"holds no study: trials\.csv is not there; nearest: 'banking'"):
        records.read(tmp_path / "bankin")
