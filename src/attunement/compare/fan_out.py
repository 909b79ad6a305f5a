"""Several workers on one study: processes of this machine, or of a Ray cluster. They meet in the study's database."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

from attunement.compare.engine import POLL, Engine, Tally
from attunement.compare.study import Study, read
from attunement.errors import AttunementError
from attunement.train.recipe import import_all


def worker(plain: dict[str, Any], number: int = 0, count: int = 1) -> dict[str, float]:
    """Work on a study in this process; the seconds that it spent, by kind. The files of the study are left to others."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    if count > 1 and "RAY_JOB_ID" not in os.environ and torch.cuda.device_count() > 1:  # Ray hands devices out itself
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number % len(seen.split(","))]
    import_all(plain.get("imports"), "study")
    study: Study = read(Study, plain, "study")
    tally = Engine(study, writes=False).work()
    return {"busy": tally.busy, "measuring": tally.measuring, "loading": tally.loading, "whole": tally.whole}


def _child(plain: dict[str, Any], number: int, count: int, said: Any) -> None:
    try:
        said.put((number, worker(plain, number, count), None))
    except KeyboardInterrupt:
        said.put((number, {}, None))
    except Exception as error:  # the parent says it
        said.put((number, {}, str(error)))


def on_processes(study: Study, count: int, watch: Callable[[Tally], None]) -> Tally:
    """Run a study in `count` processes of this machine, each with its share of the cores."""
    engine = Engine(study, watch)
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    children = [context.Process(target=_child, args=(study.plain(), i, count, said)) for i in range(count)]
    for child in children:
        child.start()
    try:
        while any(child.is_alive() for child in children):
            time.sleep(POLL)
            engine.refresh()
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        for child in children:
            child.join()
    results = [said.get() for _ in range(_size(said, count))]
    return _ended(engine, [seconds for _, seconds, _ in results], [error for *_, error in results if error])


def _size(said: Any, count: int) -> int:
    """How many children spoke before they ended: one that was killed did not."""
    return min(said.qsize(), count)


def on_ray(study: Study, count: int | None, watch: Callable[[Tally], None]) -> Tally:
    """Run a study on a Ray cluster: the one that `RAY_ADDRESS` names, or one on this machine.

    Every worker takes one trial after the other from the study's database, so the cluster has to reach it.

    Raises `AttunementError` where Ray is not installed, and where machines would share an SQLite file.
    """
    try:
        import ray
    except ImportError:
        raise AttunementError("--on ray needs Ray; pip install 'attunement[ray]' brings it") from None
    here = not ray.is_initialized()
    if here:
        local: dict[str, Any] = {"num_cpus": max(count or 0, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if os.environ.get("RAY_ADDRESS") else local))
    try:
        machines = [node for node in ray.nodes() if node["Alive"]]
        if len(machines) > 1 and study.url.startswith("sqlite"):
            raise AttunementError(
                f"--on ray: {len(machines)} machines cannot share the SQLite file of {study.folder}; give the study a "
                "database that all of them reach: storage: postgresql://..."
            )
        resources = ray.cluster_resources()
        devices = int(resources.get("GPU", 0))
        count = count or devices or max(1, int(resources.get("CPU", 1)) // 2)
        engine = Engine(study, watch)
        remote: Any = ray.remote(num_cpus=1, num_gpus=1 if devices else 0, max_retries=3)(worker)
        place = study.folder.absolute()
        url = study.storage or f"sqlite:///{place / 'study.db'}"
        plain = study.plain() | {"output": str(place), "storage": url}
        waiting = [remote.remote(plain, i, count) for i in range(count)]
        results, errors = [], []
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL)
            for one in done:
                try:
                    results.append(ray.get(one))
                except Exception as error:  # of a worker: the others go on
                    errors.append(str(getattr(error, "cause", error)).strip().split("\n")[-1])
            engine.refresh()
        return _ended(engine, results, errors)
    finally:
        if here:
            ray.shutdown()


def _ended(engine: Engine, results: list[dict[str, float]], errors: list[str]) -> Tally:
    tally = engine.tally
    for kind in ("busy", "measuring", "loading"):
        setattr(tally, kind, sum(one.get(kind, 0.0) for one in results))
    engine.end()
    tally.whole = sum(one.get("whole", 0.0) for one in results)
    if errors and tally.done < tally.total:
        raise AttunementError(f"a worker stopped: {errors[0]}")
    return tally
