"""Rows from files: every kind that is read, columns renamed, and bad rows refused by their number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

import attunement as at
from attunement.train.data import Data
from attunement.train.tasks import Base, CausalLM, Classification, Regression

ROWS = [{"question": f"a film {i}", "intent": "yes" if i % 3 else "no", "extra": i} for i in range(20)]
ROLES = Classification.roles
COLUMNS = {"text": "question", "label": "intent"}


def saved(folder: Path, kind: str) -> str:
    table, path = datasets.Dataset.from_list(ROWS), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(Path(saved(folder, "csv")).read_bytes()))
    else:
        {"csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    table = Data(train=saved(tmp_path, kind), columns=COLUMNS, holdout=0).load(ROLES)["train"]
    assert table.to_list() == [{"text": row["question"], "label": row["intent"]} for row in ROWS]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_cells_are_read_as_they_are_written(tmp_path: Path, kind: str) -> None:
    cells = [
        ("null", "1.1"),
        ("NA", "1.10"),
        ("None", "007"),
        ("1e3", "None"),
        ("true", "TRUE"),
        ("a", "7"),
        ("1", "n/a"),
    ]
    path, between = tmp_path / f"rows.{kind}", "," if kind == "csv" else "\t"
    path.write_text("\n".join(between.join(row) for row in [("text", "label"), *cells]))
    rows = Data(train=str(path), holdout=0).load(ROLES)["train"]
    assert [(row["text"], row["label"]) for row in rows] == cells
    assert set(Classification().resolved(rows, "rows").labels) == {label for _, label in cells}


def test_only_an_empty_cell_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,label,text_pair\na,1,\nb,,""\n')
    rows = Data(train=str(tmp_path / "rows.csv"), holdout=0).load(ROLES)["train"]
    assert rows.to_list() == [
        {"text": "a", "text_pair": None, "label": "1"},
        {"text": "b", "text_pair": None, "label": None},
    ]


def test_a_gap_in_one_file_does_not_change_the_labels_of_another(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"a,{i}\n" for i in range(11)))
    (tmp_path / "test.csv").write_text("text,label\na,1\nb,\n")
    splits = Data(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), holdout=0).load(ROLES)
    task = Classification().resolved(splits["train"], "train.csv")
    assert task.labels == tuple(map(str, range(11)))
    assert splits["test"]["label"][0] in task.labels


@pytest.mark.parametrize("row", ["hello, world,x", "hello,x,"])
def test_a_csv_file_with_cells_that_have_no_name_is_refused(row: str, tmp_path: Path) -> None:
    """pandas would take the first cell for the row's own name, and move all others by one."""
    (tmp_path / "rows.csv").write_text(f"text,label\n{row}\n")
    with pytest.raises(
        at.AttunementError, match=r"3 cells in its first row and names for 2 of them: text, label; .*quotes"
    ):
        Data(train=str(tmp_path / "rows.csv"), holdout=0).load(ROLES)


