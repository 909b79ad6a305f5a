"""`attune compare`: what a person types, sees while it goes on, and reads at the end."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from attunement.errors import AttunementError, nearest

if TYPE_CHECKING:
    from attunement.compare.engine import Tally
    from attunement.compare.study import Study
    from attunement.compare.together import Team


METHODS = "lora,ia3,bottleneck,lst"
LONG = 120.0
"""Seconds of training from which a share of them says something."""


def compare(
    file: Annotated[Path | None, typer.Argument(metavar="[STUDY.yaml]", help="The study.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub id, where there is no study file.")] = None,
    data: Annotated[str | None, typer.Option(help="The training rows: a CSV, JSON-lines or Parquet file.")] = None,
    test: Annotated[
        str | None, typer.Option(help="The rows for the final runs; held out of --data by default.")
    ] = None,
    task: Annotated[str, typer.Option(help="classification, regression, causal-lm or image-classification.")] = (
        "classification"
    ),
    columns: Annotated[
        str | None, typer.Option(metavar="ROLE=COLUMN,...", help="Which column is what: 'text=question,label=intent'.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Names and globs: 'lora,vera,low_rank/*'.")] = METHODS,
    budget: Annotated[str | None, typer.Option(help="90s, 30m, 2h: no further trial starts after it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the study; by default that of the data file.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder; by default runs/compare/NAME.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="A database that several machines share: postgresql://...")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that work side by side.")] = None,
    on: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    demo: Annotated[bool, typer.Option("--demo", help="Four methods on MiniLM and a part of banking77.")] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what failed, and try again what was refused.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only measure memory and times again: on a machine that is idle now.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the report of what there is.")] = False,
) -> None:
    """Compare methods on your model and data: a search of the rate for each, then seeds, then one page.

    The same command goes on where it was stopped; further ones beside it share the work.
    """
    from attunement import cli
    from attunement.compare.engine import Engine
    from attunement.compare.study import seconds
    from attunement.train.words import not_alone

    with contextlib.ExitStack() as launch:
        team, size = None, int(os.environ.get("WORLD_SIZE", "1"))
        not_alone("compare")
        if size > 1:
            from attunement.compare.together import Team

            if on == "ray" or workers is not None:
                if os.environ.get("RANK", "0") != "0":
                    raise typer.Exit(2)
                raise AttunementError(
                    f"{'--on ray' if on == 'ray' else '--workers'}: the {size} processes of this launch train every trial "
                    "together; start without a launcher to spread the trials"
                )
            team = Team()
            if team.rank:
                team.follow()
                return
            launch.enter_context(team)
        places = ("local", "ray")
        if on not in places:
            raise AttunementError(f"--on must be one of {', '.join(places)}, got {on!r}{nearest(on, places)}")
        study = _study(file, model, data, test, task, columns, methods, name, demo, out)
        changed: dict[str, Any] = {"budget": budget or study.budget, "storage": storage or study.storage}
        changed |= {"output": str(out)} if out is not None else {}
        changed |= {} if team is None else {"processes": study.processes or team.size}
        seconds(changed["budget"])
        study = study.model_copy(update=changed)
        if report and retry:
            raise AttunementError("--retry runs trials, and --report runs none; expected one of them")
        if measure and (report or retry or workers is not None or on != "local"):
            raise AttunementError("--measure goes by itself: what else runs would be measured, too")
        if measure:
            shown = cli.console.status("") if cli.console.is_terminal else None

            def told(tally: Tally) -> None:
                if shown is not None:
                    shown.update(tally.now)
                elif tally.now:
                    cli.console.print(tally.now, highlight=False, soft_wrap=True)

            with shown or contextlib.nullcontext():
                count = Engine(study, told, team=team).measure()
            cli.console.print(f"What {count} methods cost was measured again.", highlight=False)
        elif report:
            again(cli.console, study)
        else:
            if retry:
                count = Engine(study, writes=False, team=team).retry()
                cli.console.print(f"{count} of what failed or was refused is tried again.", highlight=False)
            run(cli.console, study, on, workers, team)
        cli.console.print(Text.assemble("The page: ", (str(study.folder / "report.html"), "bold")), soft_wrap=True)


def _study(
    file: Path | None,
    model: str | None,
    data: str | None,
    test: str | None,
    task: str,
    columns: str | None,
    methods: str,
    name: str | None,
    demo: bool,
    out: Path | None,
) -> Study:
    from attunement.compare import demo as demonstration
    from attunement.compare.study import load, made

    ways = [file is not None, bool(model or data), demo]
    if sum(ways) != 1:
        said = "several" if sum(ways) else "none"
        raise AttunementError(
            f"compare: expected one of STUDY.yaml, --model with --data, and --demo; got {said} of them"
        )
    if not (model or data):
        beside = {"methods": methods != METHODS, "task": task != "classification", "test": test, "name": name}
        beside |= {"columns": columns}
        if wrong := next((option for option, given in beside.items() if given), None):
            raise AttunementError(f"--{wrong} goes with --model and --data; {'the demo' if demo else file} has its own")
    if demo:
        return demonstration.study(out)
    if file is not None:
        return load(file)
    if not (model and data):
        raise AttunementError(f"compare: --{'data' if model else 'model'} is missing")
    values: dict[str, Any] = {"model": model, "data": {"train": data}, "task": task, "methods": methods}
    if test:
        values["data"]["test"] = test
    if columns is not None:
        values["data"]["columns"] = _columns(columns)
    values["name"] = name or Path(data).name.partition(".")[0]
    study = made(values, "compare")
    for one in study.tasks.values():
        one.data.known(one.task.roles)
    return study


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    for role, sign, column in pairs:
        if not (role.strip() and sign and column.strip()):
            raise AttunementError(
                f"--columns must be ROLE=COLUMN,..., such as text=question,label=intent, got {role + sign + column!r}"
            )
    return {role.strip(): column.strip() for role, _, column in pairs}


def again(console: Console, study: Study) -> None:
    """Write the page of what a study has come to.

    Raises `AttunementError` where that was found under other settings than these.
    """
    from attunement.compare import records
    from attunement.compare.database import difference
    from attunement.compare.engine import publish
    from attunement.train.words import near, short

    kept = records.read(study.folder).settings
    now = study.settings() | {"processes": kept.get("processes", 1)}  # nothing is run, whoever has started this
    if kept and (said := difference(kept, now)):
        raise AttunementError(
            f"--report: what is in {near(study.folder)} was found with other settings: {said}; "
            "set them back, or run the study under another name"
        )
    publish(study.folder)
    more = [short(one) for one in now["methods"] if one not in kept.get("methods", now["methods"])]
    if more:
        text = f"Not on the page, as they have not run: {', '.join(more)}; without --report they are run."
        console.print(Text(text, style="yellow"), soft_wrap=True)


def run(console: Console, study: Study, on: str, workers: int | None, team: Team | None = None) -> Tally:
    """The whole study with a display; Ctrl-C keeps what is done and says how to go on."""
    from attunement.compare import fan_out
    from attunement.compare.engine import Engine
    from attunement.compare.study import masked
    from attunement.compare.together import launcher
    from attunement.train.words import command, near

    display = Display(console, workers or 1)
    before = {sent: signal.signal(sent, display.stop) for sent in (signal.SIGINT, signal.SIGTERM)}
    try:
        if on == "ray":
            tally = fan_out.on_ray(study, workers, display)
        elif workers is not None and workers > 1:
            tally = fan_out.on_processes(study, workers, display)
        else:
            engine = Engine(study, display, team=team)
            if team is not None:
                team.begin(study)
            if engine.base.told:
                console.print(engine.base.told, soft_wrap=True)
            tally = engine.work()
    except KeyboardInterrupt:
        if team is not None:
            before = dict.fromkeys(before, signal.SIG_IGN)  # the launcher sends another one while this is written
        for sent, handler in before.items():
            signal.signal(sent, handler)
        display.close()
        begun = command() if team is None else launcher(team.size)
        typed = f"{begun} {masked(shlex.join(sys.argv[1:]))}"
        kept = f"\nStopped; {display.done} finished trials are kept in {near(study.folder)}. Go on with: "
        console.print(Text.assemble(kept, (typed, "bold")), soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        display.close()
        for sent, handler in before.items():
            signal.signal(sent, handler)
    for said in tally.missing:
        console.print(Text(f"Not run: {said}", style="yellow"), soft_wrap=True)
    found_out(console, study)
    if tally.busy:
        share = f" ({tally.overhead / tally.busy:.1%})" if tally.busy > LONG else ""
        waited = f", {tally.waiting:.0f} s of waiting for other processes" if tally.waiting >= 1 else ""
        console.print(
            f"{tally.done} trials; {tally.busy:.0f} s of training and evaluating, {tally.measuring:.0f} s of measuring "
            f"costs, {tally.loading:.0f} s of loading{waited}; the arena itself added {tally.overhead:.0f} s{share}",
            highlight=False,
            soft_wrap=True,
        )
    return tally


def found_out(console: Console, study: Study) -> None:
    """What could not be run at all, and the best of each task, or that nothing beats the model as it is."""
    from attunement.compare import records, table
    from attunement.compare.findings import BEST, NO_GAIN, findings

    if not (study.folder / records.TRIALS).is_file():
        return
    made = records.read(study.folder)
    for one in made.trials:
        if one.id.endswith("/refused"):
            said = f"Refused on {one.task}: {one.label}: {one.error}"
            console.print(Text(said, style="yellow"), soft_wrap=True)
    for task, rows in table.rows(made).items():
        for found in findings(made, rows):
            if found.title in (NO_GAIN, BEST):
                console.print(Text.assemble((f"{task}: ", "bold"), found.sentence), soft_wrap=True)


class Display:
    """Trials done, the best so far and the time left; a line for every trial where there is no terminal."""

    def __init__(self, console: Console, workers: int = 1):
        self.console, self.workers, self.done, self.stopped = console, workers, 0, False
        self.began, self.first, self.trained, self.spent = time.monotonic(), -1, 0, 0.0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn("[dim]{task.fields[detail]}"), console=console)
        self.task = self.bar.add_task("trials", total=None, detail="")
        if console.is_terminal:
            self.bar.start()

    def stop(self, *_: Any) -> None:
        """Ctrl-C; one that falls into a finalizer, where Python drops what is raised, comes at the next look."""
        self.stopped = True
        raise KeyboardInterrupt

    def __call__(self, tally: Tally) -> None:
        if self.first < 0:
            self.first, self.trained, self.spent = tally.done, tally.done - tally.still, tally.spent
        best = ", ".join(f"best {quality:.3f} {label}" for quality, label in tally.best.values())
        detail = "  ".join(part for part in (tally.now, best, self._left(tally)) if part)
        self.bar.update(self.task, completed=tally.done, total=tally.total or None, detail=detail)
        if not self.console.is_terminal and tally.done > max(self.done, self.first):
            self.console.print(f"{tally.done}/{tally.total}  {detail}", highlight=False, soft_wrap=True)
        self.done = tally.done
        if self.stopped:
            raise KeyboardInterrupt

    def _left(self, tally: Tally) -> str:
        """What the open trials will take if all goes on as fast as since the start, and no more than the budget leaves."""
        done = tally.done - tally.still - self.trained  # zero-shot takes no time, so it says nothing of the rest
        if done < 2 or not tally.ahead:
            return ""
        worked = time.monotonic() - self.began - tally.loading
        left = worked / max(tally.spent - self.spent, 1e-9) * tally.ahead
        left = left if tally.left is None else min(left, tally.left)
        if left < 60:
            return "less than a minute left"
        return f"about {left / 3600:.1f} h left" if left > 5400 else f"about {math.ceil(left / 60)} min left"

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.console.is_terminal:
            self.bar.stop()
