"""The charts of the report as PNG and SVG, the same files for the same study: no dates, no random names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attunement.compare.records import Study, Trial, replace
from attunement.compare.report import curve
from attunement.compare.table import (
    ALL,
    COSTS,
    FULL,
    MEASURES,
    Measure,
    Row,
    families,
    higher,
    shown,
    unit_of,
    window,
)

COLOURS = [
    "#1f6fb4",
    "#b85300",
    "#26803a",
    "#c0323c",
    "#7a4fb0",
    "#85573f",
    "#0a7f88",
    "#b03d88",
    "#737312",
    "#3d434a",
    "#2b349c",
]
MARKS = ["o", "s", "^", "D", "v", "P", "p", "X", "*", "_", "<"]
INK, SOFT, MUTE, GRID, ACCENT = "#16191d", "#545c66", "#c3cad2", "#e8ecf0", "#0b5cad"
STYLE: Any = {
    "svg.hashsalt": "attunement",  # otherwise the names of clips and marks are drawn by chance
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


def write(folder: Path, study: Study, found: Mapping[str, list[Row]]) -> list[Path]:
    """Write `<task>-pareto`, and `<task>-curves` and `<task>-rates` of single tasks, each as PNG and SVG."""
    import matplotlib

    written: list[Path] = []
    names: list[str] = []
    numbers = families(found)
    with matplotlib.rc_context(STYLE):
        for task, rows in found.items():
            if not any(row.quality for row in rows):
                continue
            name = re.sub(r"[^\w.-]+", "-", task).strip("-") or "task"
            name += "" if (count := names.count(name)) == 0 else f"-{count + 1}"
            names.append(name)
            figures = {"pareto": _pareto(study, task, rows, numbers)}
            if task != ALL:
                figures |= {"curves": _curves(study, task, rows, numbers), "rates": _rates(study, task, rows, numbers)}
            for kind, figure in figures.items():
                if figure is not None:
                    written += _save(figure, folder / f"{name}-{kind}")
    return written


def _save(figure: Any, path: Path) -> list[Path]:
    import io

    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        made = io.BytesIO()
        figure.savefig(made, format=kind, dpi=150, metadata=metadata)
        paths.append(path.with_name(f"{path.name}.{kind}"))
        replace(paths[-1], made.getvalue())
    return paths


def _figure(columns: int, lines: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    return figure, list(panels.flat)


def _quality_axis(axis: Any, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if unit == "share":
        axis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))


def _cost_axis(axes: Any, measure: Measure, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a factor of 12; below the least a place for zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    def said(value: float, _: int) -> str:
        text = shown(value, measure.unit)
        return re.sub(r"\.0\b", "", re.sub(r"(\.\d)0×", r"\1×", text)) if value else "0"

    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > 12:
        zero = len(positive) < len(values)
        if zero:
            axes.set_xscale("symlog", linthresh=min(positive) / 1.5, linscale=0.25)
        else:
            axes.set_xscale("log")
        axes.set_xlim(-min(positive) / 6 if zero else min(positive) / 1.4, max(positive) * 1.5)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if zero:
            first = 10 ** math.ceil(math.log10(min(positive)))
            ticks = [0.0, *(float(first * 10**i) for i in range(9) if first * 10**i <= max(positive) * 1.5)]
            axes.set_xticks(ticks)
            axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(said))


def _pareto(study: Study, task: str, rows: Sequence[Row], numbers: Mapping[str, int]) -> Any:
    from matplotlib.lines import Line2D

    ranked = [row for row in rows if row.quality]
    costs = [key for key in COSTS if any(key in row.values for row in ranked)]
    if not costs:
        return None
    figure, panels = _figure(min(2, len(costs)), (len(costs) + 1) // 2, 5.6, 3.7)
    low, high = window(ranked)
    unit = unit_of(MEASURES[0], ranked[0].metric)
    named: list[Any] = []
    for axes, key in zip(panels, costs, strict=False):
        measure = next(one for one in MEASURES if one.key == key)
        able = [row for row in ranked if key in row.values]
        axes.set_ylim(low, high)
        _cost_axis(axes, measure, [row.values[key].mean for row in able])
        axes.grid(axis="y", color=GRID, zorder=0)
        axes.set_title(measure.title)
        axes.set_xlabel(measure.title.lower() + (", full fine-tuning = 1" if measure.unit == "ratio" else ""))
        axes.set_ylabel(ranked[0].metric.replace("_", " ") + (", %" if unit == "share" else ""))
        _quality_axis(axes.yaxis, unit)
        shown_rows = [row for row in able if low <= _q(row) <= high]
        front = sorted((row for row in shown_rows if key in row.front), key=lambda row: row.values[key].mean)
        if front:
            xs, ys = [row.values[key].mean for row in front], [_q(row) for row in front]
            edge = low if higher(front[0].metric) else high
            axes.step([xs[0], *xs], [edge, *ys], where="post", color=ACCENT, linewidth=1.2, zorder=2)
        for row in able:
            on = key in row.front or row.method == FULL
            y = min(max(_q(row), low + 0.015 * (high - low)), high - 0.015 * (high - low))
            mark, colour = MARKS[numbers[row.family]], COLOURS[numbers[row.family]]
            value = row.quality
            if on and value and value.low is not None and value.high is not None and y == _q(row):
                axes.vlines(
                    row.values[key].mean, value.low, value.high, color=colour, linewidth=0.9, alpha=0.7, zorder=3
                )
            axes.plot(
                row.values[key].mean,
                y,
                mark,
                color=colour,
                alpha=1 if on else 0.4,
                ms=5.5,
                mew=2 if mark == "_" else 0,
                zorder=4,
            )
        full = [row for row in shown_rows if row.method == FULL and row not in front]
        named.append((axes, [(row.values[key].mean, _q(row), row.label) for row in [*reversed(front), *full]]))
        if outside := [row.label for row in able if row not in shown_rows]:
            more = f", … ({len(outside)})" if len(outside) > 3 else ""
            said = f"off the axis: {', '.join(outside[:3])}{more}"
            axes.set_title(said, loc="right", fontsize=7, color=SOFT, fontweight="normal")
    for axes in panels[len(costs) :]:
        axes.set_visible(False)
    keys = [
        Line2D(
            [],
            [],
            marker=MARKS[n],
            color=COLOURS[n],
            linestyle="",
            ms=5.5,
            mew=2 if MARKS[n] == "_" else 0,
            label=name.replace("_", " "),
        )
        for name, n in numbers.items()
        if any(row.family == name for row in ranked)
    ]
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=math.ceil(len(keys) / math.ceil(len(keys) / 10)),
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    figure.suptitle(
        f"{study.name}: {task}, the mean over final runs; the front with 95 % intervals", fontsize=10, x=0.01, ha="left"
    )
    figure.draw_without_rendering()  # names are placed by their size in points, which the layout decides
    for axes, names in named:
        _names(axes, names)
    figure.set_layout_engine("none")
    return figure


def _q(row: Row) -> float:
    assert row.quality is not None
    return row.quality.mean


def _names(axes: Any, names: Sequence[tuple[float, float, str]]) -> None:
    """Labels beside their points, each where it covers no other; left out where there is no such place."""
    from matplotlib.patheffects import withStroke

    frame, right = axes.get_window_extent(), axes.figure.bbox.x1 - 2
    taken: list[Any] = []
    spots = ((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top"))
    for x, y, text in names:
        for dx, dy, across, up in spots:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=across, va=up, fontsize=7.5, color=INK, zorder=5
            )
            note.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
            box = note.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= min(frame.x1 + 8, right)
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 8
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _of(study: Study, task: str, row: Row, stage: str) -> list[Trial]:
    return [t for t in study.trials if t.task == task and t.label == row.label and t.stage == stage]


def _curves(study: Study, task: str, rows: Sequence[Row], numbers: Mapping[str, int]) -> Any:
    lines = {row.label: curve([t for t in _of(study, task, row, "final") if t.state == "done"]) for row in rows}
    ranked = [row for row in rows if row.quality and lines[row.label]]
    if not ranked:
        return None
    unit = unit_of(MEASURES[0], ranked[0].metric)
    metric = ranked[0].metric.replace("_", " ")
    kinds = [
        (place, title)
        for place, title in ((2, metric), (1, "training loss"))
        if any(sum(m[place] is not None for m in lines[r.label]) > 1 for r in ranked)
    ]
    if not kinds:
        return None
    figure, panels = _figure(len(kinds), 1, 5.6, 3.7)
    named = [row for row in ranked if row.family != "baseline"][:5]
    for axes, (place, title) in zip(panels, kinds, strict=True):
        for row in reversed(ranked):
            marks = [(m[0], m[place]) for m in lines[row.label] if m[place] is not None]
            if not marks:
                continue
            full = row.method == FULL
            how = {"color": MUTE, "linewidth": 0.7, "zorder": 1}
            if row in named:
                how = {"color": COLOURS[named.index(row)], "linewidth": 1.5, "zorder": 3, "label": row.label}
            if full:
                how = {"color": INK, "linewidth": 1.3, "zorder": 4, "linestyle": "--", "label": row.label}
            axes.plot(*zip(*marks, strict=True), **how)
        axes.set_title(title[0].upper() + title[1:] + (", %" if place == 2 and unit == "share" else ""))
        axes.set_xlabel("step")
        if place == 2:
            low, high = window(ranked)
            reach = 1.5 * (high - low)
            bottom, top = axes.get_ylim()
            axes.set_ylim(
                (max(bottom, low - reach), high) if higher(ranked[0].metric) else (low, min(top, high + reach))
            )
            _quality_axis(axes.yaxis, unit)
        handles, words = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], words[::-1], frameon=False, fontsize=8)
    figure.suptitle(f"{study.name}: {task}, means over the final runs", fontsize=10, x=0.01, ha="left")
    return figure


def _rates(study: Study, task: str, rows: Sequence[Row], numbers: Mapping[str, int]) -> Any:
    """A small chart for each method, all in one pair of axes: sixty pairs would take matplotlib a minute."""
    import numpy
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    tried = {row.label: [t for t in _of(study, task, row, "search") if t.rate] for row in rows}
    chosen = [row for row in rows if tried[row.label]]
    done = [t.quality for row in chosen for t in tried[row.label] if t.state == "done" and t.quality is not None]
    if not done:
        return None
    rates = [t.rate or 1.0 for row in chosen for t in tried[row.label]]
    first, third = numpy.quantile(done, (0.25, 0.75))
    low, high = max(min(done), first - 3 * (third - first)), max(done)
    high = high if high > low else low + 0.1
    left, right = math.log10(min(rates) / 1.2), math.log10(max(rates) * 1.2)
    columns = min(6, len(chosen))
    lines = -(-len(chosen) // columns)
    wide, tall, across, down = 1.75 * columns + 0.5, 1.2 * lines + 0.75, 1.16, 1.6

    figure = Figure(figsize=(wide, tall))
    axes = figure.add_axes((0.45 / wide, 0.3 / tall, 1 - 0.55 / wide, 1 - 0.85 / tall))
    axes.set(xlim=(0, columns * across - 0.16), ylim=(-lines * down + 0.6 - 0.05, 1.35))
    axes.axis("off")
    unit = unit_of(MEASURES[0], chosen[0].metric)
    decades = range(math.ceil(left), math.floor(right) + 1)
    frames, dotted = [], []
    for place, row in enumerate(chosen):
        at, base = place % columns * across, -(place // columns) * down
        colour = COLOURS[numbers[row.family]]

        def xy(rate: float, quality: float, at: float = at, base: float = base) -> tuple[float, float]:
            share = (quality - low) / (high - low)
            return at + (math.log10(rate) - left) / (right - left), base + min(max(share, 0.0), 1.0)

        frames += [[(at, base - 0.06), (at + 1, base - 0.06)], [(at, base - 0.06), (at, base + 1.04)]]
        frames += [[(xy(10.0**e, low)[0], base - 0.06), (xy(10.0**e, low)[0], base - 0.12)] for e in decades]
        ends = sorted(
            (t.rate or 1.0, t.quality) for t in tried[row.label] if t.state == "done" and t.quality is not None
        )
        if ends:
            axes.plot(*zip(*[xy(*end) for end in ends], strict=True), "o-", color=colour, ms=2.8, linewidth=1)
        for state, mark in (("pruned", "|"), ("failed", "x"), ("diverged", "x")):
            lost = [xy(t.rate or 1.0, low) for t in tried[row.label] if t.state == state]
            if lost:
                tint = SOFT if state == "pruned" else COLOURS[3]
                axes.plot(*zip(*lost, strict=True), mark, color=tint, ms=4.5, mew=1)
        if "rate" in row.values:
            x, _ = xy(row.values["rate"].mean, low)
            dotted.append([(x, base - 0.06), (x, base + 1.04)])
        axes.text(at, base + 1.12, row.label, fontsize=7.5, color=INK, va="bottom", fontweight="bold")
        if place % columns == 0:
            for value in (low, high):
                text = shown(value, unit).removesuffix(" %")
                axes.text(at - 0.03, xy(1.0, value)[1], text, fontsize=6.5, color=SOFT, ha="right", va="center")
        if place + columns >= len(chosen):
            for e in decades:
                axes.text(xy(10.0**e, low)[0], base - 0.16, f"1e{e}", fontsize=6.5, color=SOFT, ha="center", va="top")
    axes.add_collection(LineCollection(frames, colors=SOFT, linewidths=0.6))
    axes.add_collection(LineCollection(dotted, colors=INK, linewidths=0.8, linestyles=":"))
    said = "quality by learning rate in the search; dotted: the chosen rate, | pruned, × failed or diverged"
    figure.suptitle(f"{study.name}: {task}, {said}", fontsize=9, x=0.01, y=1 - 0.08 / tall, ha="left", va="top")
    return figure
