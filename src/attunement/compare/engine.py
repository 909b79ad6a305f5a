"""The arena's work: which trial comes next, run and stored, until every method has its search and its seeds.

Each process that works on a study asks the database what is open, so that one that was killed goes on where it was and
several share one study. The trials of one search follow each other, for sampler and pruner look at those before; searches
of different methods, and final seeds, run side by side. What is found depends on the settings alone, not on how many
processes found it.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from attunement.compare import rates, records, trial
from attunement.compare.database import Database, Line, beating, saying
from attunement.compare.records import BASELINES, Progress, Trial
from attunement.compare.study import FULL, PROBE, ZERO, Study, entries, launchers, seconds
from attunement.compare.trial import Ground, Outcome
from attunement.errors import AttunementError
from attunement.train.words import near

if TYPE_CHECKING:
    from attunement.compare.together import Team

POLL = 1.0
MANY = 5
"""Methods whose times say what another takes; of fewer the baselines' times are taken too."""


@dataclass(frozen=True)
class Job:
    """One trial to run."""

    line: Line
    stage: str
    slot: int


@dataclass
class Tally:
    """How far a study is, for whoever watches.

    Attributes:
        total: trials of the whole study; done: finished, `still` of them without training; best: quality and label of the
            best final or else search trial.
        spent: seconds of the finished trials, by whichever process; ahead: those that the open ones are expected to take;
            left: those that the budget leaves, where there is one.
        busy: seconds that this process spent in attaching, training and evaluating; `measuring` what methods cost;
            `whole` altogether.
        missing: what the budget left out, a sentence each.
    """

    total: int = 0
    done: int = 0
    still: int = 0
    now: str = ""
    best: dict[str, tuple[float, str]] = field(default_factory=dict)
    spent: float = 0.0
    ahead: float = 0.0
    left: float | None = None
    busy: float = 0.0
    measuring: float = 0.0
    loading: float = 0.0
    waiting: float = 0.0
    whole: float = 0.0
    lengths: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        """Seconds that were neither training, evaluating, loading, measuring nor waiting for another process's trial."""
        return max(0.0, self.whole - self.busy - self.measuring - self.loading - self.waiting)


