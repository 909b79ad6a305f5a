"""The table in the terminal, one JSON file a benchmark, and the table of all of them in Markdown."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Result

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("bar", "ours", "theirs", "ratio", "95 % interval", "at most", "")


def amount(value: float, unit: str) -> str:
    """A figure as a person reads it: `12.3 ms`, `4.56 MB`, `8.8 %`."""
    if unit == "share":
        return f"{value:.2%}"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def cells(result: Result) -> tuple[str, ...]:
    interval = "exact" if result.low == result.high else f"{result.low:.2f} - {result.high:.2f}"
    limit = "" if result.limit is None else f"{result.limit:.2f}x"
    figures = (amount(result.ours, result.unit), amount(result.peft, result.unit), f"{result.ratio:.2f}x")
    return (result.bar, *figures, interval, limit, result.verdict)


def show(results: Sequence[Result]) -> None:
    """The table, coloured."""
    table = Table(title="Attunement beside PEFT", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("bar", "") else "right")
    for result in results:
        table.add_row(*cells(result), style="green" if result.met else "red")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def write(name: str, results: Sequence[Result]) -> None:
    """`results/<name>.json`: the figures, and what they were measured with."""
    RESULTS.mkdir(exist_ok=True)
    made: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("attunement", "torch", "transformers", "peft")},
        "results": [{**asdict(result), "met": result.met} for result in results],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")


def write_table(order: Sequence[str]) -> None:
    """`results/README.md` from every JSON file there is, in this order."""
    lines = [
        "# Attunement beside PEFT",
        "",
        "Written by `python -m benchmarks`. Theirs is PEFT's unless the row says what it is beside.",
        "Both sides run in one process on equal weights, in rounds whose order is",
        "shuffled; figures are medians on a CPU, the interval is a bootstrap over rounds. An overhead is what is left",
        "after the bare model's time is taken off. The LoRA step and the test error meet their bar where the interval",
        "reaches it, the others where the ratio does. A median over methods is that of their ratios. A method that stands",
        "twice was measured twice, beside others and on its own, with a bar of each.",
        "",
        "What every method is worth in accuracy, trained numbers, bytes kept for backward and step time on a real task is in",
        "[a study of all of them](../../docs/studies/banking77-few/table.csv), with",
        "[its report](../../docs/studies/banking77-few/report.html).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * 5 + "---|",
    ]
    facts: dict[str, list[str]] = {}
    for name in order:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        made = json.loads(path.read_text())
        for values in made.pop("results"):
            values.pop("met")
            lines.append("| " + " | ".join(cells(Result(**values))) + " |")
        facts.setdefault(", ".join(f"{key} {value}" for key, value in made.items()), []).append(name)
    lines += ["", *(f"{', '.join(names)}: {fact}.  " for fact, names in facts.items())]
    (RESULTS / "README.md").write_text("\n".join(lines).rstrip() + "\n")
