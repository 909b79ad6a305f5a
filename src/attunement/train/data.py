"""Data for a recipe: hub data sets and files with named columns, checked before a model is loaded."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from attunement.errors import AttunementError, nearest
from attunement.train.section import Section
from attunement.train.words import near, short

if TYPE_CHECKING:
    import datasets

NO_ROWS = ("No columns to parse", "corresponds to no data")
"""What pandas and datasets say of a file without rows."""
ROW = "row"
"""The column in which rows that were shuffled keep their numbers."""
READERS = {"csv": "csv", "tsv": "csv", "jsonl": "json", "json": "json", "ndjson": "json", "parquet": "parquet"}


class Data(Section):
    """Where the rows come from and what their columns mean."""

    source: str | None = None
    """A data set of the hub or a local data-set folder; `train`, `eval` and `test` are then splits of it."""
    config: str | None = None
    """The configuration of a hub data set that has several."""
    train: str = "train"
    """A split of `source` (slices as in `train[:80%]`), or a file: CSV, TSV, JSON lines or Parquet, globs allowed. The
    cells of a CSV or TSV file are texts as they are written there; only an empty one is missing."""
    eval: str | None = None
    """A split or a file to evaluate on during training; without it, `holdout` of the training rows."""
    test: str | None = None
    """A split or a file that is only looked at after training. Files are looked for beside the recipe file, then in
    the current folder; a run keeps their full paths."""
    columns: dict[str, str] = Field(default={})
    """Which column plays which role: `{text: question, label: intent}`. Any other role has a column of its own name."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training rows kept for evaluation where `eval` is not given; 0 for none."""
    seed: int = 0
    """Decides which rows are held out."""

    def load(self, roles: Mapping[str, bool], only: str | None = None) -> dict[str, datasets.Dataset]:
        """The splits, or what is needed for `only` one, columns renamed to `roles` (role -> required), the rest dropped.

        Raises `AttunementError` for a file or split that is not there, and for a missing column (with the nearest).
        """
        wanted = {"train": self.train, "eval": self.eval, "test": self.test}
        if only == "test" or (only == "eval" and self.eval):
            wanted = {only: wanted[only]}
        splits = {split: self.read(where, roles) for split, where in wanted.items() if where}
        if "train" in splits and "eval" not in splits and self.holdout and len(splits["train"]) > 1:
            every = splits["train"].add_column(ROW, list(range(1, len(splits["train"]) + 1)))
            parts = every.train_test_split(test_size=self.holdout, seed=self.seed)
            splits |= {"train": parts["train"], "eval": parts["test"]}
        return splits

    def known(self, roles: Mapping[str, bool]) -> None:
        """Refuse `columns` that name a role which the task does not have: raises `AttunementError`."""
        unknown = [role for role in self.columns if role not in roles]
        if unknown:
            raise AttunementError(
                f"data.columns: this task has no role {unknown[0]!r}; it has {', '.join(roles)}"
                f"{nearest(unknown[0], roles)}"
            )

    def read(self, where: str, roles: Mapping[str, bool]) -> datasets.Dataset:
        """One split or file with its columns renamed to the roles they play."""
        self.known(roles)
        table = _open(where, self.source, self.config)
        chosen: dict[str, str] = {}
        for role, required in sorted(roles.items(), key=lambda one: one[0] not in self.columns):
            column = self.columns.get(role, role)
            other = next((other for other, taken in chosen.items() if taken == column), None)
            if other is not None and (required or role in self.columns):
                raise AttunementError(
                    f"data.columns: the column {column!r} has the role {other!r} and cannot be {role!r} too; expected one "
                    "role for each column"
                )
            if other is None and column in table.column_names:
                chosen[role] = column
            elif required or role in self.columns:
                raise AttunementError(
                    f"{near(where)}: there is no column {column!r} for the role {role!r}; the columns are "
                    f"{', '.join(table.column_names)}{nearest(column, table.column_names)}"
                )
        chosen = {role: chosen[role] for role in roles if role in chosen}
        table = table.select_columns(list(chosen.values()))
        return table.rename_columns({column: role for role, column in chosen.items() if column != role})


def _open(where: str, source: str | None, config: str | None) -> datasets.Dataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source is not None and suffix_of(where) not in READERS:
            return datasets.load_dataset(source, config, split=where)
        paths = _files(where)
        if not paths:
            where = near(where)
            parent = Path(where).parent
            beside = [str(parent / p.name) for p in parent.glob("*")] if parent.is_dir() else []
            raise AttunementError(f"data: there is no file {where!r}{nearest(where, beside)}")
        suffix = suffix_of(paths[0])
        if suffix not in READERS:
            raise AttunementError(
                f"data: {near(where)!r} is none of the kinds that are read: {', '.join(READERS)}{nearest(suffix, READERS)}"
            )
        options = _as_written(paths, "\t" if suffix == "tsv" else ",") if READERS[suffix] == "csv" else {}
        escaped = [glob.escape(path) for path in paths]  # datasets takes every path for a pattern
        return datasets.load_dataset(READERS[suffix], data_files=escaped, split="train", **options)
    except AttunementError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, from missing repositories to torn Parquet files
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        blank = source is None and not any(Path(path).stat().st_size for path in _files(where))
        name = f"{source} {near(where)}" if source else near(where)
        if blank or any(words in cause for words in NO_ROWS):
            columns = source is None and READERS.get(suffix_of(where)) == "csv"
            wanted = "a line with the names of the columns and rows below it" if columns else "at least one row"
            raise AttunementError(f"data: {name} has no rows: expected {wanted}") from error
        raise AttunementError(f"data: {name} cannot be read: {cause or type(error).__name__}") from error