class Engine:
    """A process that works on a study.

    Args:
        team: the processes that train each trial together, where there are several; this is the first of them.

    Raises `AttunementError` where the study began with other settings or its database cannot be used.
    """

    def __init__(
        self,
        study: Study,
        watch: Callable[[Tally], None] = lambda _: None,
        writes: bool = True,
        team: Team | None = None,
    ):
        together(study, 1 if team is None else team.size)
        self.study, self.watch, self.writes, self.team = study, watch, writes, team
        self.began = time.perf_counter()
        self.base = Database(study)
        self.entries = entries(study)
        self.lines = [self.base.line(task, entry) for task in study.tasks for entry in self.entries]
        self.grounds: dict[str, Ground] = {}
        self.tally = Tally()
        self.found: dict[int, list[Trial]] = {}
        self.looked = self.looking = 0.0
        self.written = -1
        self.seen = self.over = False
        budget = seconds(study.budget)
        self.deadline = None if budget is None else time.monotonic() + budget
        if self.base.head.user_attrs.get("cap") and self.base.head.user_attrs.get("capped") != study.budget:
            self.base.remember("cap", None)  # more time was given

    # --- what comes next ---

    def cap(self, line: Line | None = None) -> int:
        """Trials of every search: the study's, or those that all methods had when a budget was spent.

        The search of a probe that finds the rate of heads for all methods is never cut.
        """
        trials = self.study.search.trials
        if self.deadline is None or (line is not None and self.leads(line)):
            return trials
        return self.base.head.user_attrs.get("cap") or trials

    def next(self) -> Job | bool | None:
        """The next open trial, None where everything is done, False where others work on all that is left.

        Without a budget one method is finished before the next begins, so that a study that is stopped has whole methods;
        with one all methods go through their first rate, then their second, so that they have had the same.
        """
        found, others = [], False
        for place, line in enumerate(self.lines):
            if line.complete:
                continue
            stage, slots = self._open(line, self.cap(line))
            if stage is None:
                line.complete = True
                continue
            if not slots:
                others = True
                continue
            job = Job(line, stage, slots[0])
            if self.deadline is None:
                return job
            found.append(((stage == "final", job.slot, place), job))
        if found:
            return min(found, key=lambda one: one[0])[1]
        return False if others else None

    def _open(self, line: Line, cap: int) -> tuple[str | None, list[int]]:
        """The stage that a line is in and its slots that nobody works on; (None, []) where it is complete."""
        if line.fact("refused") is not None:
            return None, []
        if line.entry.method not in (ZERO, PROBE) and self.head_rate(line.task) is None:
            return "search", []  # when the probe's search is over
        if line.entry.method != ZERO:
            slots = line.slots("search")
            done = [slot for slot, one in slots.items() if one.state.is_finished() and slot < cap]
            if len(done) < cap:
                following = next(slot for slot in range(cap) if slot not in slots or slot not in done)
                return "search", [] if following in slots or line.open("search") else [following]
            line.rate = best_rate(line, cap)
            if line.rate is None:
                return None, []
        slots = line.slots("final")
        if sum(one.state.is_finished() for slot, one in slots.items() if slot < self.study.seeds) == self.study.seeds:
            return None, []
        if line.open("final"):
            return "final", []
        return "final", [slot for slot in range(self.study.seeds) if slot not in slots]

    def leads(self, line: Line) -> bool:
        """Whether the search of a line finds the rate of task heads for all others."""
        return line.entry.method == PROBE and self.study.search.heads == "probe"

    def head_rate(self, task: str) -> float | None:
        """The rate of task heads beside methods: that of the probe's search, kept for good; 0 for the method's own, and None
        while the probe is searched."""
        if self.study.search.heads == "same":
            return 0.0
        probe = next(line for line in self.lines if line.task == task and line.entry.method == PROBE)
        if probe.fact("head_rate") is None:
            cap = self.cap(probe)
            slots = {} if probe.fact("refused") is not None else probe.slots("search")
            done = sum(one.state.is_finished() for slot, one in slots.items() if slot < cap)
            if probe.fact("refused") is None and done < cap:
                return None
            probe.state("head_rate", best_rate(probe, cap) or 0.0)
        return float(probe.fact("head_rate"))

    def spent(self, job: Job) -> bool:
        """Whether the budget leaves no room for a trial; a search then ends for all methods after the same number."""
        if self.deadline is None:
            return False
        left = self.deadline - time.monotonic()
        if left <= 0:
            return True
        if job.stage == "search" and job.slot > 0 and not self.leads(job.line):
            mean = {id(line): _mean_seconds(line) for line in self.lines if line.fact("refused") is None}
            typical = sum(mean.values()) / max(len(mean), 1)
            finals = self.study.seeds * sum(mean.values())
            turn = sum(value or typical for value in mean.values())
            if left < finals + turn:
                self.base.remember("capped", self.study.budget)
                self.base.remember("cap", job.slot)
                return self.cap() > job.slot
        return False

    # --- work ---

    def retry(self) -> int:
        """Have what failed run again, and what was refused tried again. Returns how many trials and methods there are."""
        return self.base.retry(self.lines)

    def measure(self) -> int:
        """Measure again what the methods cost of which that is known. Returns how many there are."""
        known = [line for line in self.lines if line.fact("costs") and line.fact("refused") is None]
        for turn, line in enumerate(known, start=1):
            ground = self.ground(line.task)
            self.tally.now = f"{turn}/{len(known)}  measuring {line.entry.label}"
            self.watch(self.tally)
            found = trial.costs(ground, line.entry)
            line.forget()
            line.state("costs", found)
            settled()
        self.end()
        return len(known)

    def work(self) -> Tally:
        """Run what is open until nothing is left or the budget is spent.

        Raises `AttunementError` where no method of the study can act on a model of it, before anything is trained.
        """
        self.next()  # it sees which methods are complete
        self.refresh(every=True)
        while True:
            job = self.next()
            if job is None:
                break
            if job is False:
                start = time.perf_counter()
                time.sleep(POLL)
                self.refresh()
                self.tally.waiting += time.perf_counter() - start
                continue
            assert isinstance(job, Job)
            self.look()
            if self.deadline is not None and self.spent(job):
                break
            if job.stage == "search" and job.slot >= self.cap(job.line):
                continue
            if self.prepared(job.line):
                self.run(job)
            self.refresh(job.line)
        self.end()
        return self.tally

    def ground(self, task: str) -> Ground:
        """The model and rows of a task, loaded when they are first asked for; those of another task are let go."""
        if task not in self.grounds:
            gc.unfreeze()
            self.grounds.clear()
            start = time.perf_counter()
            self.grounds[task] = Ground(task, self.study.tasks[task], self.study.search, self.study.folder)
            settled()
            self.tally.loading += time.perf_counter() - start
            self.attach(task)
        return self.grounds[task]

    def attach(self, task: str) -> None:
        """Put every method of a task on its model once, so that what is refused is known before anything is trained."""
        start = time.perf_counter()
        for line in self.lines:
            if line.task != task or line.entry.method in (FULL, ZERO):
                continue
            if any(line.fact(name) is not None for name in ("fits", "costs", "refused")):
                continue
            self.tally.now = f"attaching {line.entry.label}"
            self.watch(self.tally)
            try:
                self.grounds[task].run(line.entry, 1e-3, 0, "search")
            except AttunementError as error:
                line.state("refused", _said(error))
                continue
            except Exception:
                pass  # its trials will say
            line.state("fits", True)
        settled()
        self.tally.measuring += time.perf_counter() - start

    def look(self) -> None:
        """Stop where every method of the study is refused on all tasks. Raises `AttunementError` with the reasons."""
        if self.seen:
            return
        self.seen = True
        own = [line for line in self.lines if line.entry.method not in BASELINES]
        if not own or any(line.fact(name) is not None for line in own for name in ("fits", "costs")):
            return
        for task in self.study.tasks:
            self.ground(task)
            if any(line.fact("refused") is None for line in own if line.task == task):
                return
        self.refresh(every=True)
        reasons = list(dict.fromkeys(f"{line.entry.label}: {line.fact('refused')}" for line in own))
        more = f"; and {len(reasons) - 3} more in {near(self.study.folder / records.TRIALS)}" if reasons[3:] else ""
        what = "none of the methods can act on the model" if reasons[1:] else "the only method cannot act on the model"
        raise AttunementError(f"study {self.study.name!r}: {what}: {'; '.join(reasons[:3])}{more}")

    def prepared(self, line: Line) -> bool:
        """What a method costs is measured before its first trial; whether it can act on the model at all."""
        if line.fact("costs") is not None or line.fact("refused") is not None:
            return line.fact("refused") is None
        ground = self.ground(line.task)
        start = time.perf_counter()
        self.tally.now = f"measuring {line.entry.label}"
        self.watch(self.tally)
        try:
            line.state("costs", trial.costs(ground, line.entry))
        except AttunementError as error:
            line.state("refused", _said(error))
        except Exception:  # the trials will say whether it can be trained at all
            line.state("costs", {})
        settled()
        self.tally.measuring += time.perf_counter() - start
        return line.fact("refused") is None

    def run(self, job: Job) -> None:
        """Claim a trial, run it, store it."""
        line, search = job.line, self.study.search
        ground = self.ground(line.task)
        claimed = line.claim(job.stage, job.slot, sampler(self.study, job))
        if claimed is None:
            return
        seed = self.study.seed + (job.slot if job.stage == "final" else 0)
        with beating(claimed):
            try:
                rate = None
                if job.stage == "search":
                    with saying(self.study):
                        rate = claimed.suggest_float("rate", line.entry.low, line.entry.high, log=True)
                elif line.entry.method != ZERO:
                    rate = best_rate(line, self.cap(line))
                self.tally.now = f"{line.entry.label} " + ("" if rate is None else f"at {rate:.2g}, ")
                self.tally.now += f"search {job.slot + 1}" if job.stage == "search" else f"seed {seed}"
                self.watch(self.tally)
                stops = pruner(line, job) if job.stage == "search" and search.pruner else None

                def report(number: int, quality: float) -> bool:
                    if job.stage != "search":
                        return False
                    with saying(self.study):
                        claimed.report(quality, number)
                        return stops is not None and stops.prune(line.search, _frozen(line, claimed))

                ground.head_rate = (self.head_rate(line.task) or None) if ground.heads else None
                work = trial.run if self.team is None else self.team.run
                outcome = work(ground, line.entry, rate, seed, job.stage, report)
            except BaseException:
                line.drop(job.stage, claimed)
                raise
            self.tally.busy += outcome.busy
            self.tally.lengths.append(outcome.seconds)
            head_rate = ground.head_rate if line.entry.leaves_head else None
            line.finish(job.stage, claimed, record(outcome, line, job, rate, head_rate, seed))
        cap = self.cap(line)
        if job.stage == "search" and job.slot == cap - 1 and (best := best_rate(line, cap)) is not None:
            rates.store(self.study.folder, self.study.tasks[line.task], line.entry, search.heads, best)

    # --- what is left behind ---

    def refresh(self, line: Line | None = None, every: bool = False) -> None:
        """Bring the files and the tally up to what the database has.

        Args:
            line: the one of which this process knows that it has changed. What others did is looked at from time to time,
                so that asking takes little of the time.
            every: look at all of them now.
        """
        start = time.monotonic()
        due = every or start - self.looked > max(POLL, 50 * self.looking)
        if due:
            self.base.heed(self.lines)
        for one in self.lines:
            ended = one.complete and not one.known  # by others: its trials are counted with those of this process
            if due or ended or one is line or id(one) not in self.found:
                self.found[id(one)] = one.records()
        if due:
            self.looked, self.looking = time.monotonic(), time.monotonic() - start
        found = [made for one in self.lines for made in self.found[id(one)]]
        open_ = {id(one): self._left(one, self.cap(one), asks=due) for one in self.lines}
        self.tally.done = sum(not made.id.endswith("/refused") for made in found)
        self.tally.total = self.tally.done + sum(map(sum, open_.values()))
        self.tally.still = sum(made.method == ZERO for made in found)
        self._forecast(found, open_)
        best: dict[str, Trial] = {}  # a final run comes before any search trial, whose rows are others
        for made in found:
            if made.quality is not None and made.state == "done":
                best[made.task] = max(best.get(made.task, made), made, key=_standing)
        self.tally.best = {task: (made.quality or 0.0, made.label) for task, made in best.items()}
        self.tally.whole = time.perf_counter() - self.began
        if self.writes and (every or len(found) != self.written):
            with saying(self.study):
                settings, progress = self.study.settings(), self._progress(open_)
                records.write(self.study.folder, settings, found, self.tally.missing, progress)
            self.base.keep()
            self.written = len(found)
        self.watch(self.tally)

    def _left(self, line: Line, cap: int, asks: bool) -> tuple[int, int]:
        """How many trials of the search and how many final runs of a line are still to come."""
        if line.complete or line.fact("refused", asks=asks) is not None:
            return 0, 0
        found = self.found[id(line)]
        tried, ran = (sum(made.stage == stage for made in found) for stage in records.STAGES)
        return 0 if line.entry.method == ZERO else max(0, cap - tried), max(0, self.study.seeds - ran)

    def _forecast(self, found: list[Trial], open_: dict[int, tuple[int, int]]) -> None:
        """What the finished trials took and what the open ones will: each as those nearest to it did on average."""
        timed = [made for made in found if made.method != ZERO and made.seconds is not None]
        apart = len({made.label for made in timed if made.method not in BASELINES}) >= MANY
        known: dict[tuple[Any, ...], list[float]] = {}

        def alike(task: str, label: str, method: str, stage: str) -> list[tuple[Any, ...]]:
            methods = [(task, stage, True)] if apart and method not in BASELINES else []
            return [(task, label, stage), *methods, (task, stage), (stage,), ()]

        for made in timed:
            for key in alike(made.task, made.label, made.method, made.stage):
                known.setdefault(key, []).append(made.seconds or 0.0)
        self.tally.spent = sum(known.get((), ()))
        self.tally.ahead = 0.0
        for line in self.lines:
            if line.entry.method == ZERO or self.over or not known:
                continue
            for stage, count in zip(records.STAGES, open_[id(line)], strict=True):
                keys = alike(line.task, line.entry.label, line.entry.method, stage)
                near_by = next(known[key] for key in keys if key in known)
                self.tally.ahead += count * sum(near_by) / len(near_by)
        self.tally.left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _progress(self, open_: dict[int, tuple[int, int]]) -> Progress | None:
        """How far the study is, where anything is left to run."""
        if self.tally.done >= self.tally.total:
            return None
        left: dict[str, int] = {}
        for line in self.lines:
            if line.entry.method not in BASELINES:
                left[line.entry.label] = left.get(line.entry.label, 0) + sum(open_[id(line)])
        complete = sum(not count for count in left.values())
        return Progress(self.tally.done, self.tally.total, complete, len(left))

    def missing(self) -> list[str]:
        """What a spent budget left out."""
        if self.deadline is None:
            return []
        said = []
        cap = self.cap()
        if cap < self.study.search.trials:
            said.append(f"every search ended after {cap} of {self.study.search.trials} rates")
        for line in self.lines:
            if line.fact("refused") is not None or line.complete:
                continue
            tried = sum(one.state.is_finished() for one in line.slots("search").values())
            ran = sum(one.state.is_finished() for one in line.slots("final").values())
            if line.entry.method != ZERO and tried < self.cap(line):
                said.append(
                    f"{line.task}: {line.entry.label} has had {tried} of {self.cap(line)} rates and no final run"
                )
            elif ran < self.study.seeds:
                said.append(f"{line.task}: {line.entry.label} has had {ran} of {self.study.seeds} seeds")
        return said

    def end(self) -> None:
        """The files as they stay, and the report, where there is something to report."""
        self.next()  # it sees which methods are complete, for whom others have worked too
        self.tally.missing, self.tally.now, self.over = self.missing(), "", True
        self.refresh(every=True)
        if self.writes and self.tally.done:
            publish(self.study.folder)


