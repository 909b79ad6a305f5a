"""Data for a recipe: hub data sets and files with named columns, checked before a model is loaded."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from attunement.errors import AttunementError, nearest
from attunement.train.section import Section
from attunement.train.words import near

if TYPE_CHECKING:
    import datasets

NO_ROWS = ("No columns to parse", "corresponds to no data")
"""What pandas and datasets say of a file without rows."""
READERS = {"csv": "csv", "tsv": "csv", "jsonl": "json", "json": "json", "ndjson": "json", "parquet": "parquet"}


class Data(Section):
    """Where the rows come from and what their columns mean."""

    source: str | None = None
    """A data set of the hub or a local data-set folder; `train`, `eval` and `test` are then splits of it."""
    config: str | None = None
    """The configuration of a hub data set that has several."""
    train: str = "train"
    """A split of `source` (slices as in `train[:80%]`), or a file: CSV, TSV, JSON lines or Parquet, globs allowed."""
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
            parts = splits["train"].train_test_split(test_size=self.holdout, seed=self.seed)
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
        chosen = {}
        for role, required in roles.items():
            column = self.columns.get(role, role)
            if column in table.column_names:
                chosen[role] = column
            elif required or role in self.columns:
                raise AttunementError(
                    f"{near(where)}: there is no column {column!r} for the role {role!r}; the columns are "
                    f"{', '.join(table.column_names)}{nearest(column, table.column_names)}"
                )
        table = table.select_columns(list(chosen.values()))
        return table.rename_columns({column: role for role, column in chosen.items() if column != role})


def _open(where: str, source: str | None, config: str | None) -> datasets.Dataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source is not None and suffix_of(where) not in READERS:
            return datasets.load_dataset(source, config, split=where)
        paths = sorted(glob.glob(where, recursive=True))
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
        options = {"sep": "\t"} if suffix == "tsv" else {}
        return datasets.load_dataset(READERS[suffix], data_files=paths, split="train", **options)
    except AttunementError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, from missing repositories to torn Parquet files
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        blank = source is None and not any(Path(path).stat().st_size for path in glob.glob(where, recursive=True))
        name = f"{source} {near(where)}" if source else near(where)
        if blank or any(words in cause for words in NO_ROWS):
            columns = source is None and READERS.get(suffix_of(where)) == "csv"
            wanted = "a line with the names of the columns and rows below it" if columns else "at least one row"
            raise AttunementError(f"data: {name} has no rows: expected {wanted}") from error
        raise AttunementError(f"data: {name} cannot be read: {cause or type(error).__name__}") from error


def suffix_of(path: str) -> str:
    """The kind of a file by its name: `csv` of `rows.csv.gz`."""
    return Path(path).name.lower().removesuffix(".gz").rpartition(".")[2]


def check_text(table: datasets.Dataset, role: str, where: str) -> None:
    """Refuse an empty text: raises `AttunementError` naming the row, counted from 1."""
    for number, text in enumerate(table[role], 1):
        if not isinstance(text, str) or not text.strip():
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
        found = set(table["label"])
        if None in found or "" in found:
            number = next(i for i, value in enumerate(table["label"], 1) if value in (None, ""))
            raise AttunementError(f"{where}: row {number} has no label")
        names = [str(value) for value in sorted(found)]
    if len(names) < 2:
        raise AttunementError(
            f"{where}: expected at least two classes, all {len(table)} rows have the label {names[0]!r}"
        )
    return names


def label_ids(table: datasets.Dataset, names: Sequence[str], where: str) -> list[int]:
    """The labels as positions in `names`. Raises `AttunementError` for a label that is not among them, with its row."""
    feature = table.features["label"]
    known: dict[Any, int] = {name: i for i, name in enumerate(names)}
    texts = [feature.int2str(v) if hasattr(feature, "names") and v is not None else v for v in table["label"]]
    for number, text in enumerate(texts, 1):
        if str(text) not in known:
            raise AttunementError(
                f"{where}: row {number} has the unknown label {text!r}; the {len(names)} labels come from the training "
                f"rows or from task.labels{nearest(str(text), names)}"
            )
    return [known[str(text)] for text in texts]
