"""One trial over several devices: the processes that `accelerate launch` or `torchrun` started work on a study as one.

The first of them opens the database, decides, measures costs and writes. It tells the others through the launcher's store
which trial comes next, and all train it. What goes wrong in one process ends the trial in all of them: that process posts
it and closes its connections, so that nobody waits for it, and the next trial begins with new ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from attunement.compare import trial
from attunement.compare.study import Entry, Study, StudyTask, entries, launchers, read
from attunement.compare.trial import Ground, Outcome, Report
from attunement.errors import AttunementError
from attunement.train.recipe import import_all

if TYPE_CHECKING:
    from typing import Self

POLL, GRACE, ANSWER, STEP = 0.02, 1.0, 600.0, 120.0
"""Seconds between two looks at the store; that others have to meet the same end by themselves; that any wait may
last, and that of one process for another within a step: so long gloo waits when it closes with something pending."""
LOST = ("failed", "diverged")


def launcher(size: int) -> str:
    """What started the processes of this launch, as it is typed; both ways where that cannot be seen."""
    with_accelerate, with_torchrun = launchers(size)
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        flag = "" if torch.cuda.device_count() >= size else " --multi_gpu"  # without it there would be one process
        return with_accelerate.replace(" -m", f"{flag} -m")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return with_torchrun
    return f"{with_accelerate}, or {with_torchrun}"


class Team:
    """The processes of one launch, seen from one of them.

    Raises `AttunementError` where the environment does not say how they find each other.
    """

    def __init__(self) -> None:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise AttunementError(
                f"compare: WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, and {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; start it with accelerate launch or torchrun"
            )
        self.store, self.rank, self.size = next(distributed.rendezvous("env://"))
        self.said = self.breaks = 0
        self.stopped = False
        self.joined: tuple[int, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the others go; the store may live in this process, so it waits for them a while."""
        with contextlib.suppress(Exception):
            self._say(None)
            deadline = time.monotonic() + 10
            while self.store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL)
        self._part()

    # --- the first process ---

    def begin(self, study: Study) -> None:
        """Tell the others the study."""
        self._say(study.plain())

    def run(
        self, ground: Ground, entry: Entry, rate: float | None, seed: int, stage: str, report: Report = lambda *_: False
    ) -> Outcome:
        """`trial.run` in all processes, and what it came to in all of them.

        Raises `AttunementError` where another process cannot load the task or does not answer, `KeyboardInterrupt` where
        one was stopped.
        """
        job = {"task": ground.name, "label": entry.label, "rate": rate, "seed": seed, "stage": stage}
        self._say(job | {"head_rate": ground.head_rate})

        def told(number: int, quality: float) -> bool:
            stop = report(number, quality)
            self.store.set(self._key(f"stop/{number}"), json.dumps(stop))
            return stop

        return self._run(lambda: ground, entry, rate, seed, stage, told)

    # --- the others ---

    def follow(self) -> None:
        """Take part in what the first process says, until it says no more."""
        for sent in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sent, self._stop)
        try:
            plain = self._hear()
            if plain is not None:
                import_all(plain.get("imports"), "study")
                self._follow(read(Study, plain, "study"))
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.store.set("gone", str(self.rank))
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(130) from None
            raise
        finally:
            with contextlib.suppress(Exception):
                self.store.add("left", 1)
            self._part()

    def _follow(self, study: Study) -> None:
        of = {entry.label: entry for entry in entries(study)}
        kept: dict[str, Ground] = {}

        def ground(task: str, head_rate: float | None) -> Ground:
            if task not in kept:
                kept.clear()
                kept[task] = Ground(task, study.tasks[task], study.search, study.folder)
            kept[task].head_rate = head_rate
            return kept[task]

        while (job := self._hear()) is not None:
            with contextlib.suppress(AttunementError):  # the first process says it
                work = (of[job["label"]], job["rate"], job["seed"], job["stage"])
                self._run(partial(ground, job["task"], job["head_rate"]), *work, self._told)

    def _stop(self, *_: Any) -> None:
        self.stopped = True  # what is raised in a finalizer is lost
        raise KeyboardInterrupt

    def _told(self, number: int, _: float) -> bool:
        """What the first process decided after an evaluation."""
        stop: bool = json.loads(self._wait(self._key(f"stop/{number}"), self._lost))
        return stop

    # --- all of them ---

    def _run(
        self,
        ground: Callable[[], Ground],
        entry: Entry,
        rate: float | None,
        seed: int,
        stage: str,
        report: Report,
    ) -> Outcome:
        try:
            made, problem = None, None
            try:
                made = ground()
            except Exception as error:
                problem = str(error) or type(error).__name__
            for rank, said in enumerate(self._all("ready", problem)):
                if said is not None:
                    raise AttunementError(f"process {rank} cannot load the task: {said}")
            assert made is not None
            self._join(made.task)
            with self._watched():
                outcome = trial.run(made, entry, rate, seed, stage, report)
            return self._agreed(outcome)
        except AttunementError:
            raise
        except BaseException:
            self.store.set("gone", str(self.rank))
            self._part()
            raise

    def _agreed(self, outcome: Outcome) -> Outcome:
        """An outcome that is the same everywhere: what went wrong first, where anything did."""
        own = {"state": outcome.state, "error": outcome.error, "turn": self.store.add(self._key("turn"), 1)}
        self._post("outcome", own)
        if outcome.state in LOST:
            self.store.set(self._key("lost"), "")
            deadline = time.monotonic() + GRACE
            names = [self._key(f"outcome/{rank}") for rank in range(self.size)]
            while not self.store.check(names) and time.monotonic() < deadline:
                time.sleep(POLL)
            self._part()
        said = self._posted("outcome")
        lost = [(one["turn"], rank) for rank, one in enumerate(said) if one["state"] in LOST]
        if lost:
            self._part()
            self.breaks += 1
            rank = min(lost)[1]
            alone = len({said[other]["error"] for _, other in lost}) > 1 or len(lost) < self.size
            outcome.state, outcome.quality = said[rank]["state"], None
            outcome.error = f"process {rank}: {said[rank]['error']}" if alone else said[rank]["error"]
        return outcome

    # --- the connections in which gradients are added up ---

    def _join(self, task: StudyTask) -> None:
        on_cpu = task.training.model_dump().get("use_cpu", False) or not torch.cuda.is_available()
        wanted = (self.breaks, "gloo" if on_cpu else "nccl")
        if self.joined != wanted:
            self._part()
            store = distributed.PrefixStore(f"group/{wanted[0]}/{wanted[1]}", self.store.clone())
            distributed.init_process_group(
                wanted[1],
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=STEP if wanted[1] == "gloo" else ANSWER),
            )
            self.joined = wanted

    def _part(self) -> None:
        """Close the connections: whoever waits for this process is told so by that."""
        if distributed.is_initialized():
            connections = distributed.group.WORLD
            if self.joined is not None and self.joined[1] == "nccl":
                connections.abort()  # type: ignore[union-attr] # closing would wait for what is pending
            distributed.destroy_process_group()
            gc.collect()  # a trial that failed holds them in cycles
            # Closing waits for threads that may need the interpreter's lock. DDP's reducer, were it the last to hold
            # the connections, would close them with the lock held and never return; this name lets go of the lock.
            del connections
        self.joined = None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What waits on a device for a process that has left is ended; sockets close by themselves."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(GRACE):
                if self._lost() and not done.wait(GRACE):
                    with contextlib.suppress(Exception):
                        distributed.group.WORLD.abort()  # type: ignore[union-attr]
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # --- words ---

    def _key(self, name: str) -> str:
        return f"{self.said}/{name}"

    def _lost(self) -> bool:
        return self.store.check([self._key("lost")]) or self.store.check(["gone"])

    def _say(self, message: Any) -> None:
        self.said += 1
        self.store.set(self._key("said"), json.dumps(message))

    def _hear(self) -> Any:
        """What the first process says next; None at the end."""
        self.said += 1
        return json.loads(self._wait(self._key("said"), ends=lambda: self.store.check(["gone"]), limit=None))

    def _all(self, name: str, own: Any) -> list[Any]:
        self._post(name, own)
        return self._posted(name)

    def _post(self, name: str, own: Any) -> None:
        self.store.set(self._key(f"{name}/{self.rank}"), json.dumps(own))

    def _posted(self, name: str) -> list[Any]:
        """What every process posted under a name, in their order."""
        gone = lambda: self.store.check(["gone"])  # noqa: E731
        return [json.loads(self._wait(self._key(f"{name}/{rank}"), gone)) for rank in range(self.size)]

    def _wait(self, key: str, ends: Callable[[], bool], limit: float | None = ANSWER) -> bytes:
        start = time.monotonic()
        while not self.store.check([key]):
            if self.stopped:
                raise KeyboardInterrupt
            if ends():
                if self.store.check(["gone"]):
                    raise KeyboardInterrupt
                raise RuntimeError("another process ended the trial")
            if limit is not None and time.monotonic() - start > limit:
                raise AttunementError(f"a process of this launch has not answered for {limit:.0f} s")
            time.sleep(POLL)
        return self.store.get(key)
