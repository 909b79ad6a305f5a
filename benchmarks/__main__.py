"""`python -m benchmarks [name ...] [--quick] [--threads N] [--accuracy]`."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.accuracy import accuracy
from benchmarks.bars import BARS, Result
from benchmarks.report import show, write, write_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Attunement beside PEFT on this machine.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"all of {', '.join(BARS)} where none is given")
    parser.add_argument("--quick", action="store_true", help="a look: short, and no file is written")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; 1, which other processes disturb least"
    )
    parser.add_argument("--accuracy", action="store_true", help="train MiniLM on banking77 on both sides too: minutes")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in BARS]:
        parser.error(f"there is no {unknown[0]!r}; there are {', '.join(BARS)}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(asked.threads)
    done: list[Result] = []
    names = asked.names or ([] if asked.accuracy and asked.quick else list(BARS))
    jobs = {name: BARS[name](2.0 if asked.quick else 20.0) for name in names}
    if asked.accuracy:
        jobs["accuracy"] = accuracy()
    for name, results in jobs.items():
        found = list(results)
        show(found)
        done += found
        if not asked.quick:
            write(name, found)
    if len(jobs) > 1:
        show(done)
    if not asked.quick:
        write_table([*BARS, "accuracy"])


if __name__ == "__main__":
    main()
