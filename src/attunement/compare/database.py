"""The database of a study: which trial is whose, what came of it, and the last good copy of it all.

There is one Optuna study for the search of each (task, method) and one for its final seeds. A process claims a trial by
asking for it: numbers are given out by the database, and of several trials for one slot the lowest number counts. A trial
whose process is gone, or has not given a sign of life for `GRACE` seconds, is lost and its slot is open again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from attunement.compare.records import Trial
from attunement.compare.study import Entry, Study, masked
from attunement.errors import AttunementError
from attunement.train.words import near

BEAT, GRACE = 15.0, 120.0
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
FREE = ("budget", "storage")
"""Settings in which a study may differ from what it began with."""
DEFAULTS: dict[str, Any] = {"processes": 1, "search.heads": "same"}
"""What a setting is that is not written."""


class Database:
    """The storage of one study, opened: its settings agree with those it began with.

    Raises `AttunementError` where they do not, showing the difference, and where the database cannot be opened.
    """

    def __init__(self, study: Study):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study, self.told = study, ""
        self.file = Path(study.url.removeprefix("sqlite:///")) if study.url.startswith("sqlite:///") else None
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.told = _mended(self.file)
        with saying(study):
            self.storage = _opened(study.url)
            self.head = self._study("settings")
            self.retries: int = self.head.user_attrs.get("retries", 0)
        self._agree()

    def _study(self, name: str, **options: Any) -> optuna.Study:
        for attempt in range(20):
            try:
                return optuna.create_study(
                    storage=self.storage,
                    study_name=f"{self.study.name}/{name}",
                    direction="maximize",
                    load_if_exists=True,
                    **options,
                )
            except optuna.exceptions.StorageInternalError:
                if attempt == 19:
                    raise
                time.sleep(0.1 * (attempt + 1))  # another process was creating it
        raise AssertionError

    def _agree(self) -> None:
        now = self.study.settings()
        for _ in range(2):
            before = self.head.user_attrs.get("settings")
            if before is None:
                self.head.set_user_attr("settings", now)
                continue
            said = difference(before, now)
            if said:
                where = near(self.study.folder)
                raise AttunementError(
                    f"the study {self.study.name!r} in {where} began with other settings: {said}; "
                    "give this one another name"
                )
            if before != now and before.get("methods") != now.get("methods"):
                self.head.set_user_attr("settings", now)  # methods were added

    def line(self, task: str, entry: Entry) -> Line:
        """What the database has of one method on one task."""
        with saying(self.study):
            search = self._study(f"{task}/{entry.label}/search")
            return Line(self, task, entry, search, self._study(f"{task}/{entry.label}/final"))

    @functools.cached_property
    def again(self) -> dict[str, list[int]]:
        """The numbers of the trials that do not count any more since `retry`, by Optuna's name of their study."""
        with saying(self.study):
            return dict(self.head.user_attrs.get("again", {}))

    def retry(self, lines: Sequence[Line]) -> int:
        """Have trials that failed run again, and methods that were refused tried again. Returns how many there are.

        The rate of heads is found again, too, where no trial has come to anything at it.
        """
        count = 0
        for line in lines:
            for study in (line.search, line.final):
                with saying(self.study):
                    failed = [
                        trial.number
                        for trial in study.get_trials(deepcopy=False)
                        if trial.user_attrs.get("record", {}).get("state") == "failed"
                    ]
                count += len(set(failed) - set(self.again.get(study.study_name, ())))
                self.again[study.study_name] = failed
            if line.fact("refused") is not None:
                count += 1
                line.state("refused", None)
            if line.fact("costs") == {}:
                line.state("costs", None)
        self.remember("again", {name: numbers for name, numbers in self.again.items() if numbers})
        self.remember("retries", self.retries + 1)
        self.retries += 1
        for probe in (line for line in lines if line.fact("head_rate") is not None):
            others = (line for line in lines if line.task == probe.task and line.entry.leaves_head)
            if not any(one.state in ("done", "pruned") for line in others for one in line.records()):
                probe.state("head_rate", None)
        return count

    def heed(self, lines: Sequence[Line]) -> None:
        """Take up what `retry` has said in another process since this one looked."""
        with saying(self.study):
            facts = self.head.user_attrs
        if facts.get("retries", 0) != self.retries:
            self.retries, self.again = facts["retries"], dict(facts.get("again", {}))
            for line in lines:
                line.forget()

    def remember(self, key: str, value: Any) -> None:
        """Keep a fact of the whole study."""
        with saying(self.study):
            self.head.set_user_attr(key, value)

    def keep(self) -> None:
        """Put a copy of the database beside it, whole."""
        if self.file is None:
            return
        number, name = tempfile.mkstemp(dir=self.file.parent, prefix=".study.db.")
        os.close(number)
        try:
            with saying(self.study):
                source, target = sqlite3.connect(self.file, timeout=60), sqlite3.connect(name)
                try:
                    source.backup(target)
                finally:
                    source.close()
                    target.close()
                os.chmod(name, 0o644)
                os.replace(name, good(self.file))
        finally:
            Path(name).unlink(missing_ok=True)