def settled() -> None:
    """What stands now is not walked through again by the collection of garbage with which every trainer begins."""
    gc.collect()
    gc.freeze()


def together(study: Study, size: int) -> None:
    """Refuse a study whose trials are trained by another number of processes than there are.

    Raises `AttunementError`.
    """
    wanted = study.processes or 1
    if wanted != size:
        how = " or ".join(f"{one} compare" for one in launchers(wanted)) if wanted > 1 else "no launcher"
        raise AttunementError(
            f"study {study.name!r}: processes is {wanted}, and {size} of them {'was' if size == 1 else 'were'} started; "
            f"use {how}"
        )


def publish(folder: Path) -> None:
    """Write the report of a study."""
    from attunement.compare import report

    report.write(folder)


def record(outcome: Outcome, line: Line, job: Job, rate: float | None, head_rate: float | None, seed: int) -> Trial:
    """An outcome as a record; what holds for all trials of a method is added when it is read."""
    return Trial(
        id=f"{line.task}/{line.entry.label}/{job.stage}/{job.slot}",
        task=line.task,
        method=line.entry.method,
        label=line.entry.label,
        stage=job.stage,
        rate=rate,
        head_rate=head_rate,
        seed=seed,
        state=outcome.state,
        error=outcome.error,
        quality=outcome.quality,
        calibration=outcome.calibration,
        forgetting=outcome.forgetting,
        seconds=round(outcome.seconds, 3),
        steps=outcome.steps,
        curve=tuple(outcome.curve),
    )