def _files(where: str) -> list[str]:
    return [where] if Path(where).is_file() else sorted(glob.glob(where, recursive=True))


def _as_written(paths: Sequence[str], sep: str) -> dict[str, Any]:
    """How `datasets` is to read CSV files: left to itself, pandas guesses a kind for each column, and `007` becomes 7."""
    import pandas
    from datasets import Features, Value

    tops = [pandas.read_csv(path, sep=sep, nrows=1, dtype=str) for path in paths]
    for path, top in zip(paths, tops, strict=True):
        if len(top) and not isinstance(top.index, pandas.RangeIndex):  # cells without a name, taken for the row's
            raise AttunementError(
                f"data: {near(path)} has {top.index.nlevels + len(top.columns)} cells in its first row and names for "
                f"{len(top.columns)} of them: {', '.join(top.columns)}; expected a name for every cell, and texts that hold "
                f"a {'tab' if sep != ',' else 'comma'} in quotes"
            )
    first, *others = [list(top.columns) for top in tops]
    for path, head in zip(paths[1:], others, strict=True):
        if set(head) != set(first):
            raise AttunementError(
                f"data: {near(path)} has the columns {', '.join(head)}, and {near(paths[0])}, which is read with it, has "
                f"{', '.join(first)}; expected the same in every file"
            )
    features = Features({name: Value("string") for name in first})
    return {"sep": sep, "features": features, "keep_default_na": False, "na_values": [""]}


def suffix_of(path: str) -> str:
    """The kind of a file by its name: `csv` of `rows.csv.gz`."""
    return Path(path).name.lower().removesuffix(".gz").rpartition(".")[2]


def numbers(table: datasets.Dataset) -> Sequence[int]:
    """The numbers of the rows, counted from 1 in the file or split that they were read from."""
    return table[ROW][:] if ROW in table.column_names else range(1, len(table) + 1)


def check_text(table: datasets.Dataset, role: str, where: str, blank: bool = False) -> None:
    """Refuse what is no text, and an empty one unless it may be `blank`: raises `AttunementError` naming the row."""
    for number, text in zip(numbers(table), table[role][:], strict=True):
        if not ((blank and text is None) or (isinstance(text, str) and (blank or text.strip()))):
            raise AttunementError(
                f"{where}: row {number} has no text in the column of the role {role!r} (it is {text!r})"
            )


def label_names(table: datasets.Dataset, declared: Sequence[str] | None, where: str) -> list[str]:
    """The classes, in order: as declared, as the data set declares them, or as found and sorted.

    Raises `AttunementError` where there is one class only or where a row has no label.
    """
    feature = table.features["label"]
    if declared is not None:
        names = list(declared)
    elif hasattr(feature, "names"):
        names = list(feature.names)
    else:
        _check_labels(table, where)
        names = _in_order({str(value) for value in table["label"][:]})
    if len(names) < 2:
        raise AttunementError(
            f"{where}: expected at least two classes, all {len(table)} rows have the label {names[0]!r}"
        )
    return names


def _check_labels(table: datasets.Dataset, where: str) -> None:
    """Refuse a row without a label (-1 in the test rows of benchmarks) or with several."""
    declared = hasattr(table.features["label"], "names")
    for number, value in zip(numbers(table), table["label"][:], strict=True):
        if value is None or value == "" or value != value or (declared and value < 0):
            raise AttunementError(f"{where}: row {number} has no label (it is {value!r})")
        if isinstance(value, list | dict):
            raise AttunementError(f"{where}: row {number} has the label {short(value)}; expected one class in each row")


def _in_order(names: set[str]) -> list[str]:
    """Sorted: as numbers where all of them are numbers, else as texts."""
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    numeric = all(map(isfinite, values.values()))
    return sorted(names, key=lambda name: (values[name], name)) if numeric else sorted(names)


def label_ids(table: datasets.Dataset, names: Sequence[str], where: str) -> list[int]:
    """The labels as positions in `names`. Raises `AttunementError` for a label that is not among them, with its row."""
    feature = table.features["label"]
    known: dict[Any, int] = {name: i for i, name in enumerate(names)}
    _check_labels(table, where)
    texts = [feature.int2str(v) if hasattr(feature, "names") else v for v in table["label"][:]]
    for number, text in zip(numbers(table), texts, strict=True):
        if str(text) not in known:
            raise AttunementError(
                f"{where}: row {number} has the unknown label {text!r}; the {len(names)} labels come from the training "
                f"rows or from task.labels{nearest(str(text), names)}"
            )
    return [known[str(text)] for text in texts]