class Line:
    """One method on one task, in the database.

    Attributes:
        complete: whether nothing of it is left to run; rate: the one that its search has chosen, once that is over. Final
            runs at another, from when a budget had cut the search, do not count.
    """

    def __init__(self, base: Database, task: str, entry: Entry, search: optuna.Study, final: optuna.Study):
        self.base, self.task, self.entry, self.search, self.final = base, task, entry, search, final
        self.complete = False
        self.rate: float | None = None
        self._kept: list[Trial] | None = None
        self._facts: dict[str, Any] = {}

    @property
    def known(self) -> bool:
        """Whether its records were read since it is complete."""
        return self._kept is not None

    def forget(self) -> None:
        """Nothing of it is known any more, so that the database is asked again."""
        self.complete, self.rate, self._kept, self._facts = False, None, None, {}

    # --- facts that hold for all trials ---

    def fact(self, name: str, asks: bool = True) -> Any:
        """`refused`, the reason why the method cannot act, `fits`, that it can, or `costs`; without `asks` only if this
        process knows it."""
        if name not in self._facts and asks:
            with saying(self.base.study):
                value = self.search.user_attrs.get(name)
            if value is None:
                return None
            self._facts[name] = value
        return self._facts.get(name)

    def state(self, name: str, value: Any) -> None:
        """Keep such a fact."""
        with saying(self.base.study):
            self.search.set_user_attr(name, value)
        self._facts[name] = value

    # --- trials ---

    def slots(self, stage: str) -> dict[int, FrozenTrial]:
        """The trial that counts for every slot that is done or that somebody works on; what is lost is told so."""
        with saying(self.base.study):
            study = self.search if stage == "search" else self.final
            found: dict[int, FrozenTrial] = {}
            for trial in study.get_trials(deepcopy=False):
                slot = _slot(trial)
                if trial.state == TrialState.RUNNING and not _alive(trial):
                    _tell(study, trial, {"lost": True})
                    continue
                if slot is None or self._void(stage, trial):
                    continue
                found.setdefault(slot, trial)
            return found

    def _void(self, stage: str, trial: FrozenTrial) -> bool:
        """Whether a trial does not count."""
        rate = trial.user_attrs.get("record", {}).get("rate")
        other = stage == "final" and None not in (rate, self.rate) and not math.isclose(rate, self.rate or 0.0)
        study = self.search if stage == "search" else self.final
        return other or bool(trial.user_attrs.get("lost")) or trial.number in self.base.again.get(study.study_name, ())

    def open(self, stage: str) -> bool:
        """Whether somebody is about to say which slot of a stage they claim."""
        with saying(self.base.study):
            study = self.search if stage == "search" else self.final
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return any(_slot(trial) is None and _alive(trial) for trial in running)

    def claim(self, stage: str, slot: int, sampler: optuna.samplers.BaseSampler) -> optuna.Trial | None:
        """A trial for a slot, or None where another process was quicker."""
        study = self.search if stage == "search" else self.final
        with saying(self.base.study):
            study.sampler = sampler
            trial = study.ask()
            trial.set_user_attr("claim", {"slot": slot} | _owner())
            for other in study.get_trials(deepcopy=False):
                if other.number >= trial.number or self._void(stage, other):
                    continue
                working = other.state == TrialState.RUNNING and _alive(other)
                if _slot(other) == slot and (working or other.state.is_finished()):
                    _tell(study, trial, {"lost": True})
                    return None
                if _slot(other) is None and working:
                    _tell(study, trial, {"lost": True})
                    return None
            return trial

    def finish(self, stage: str, trial: optuna.Trial, record: Trial) -> None:
        """Store what came of a trial."""
        study = self.search if stage == "search" else self.final
        states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED}
        state = states.get(record.state, TrialState.FAIL)
        value = record.quality if state == TrialState.COMPLETE else None
        for pause in (*PAUSES, None) if self.base.file is None else (None,):
            try:
                with saying(self.base.study):
                    trial.set_user_attr("record", _plain(record))
                    study.tell(trial, value, state, skip_if_finished=True)
                return
            except AttunementError:
                if pause is None:
                    raise
                time.sleep(pause)  # the server may be starting again, and what was trained is not to be lost for that

    def drop(self, stage: str, trial: optuna.Trial) -> None:
        """Give a trial back unfinished: its slot is open again."""
        with contextlib.suppress(Exception):
            _tell(self.search if stage == "search" else self.final, trial, {"lost": True})

    def records(self) -> list[Trial]:
        """Every finished trial, in order, with the costs of the method."""
        if self._kept is not None:
            return self._kept
        refused, costs = self.fact("refused"), self.fact("costs") or {}
        common: dict[str, Any] = {"task": self.task, "method": self.entry.method, "label": self.entry.label}
        common |= {"recipe": self.entry.recipe, "metric": self.base.study.tasks[self.task].quality}
        made = []
        if refused is not None:
            name = f"{self.task}/{self.entry.label}/refused"
            made.append(Trial(id=name, **common, stage="search", state="failed", error=refused))
        for stage in ("search", "final"):
            for slot, trial in sorted(self.slots(stage).items()):
                if (own := trial.user_attrs.get("record")) is not None and trial.state.is_finished():
                    name = f"{self.task}/{self.entry.label}/{stage}/{slot}"
                    made.append(Trial(**({**own} | common | costs | {"id": name, "stage": stage})))
        if self.complete:
            self._kept = made
        return made


