"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Mark = tuple[int, str, float]
"""Step, name of a figure as the trainer logs it, value."""


def draw(marks: Sequence[Mark], metric: str, title: str, path: Path) -> None:
    """Loss and metric over the steps, side by side, as a PNG of 1500 x 600 pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = [(step, value) for step, name, value in marks if name == "loss"]
    score = sorted((step, value) for step, name, value in marks if name == f"eval_{metric}")
    left.plot(*zip(*loss, strict=True), color="#4c72b0", linewidth=1.8)
    left.set(title="training loss", xlabel="step", ylim=(0, None))
    right.plot(*zip(*score, strict=True), color="#c44e52", linewidth=1.8, marker="o", markersize=4)
    right.set(title=f"evaluation {metric}", xlabel="step", ylim=(0, 1) if metric == "accuracy" else None)
    step, value = score[-1]
    right.annotate(
        f"{value:.1%}", (step, value), xytext=(0, -16), textcoords="offset points", ha="right", fontweight="bold"
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