def test_a_csv_file_gives_the_numbers_of_a_regression(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,-2.5\na,1e-3\n")
    rows = Data(train=str(tmp_path / "rows.csv"), holdout=0).load(Regression.roles)["train"]
    task = Regression()
    assert task.encode(rows, task.processor(Base(path=str(bert))), "rows.csv")["labels"] == [1.0, -2.5, 1e-3]


def test_files_that_are_read_together_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("text,label\na,x\n")
    (tmp_path / "2.csv").write_text("label,text\ny,b\n")
    data = Data(train=str(tmp_path / "*.csv"), holdout=0)
    assert data.load(ROLES)["train"].to_list() == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    (tmp_path / "3.csv").write_text("text,intent\nc,x\n")
    with pytest.raises(at.AttunementError, match=r"3.csv has the columns text, intent, and .*1.csv.* has text, label"):
        data.load(ROLES)


def test_a_file_is_found_under_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "[proj]"
    folder.mkdir()
    where = saved(folder, "csv")
    assert len(Data(train=where, columns=COLUMNS, holdout=0).load(ROLES)["train"]) == len(ROWS)


def test_a_role_that_is_given_a_column_takes_it_from_the_role_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\n")
    rows = Data(train=str(path), columns={"text": "completion"}, holdout=0).load(CausalLM.roles)["train"]
    assert rows.to_list() == [{"prompt": "a", "text": "b"}]
    for columns in ({"text": "prompt", "label": "prompt"}, {"text": "prompt", "text_pair": "prompt"}):
        with pytest.raises(at.AttunementError, match="column 'prompt' has the role 'text' and cannot be"):
            Data(train=str(path), columns=columns).load(ROLES)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_numbered_as_in_the_file_that_is_split(tmp_path: Path, bert: Path, seed: int) -> None:
    lines = [f"film {i},{'up' if i % 2 else 'down'}" for i in range(1, 21)]
    lines[16] = ",up"
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    splits = Data(train=str(tmp_path / "rows.csv"), holdout=0.4, seed=seed).load(ROLES)
    task = Classification(labels=("down", "up"))
    processor = task.processor(Base(path=str(bert)))
    holding = next(table for table in splits.values() if None in list(table["text"]))
    with pytest.raises(at.AttunementError, match="row 17 has no text"):
        task.encode(holding, processor, "rows.csv")


def test_holdout_keeps_rows_apart(tmp_path: Path) -> None:
    splits = Data(train=saved(tmp_path, "csv"), columns=COLUMNS, holdout=0.25).load(ROLES)
    train, held = (set(splits[name]["text"]) for name in ("train", "eval"))
    assert (len(train), len(held), train & held) == (15, 5, set())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"columns": {"text": "questoin", "label": "intent"}}, r"no column 'questoin'.*question.*nearest: 'question'"),
        (
            {"columns": {"text": "question"}},
            r"no column 'label' for the role 'label'; the columns are question, intent",
        ),
        ({"columns": {"txt": "question"}}, r"no role 'txt'; it has text, text_pair, label; nearest: 'text'"),
        ({"train": "rows.txt"}, r"there is no file 'rows.txt'"),
    ],
)
def test_refused_columns_and_files(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(at.AttunementError, match=sentence):
        Data(**{"train": saved(tmp_path, "csv"), "columns": COLUMNS} | change).load(ROLES)


def test_a_kind_of_file_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(at.AttunementError, match="none of the kinds that are read: csv"):
        Data(train=str(tmp_path / "rows.xlsx")).load(ROLES)


def test_a_torn_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(at.AttunementError, match=r"rows.parquet.*cannot be read"):
        Data(train=str(tmp_path / "rows.parquet")).load(ROLES)


def table(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_labels_are_found_sorted_and_kept(bert: Path) -> None:
    task = Classification().resolved(table(text=["a", "b", "c"], label=["up", "down", "up"]), "rows")
    assert task.labels == ("down", "up")
    encoded = task.encode(
        table(text=["good film", "bad"], label=["up", "down"]), task.processor(Base(path=str(bert))), "rows"
    )
    assert encoded["labels"] == [1, 0]
    assert encoded["length"] == [4, 3]


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 9, 10], ("9", "10")), (["10", "9", "-1"], ("-1", "9", "10")), (["10", "9", "nan"], ("10", "9", "nan"))],
)
def test_number_labels_sort_as_numbers(labels: list, names: tuple) -> None:
    assert Classification().resolved(table(text=["a"] * 3, label=labels), "rows").labels == names


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"text": ["a", "b"], "label": ["x", "x"]},
            "rows: expected at least two classes, all 2 rows have the label 'x'",
        ),
        ({"text": ["a", "b"], "label": ["x", None]}, "rows: row 2 has no label"),
        ({"text": ["a", "b"], "label": [1.0, float("nan")]}, "rows: row 2 has no label"),
        (
            {"text": ["a", "b"], "label": [["x", "y"], []]},
            r"rows: row 1 has the label \['x', 'y'\]; expected one class",
        ),
    ],
)
def test_refused_classes(columns: dict, sentence: str) -> None:
    with pytest.raises(at.AttunementError, match=sentence):
        Classification().resolved(table(**columns), "rows")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"text": ["a", "b"], "label": ["up", "upp"]}, "row 2 has the unknown label 'upp'.*nearest: 'up'"),
        ({"text": ["a", "  "], "label": ["up", "up"]}, "row 2 has no text in the column of the role 'text'"),
        ({"text": ["a", None], "label": ["up", "up"]}, "row 2 has no text"),
    ],
)
def test_refused_rows(bert: Path, columns: dict, sentence: str) -> None:
    task = Classification(labels=("down", "up"))
    with pytest.raises(at.AttunementError, match=sentence):
        task.encode(table(**columns), task.processor(Base(path=str(bert))), "test.csv")