@contextlib.contextmanager
def beating(trial: optuna.Trial) -> Iterator[None]:
    """Give signs of life for a trial while a block runs."""
    done = threading.Event()
    claim = dict(trial.user_attrs["claim"])

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(Exception):  # the next one may come through
                trial.set_user_attr("claim", claim | {"beat": time.time()})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=BEAT)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two settings differ, as a clause; nothing where they do not, but for what may change in between.

    Methods may be added, not taken away. A full path is that of a part of it, seen from another folder.
    """
    a, b = DEFAULTS | _flat(before), DEFAULTS | _flat(now)
    said = []
    for key in dict.fromkeys([*a, *b]):
        if key.partition(".")[0] in FREE or a.get(key) == b.get(key) or _one_path(a.get(key), b.get(key)):
            continue
        if key == "methods":
            gone = [one for one in a.get(key, []) if one not in b.get(key, [])]
            if gone:
                said.append(f"methods had {gone[0]!r} and now have not")
            continue
        said.append(f"{key} was {a.get(key)!r} and is now {b.get(key)!r}")
    more = f" ({len(said)} differences in all)" if len(said) > 3 else ""
    return "; ".join(said[:3]) + more


def _one_path(one: Any, other: Any) -> bool:
    """Whether of two texts one is a full path that ends in the other."""
    if not (isinstance(one, str) and isinstance(other, str) and os.path.isabs(one) != os.path.isabs(other)):
        return False
    parts = sorted((Path(one).parts, Path(other).parts), key=len)
    return parts[1][-len(parts[0]) :] == parts[0]


@contextlib.contextmanager
def saying(study: Study) -> Iterator[None]:
    """Turn what a database or a disk may fail with into one sentence."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error, OSError) as error:
        causes = [
            str(one) for one in (error, error.__cause__, getattr(error.__cause__, "orig", None)) if one is not None
        ]
        text = " ".join(causes)
        where = near(study.folder)
        if "disk is full" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise AttunementError(
                f"the disk of {where} is full: finished trials are kept; make room and run the same command again"
            ) from error
        raise AttunementError(
            f"the database {masked(study.url)} cannot be used: {_told(causes[-1], study.url)}"
        ) from error