def _standing(made: Trial) -> tuple[bool, float]:
    """The order of trials on one task: final runs above those of a search, then by quality."""
    return made.stage == "final", made.quality or 0.0


def best_rate(line: Line, cap: int) -> float | None:
    """The rate of the best finished search trial, the lower of equals; None where none came to an end."""
    slots = line.slots("search").items()
    done = [one for slot, one in slots if slot < cap and one.state == TrialState.COMPLETE]
    return min(done, key=lambda one: (-(one.value or 0.0), one.params["rate"])).params["rate"] if done else None


def spread(low: float, high: float, count: int) -> list[float]:
    """Rates in the middles of `count` equal parts of the logarithm of a range, from the middle of the range outwards."""
    points = [(i + 0.5) / count for i in range(count)]
    points.sort(key=lambda share: (abs(share - 0.5), share))
    return [low * (high / low) ** share for share in points]


def sampler(study: Study, job: Job) -> optuna.samplers.BaseSampler:
    """What suggests the rate of a slot: a point of the spread, or TPE, whose seed is that of the study and the slot alone.

    Nothing depends on the method's name.
    """
    search, line = study.search, job.line
    tpe = optuna.samplers.TPESampler(seed=study.seed + job.slot, n_startup_trials=search.spread)
    if job.stage != "search":
        return tpe
    points = spread(line.entry.low, line.entry.high, min(search.spread, search.trials))
    if search.known:
        start = line.fact("start")
        if start is None:  # kept, so that a study that is resumed goes on as it began
            start = rates.known(study.tasks[line.task], line.entry, search.heads) or 0.0
            line.state("start", start)
        if start:
            points = [start, *(p for p in points if abs(math.log(p / start)) > 1e-6)][: len(points)]
    if job.slot < len(points):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.PartialFixedSampler({"rate": points[job.slot]}, tpe)
    return tpe


def pruner(line: Line, job: Job) -> optuna.pruners.BasePruner:
    """Behind the median of the trials before it, which are at least two, at the same evaluation; never at the first."""
    return optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)


def _frozen(line: Line, claimed: optuna.Trial) -> Any:
    return next(one for one in line.search.get_trials(deepcopy=False) if one.number == claimed.number)


def _said(error: AttunementError) -> str:
    return " ".join(str(error).split())[:300]


def _mean_seconds(line: Line) -> float:
    done = [one.user_attrs["record"] for one in line.slots("search").values() if "record" in one.user_attrs]
    return sum(one["seconds"] for one in done) / len(done) if done else 0.0