def test_a_row_of_a_benchmark_without_its_answer_is_refused(bert: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    task = Classification().resolved(rows, "test")
    with pytest.raises(at.AttunementError, match=r"test: row 2 has no label \(it is -1\)"):
        task.encode(rows, task.processor(Base(path=str(bert))), "test")


@pytest.mark.parametrize("value", ["seven", None, float("nan")])
def test_refused_numbers(bert: Path, value: object) -> None:
    task = Regression()
    rows = [{"text": "a", "label": "1"}, {"text": "b", "label": None if value is None else str(value)}]
    with pytest.raises(at.AttunementError, match="row 2"):
        task.encode(datasets.Dataset.from_list(rows), task.processor(Base(path=str(bert))), "rows")


def test_loss_is_on_completions_only(llama: Path) -> None:
    task, tokenizer = CausalLM(), CausalLM().processor(Base(path=str(llama)))
    (row,) = task.encode(table(prompt=["the film was"], completion=["very good"]), tokenizer, "rows").to_list()
    assert tokenizer.decode(row["input_ids"]) == "the film was very good [SEP]"
    assert tokenizer.decode([i for i in row["labels"] if i >= 0]) == "very good [SEP]"


def test_loss_is_on_what_the_assistant_says(llama: Path) -> None:
    task, tokenizer = CausalLM(), CausalLM().processor(Base(path=str(llama)))
    talk = [
        {"role": role, "content": text}
        for role, text in [("user", "the film"), ("assistant", "good"), ("user", "and plot"), ("assistant", "bad")]
    ]
    (row,) = task.encode(table(messages=[talk]), tokenizer, "rows").to_list()
    assert tokenizer.decode([i for i in row["labels"] if i >= 0]) == "good <end> bad <end>"
    with pytest.raises(at.AttunementError, match="row 1: the conversation has no message of the role 'assistant'"):
        task.encode(table(messages=[talk[:1]]), tokenizer, "rows")


def test_a_long_prompt_loses_its_beginning_not_the_completion(llama: Path) -> None:
    task = CausalLM(max_length=4)
    tokenizer = task.processor(Base(path=str(llama)))
    (row,) = task.encode(table(prompt=["1 2 3 4 5"], completion=["good film"]), tokenizer, "rows").to_list()
    assert tokenizer.decode(row["input_ids"]) == "5 good film [SEP]"


def test_a_causal_task_says_which_columns_it_wants(llama: Path) -> None:
    task = CausalLM()
    with pytest.raises(at.AttunementError, match="needs the columns prompt and completion, or messages, or text"):
        task.encode(table(prompt=["a"]), task.processor(Base(path=str(llama))), "rows")


def test_a_prompt_is_a_text_or_empty(llama: Path) -> None:
    task, tokenizer = CausalLM(), CausalLM().processor(Base(path=str(llama)))
    with pytest.raises(
        at.AttunementError, match=r"rows: row 1 has no text in the column of the role 'prompt' \(it is 3\)"
    ):
        task.encode(table(prompt=[3], completion=["good"]), tokenizer, "rows")
    with pytest.raises(at.AttunementError, match=r"row 1 has no text in the column of the role 'prompt'"):
        task.answers(None, table(prompt=[3]), tokenizer, 8)
    rows = task.encode(table(prompt=[None, ""], completion=["good"] * 2), tokenizer, "rows").to_list()
    assert tokenizer.decode(rows[0]["input_ids"]) == tokenizer.decode(rows[1]["input_ids"]) == "[CLS] good [SEP]"