def _told(text: str, url: str) -> str:
    """What a driver says, in one line and without the password of the address."""
    text = masked(" ".join(text.split()))
    for more in (" [SQL:", " (Background on this error"):
        text = text.partition(more)[0]
    with contextlib.suppress(SQLAlchemyError, ValueError):
        address = make_url(url)
        hidden = (value for key, value in address.query.items() if masked(f"?{key}=x") != f"?{key}=x")
        for secret in {str(one) for one in (address.password, *hidden) if one}:
            text = text.replace(secret, "***")
    return text[:200]


def good(file: Path) -> Path:
    """Where the last good copy of a database is."""
    return file.with_name(f"{file.name}.good")


def _mended(file: Path) -> str:
    """Put the last good copy in the place of a database that is damaged; what was done, as a sentence."""
    if not file.exists() or not file.stat().st_size or _sound(file):
        return ""
    broken = file.with_name(f"{file.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    copy = good(file)
    if not (copy.exists() and _sound(copy)):
        raise AttunementError(
            f"the database {near(file)} is damaged and there is no good copy beside it; move it away to start anew "
            "(trials.csv keeps what was measured)"
        )
    os.replace(file, broken)
    for journal in ("-journal", "-wal", "-shm"):
        file.with_name(file.name + journal).unlink(missing_ok=True)
    file.write_bytes(copy.read_bytes())
    return f"The database was damaged (now {near(broken)}): going on from the last good copy."


def _sound(file: Path) -> bool:
    try:
        connection = sqlite3.connect(file, timeout=60)
        try:
            return connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return "locked" in str(error)


RACES = ("already exists", "UNIQUE", "duplicate key", "locked")
"""What databases say where two processes create the tables at once."""


def _opened(url: str) -> Any:
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    driven = _driven(url)
    for attempt in range(20):
        try:
            return optuna.storages.RDBStorage(driven, engine_kwargs=options)
        except Exception as error:
            if any(word in str(error) for word in RACES) and attempt < 19:
                time.sleep(0.1 * (attempt + 1))  # another process was creating the tables
                continue
            if isinstance(error, optuna.exceptions.StorageInternalError | sqlite3.Error | OSError):
                raise
            raise AttunementError(f"the database {masked(url)} cannot be opened: {_told(str(error), url)}") from error
    raise AssertionError


def _driven(url: str) -> str:
    """The address with the driver that is installed, where it names none."""
    scheme, sign, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres"):
        return url
    driver = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), None)
    if driver is None:
        raise AttunementError(
            f"the database {masked(url)} needs a driver for PostgreSQL; pip install 'attunement[postgres]' brings psycopg"
        )
    rest = rest.replace("{", "%7B").replace("}", "%7D")  # Optuna would fill braces in
    return f"postgresql+{driver}{sign}{rest}"


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}


def _slot(trial: FrozenTrial) -> int | None:
    claim = trial.user_attrs.get("claim")
    return None if claim is None else int(claim["slot"])


def _alive(trial: FrozenTrial) -> bool:
    claim = trial.user_attrs.get("claim")
    if claim is None:
        begun = trial.datetime_start
        return begun is None or (datetime.now() - begun).total_seconds() < 2 * BEAT
    if time.time() - claim["beat"] > GRACE:
        return False
    if claim["host"] != socket.gethostname():
        return True
    try:
        os.kill(claim["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tell(study: optuna.Study, trial: Any, attributes: dict[str, Any]) -> None:
    """Fail a trial that did not come to anything."""
    number = trial.number
    with contextlib.suppress(ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
        own = trial if isinstance(trial, optuna.Trial) else optuna.Trial(study, trial._trial_id)
        for key, value in attributes.items():
            own.set_user_attr(key, value)
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _plain(record: Trial) -> dict[str, Any]:
    kept = (
        "rate",
        "head_rate",
        "seed",
        "state",
        "error",
        "quality",
        "calibration",
        "forgetting",
        "seconds",
        "steps",
        "curve",
    )
    values = {key: getattr(record, key) for key in kept}
    return json.loads(json.dumps(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
