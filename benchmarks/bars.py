"""One function for each bar: what is compared, on what, and how far ours may go. Each yields `Result`s."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import attunement as at
from benchmarks.measure import Case, interleaved, ratio_of, saved_bytes
from benchmarks.models import LINEAR, LINEAR_NAMES, both, llama, roberta, tokens


@dataclass
class Result:
    """One row of the table.

    Attributes:
        bar: what is compared; `limit`: the largest ratio of ours to theirs that meets it, if any.
        unit: "s", "bytes", "count" or "share", that of `ours` and `peft`; times are medians.
        low, high: 95 % interval of the ratio.
        reach: the bar is met where the interval reaches it; otherwise the ratio itself has to.
        details: further figures, in seconds.
    """

    bar: str
    limit: float | None
    unit: str
    ours: float
    peft: float
    ratio: float
    low: float
    high: float
    reach: bool = False
    details: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.limit is None or (self.low if self.reach else self.ratio) <= self.limit

    @property
    def verdict(self) -> str:
        """ "met" or "missed"; "unsure" besides where the limit lies inside the interval; "reported" without a limit."""
        if self.limit is None:
            return "reported"
        unsure = not self.reach and self.low <= self.limit < self.high
        return ("met" if self.met else "missed") + (", unsure" if unsure else "")


def timed(bar: str, limit: float, cases: dict[str, Case], seconds: float, reach: bool = False) -> Result:
    """The result of a comparison by time. A case "bare" makes it one of overheads over the bare model."""
    times = interleaved(cases, seconds)
    details = {f"{name} (median of {len(t)})": float(sorted(t)[len(t) // 2]) for name, t in times.items()}
    return Result(bar, limit, "s", *ratio_of(times), reach=reach, details=details)


def attach(seconds: float) -> Iterator[Result]:
    """LoRA rank 8 put on a model; the copy of the model is not timed."""
    few = {"on": "attention.{query,value}"}, ["q_proj", "v_proj"]
    for what, base, (here, there) in (
        ("attach, 16 sites of 8 layers", llama(), few),
        ("attach, 224 sites of 32 layers of 512", llama(32, 512), ({"on": LINEAR}, LINEAR_NAMES)),
    ):
        fresh = copies(base)
        cases = {
            "ours": Case(lambda model, here=here: at.adapt(model, at.LoRA(rank=8), **here), fresh),
            "peft": Case(
                lambda model, there=there: get_peft_model(
                    model, LoraConfig(r=8, lora_alpha=8, target_modules=list(there))
                ),
                fresh,
            ),
        }
        yield timed(what, 0.2, cases, seconds)


def copies(base: nn.Module) -> Callable[[], nn.Module]:
    """Copies of a model that share its weights, which nothing here writes to; 32 layers would take a second."""
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return lambda: copy.deepcopy(base, dict(shared))


def step(model: nn.Module, ids: Tensor | None = None, labels: Tensor | None = None) -> Case:
    """A training step: forward, backward, AdamW; 4 rows of 64 tokens unless said."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = tokens(4, 64) if ids is None else ids
    labels = ids if labels is None else labels

    def run(_: None) -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Case(run)


def lora_step(seconds: float) -> Iterator[Result]:
    """A training step of LoRA rank 8 on all linear layers, and what its forward pass keeps."""
    ours, theirs = both(llama(), at.LoRA(rank=8))
    yield timed("LoRA step", 1.0, {"ours": step(ours), "peft": step(theirs)}, seconds, reach=True)
    ids = tokens(4, 64)
    kept = [saved_bytes(model, lambda model=model: model(input_ids=ids, labels=ids).loss) for model in (ours, theirs)]
    ratio = kept[0] / kept[1]
    yield Result("LoRA step, bytes saved for backward", 1.0, "bytes", *kept, ratio, ratio, ratio)


def one_token(seconds: float) -> Iterator[Result]:
    """The overhead of LoRA rank 8 on all linear layers over the bare model, for one token without gradients."""
    bare = llama()
    ours, theirs = both(bare, at.LoRA(rank=8))
    ids = tokens(1, 1)

    def forward(model: nn.Module) -> Case:
        def run(_: None) -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        return Case(run, calls=4)

    cases = {"bare": forward(bare), "ours": forward(ours), "peft": forward(theirs)}
    yield timed("one token, overhead over the bare model", 0.5, cases, seconds)


def other_steps(seconds: float) -> Iterator[Result]:
    """A training step of HRA rank 8, VeRA rank 256 and DoRA rank 8 on all linear layers."""
    for method, limit in ((at.HRA(rank=8), 0.7), (at.VeRA(rank=256), 1.0), (at.DoRA(rank=8), 1.0)):
        ours, theirs = both(llama(), method)
        cases = {"ours": step(ours), "peft": step(theirs)}
        yield timed(f"{type(method).__name__} step", limit, cases, seconds)


def prompt_steps(seconds: float) -> Iterator[Result]:
    """A training step of a prompt of 20 tokens and of a prefix of 10, as PEFT's prompt tuning and prefix tuning do it."""
    for method, on, config in (
        (at.Prompt(count=20, std=1.0), "backbone", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)),
        (
            at.Prefix(count=10, std=1.0, offset_positions=True),
            "self_attention",
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10),
        ),
    ):
        ours, theirs = llama(), get_peft_model(llama(), config)
        adapter = at.adapt(ours, method, on=on)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            adapter.detach()
            at.load(ours, folder, trainable=True)
        ids = tokens(4, 64)
        with torch.no_grad():
            apart = ours(input_ids=ids).logits - theirs.eval()(input_ids=ids).logits[:, -64:]
        assert apart.abs().max() < 1e-4, "the two sides are not the same function"
        yield timed(f"{type(method).__name__} step", 1.1, {"ours": step(ours), "peft": step(theirs)}, seconds)


def side_networks(seconds: float) -> Iterator[Result]:
    """What LST keeps for the backward pass against full fine-tuning, and its step against LoRA's on query and value."""
    shapes = {"Llama of 8 layers": (llama(), tokens(8, 128)), "RoBERTa-base": (roberta(), tokens(4, 64))}
    for what, (base, ids) in shapes.items():
        base.train()
        labels = ids if what.startswith("Llama") else ids[:, 0] % 77
        sides: dict[str, nn.Module] = {}
        for name, method, on in (
            ("full", None, None),
            ("LoRA", at.LoRA(rank=8), "attention.{query,value}"),
            ("LST", at.LST(), None),
        ):
            sides[name] = copy.deepcopy(base)
            if method is not None:
                at.adapt(sides[name], method, on=on)
        given = {"input_ids": ids, "labels": labels}
        kept = {n: saved_bytes(m, lambda m=m, given=given: m(**given).loss) for n, m in sides.items()}
        details = {f"{name}, bytes": float(count) for name, count in kept.items()}
        ratio = kept["LST"] / kept["full"]
        bar = f"LST on {what}, bytes saved for backward, beside full fine-tuning"
        yield Result(bar, 0.35, "bytes", kept["LST"], kept["full"], ratio, ratio, ratio, details=details)
        cases = {"ours": step(sides["LST"], ids, labels), "peft": step(sides["LoRA"], ids, labels)}
        yield timed(f"LST on {what}, step beside LoRA's on query and value", 0.85, cases, seconds)


def rows(seconds: float) -> Iterator[Result]:
    """32 rows under 16 LoRAs of rank 8 on all linear layers, two rows each, in one call; whole forward passes."""
    names = [f"lora{i}" for i in range(16)]
    each = [names[row % 16] for row in range(32)]
    bare = llama()
    ours, theirs = both(bare, at.LoRA(rank=8), names)
    at.use(ours, at.Rows(each))
    for length, limit in ((1, 1 / 4), (16, 1 / 2.2)):
        ids = tokens(32, length)

        def here(_: None, ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return ours(input_ids=ids, use_cache=False).logits

        def there(_: None, ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return theirs(input_ids=ids, use_cache=False, adapter_names=each).logits

        def without(_: None, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                bare(input_ids=ids, use_cache=False)

        torch.testing.assert_close(here(None), there(None), atol=1e-4, rtol=1e-4)
        times = interleaved({"ours": Case(here), "peft": Case(there), "bare": Case(without)}, seconds)
        nothing = times.pop("bare")
        result = Result(f"16 LoRAs over 32 rows of {length}", limit, "s", *ratio_of(times))
        result.details["bare model"] = float(sorted(nothing)[len(nothing) // 2])
        yield result


def save_and_load(seconds: float) -> Iterator[Result]:
    """LoRA rank 8 on all linear layers written to a new folder, and read from it onto a fresh model."""
    base = llama()
    ours, theirs = both(base, at.LoRA(rank=8))
    adapter = at.adapters(ours)["default"]
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder, "here"), Path(folder, "there")

        def emptied(path: Path) -> Callable[[], Path]:
            def clear() -> Path:
                shutil.rmtree(path, ignore_errors=True)
                return path

            return clear

        cases = {
            "ours": Case(adapter.save, emptied(here)),
            "peft": Case(theirs.save_pretrained, emptied(there)),
        }
        yield timed("save", 1.0, cases, seconds)
        fresh = copies(base)
        cases = {
            "ours": Case(lambda model: at.load(model, here), fresh),
            "peft": Case(lambda model: PeftModel.from_pretrained(model, there), fresh),
        }
        yield timed("load", 1.0, cases, seconds)


ONE_THREAD = ("attach", "one-token", "save-load", "method-attach")
"""Bars that measure what happens around the products. The others get all cores, as training and serving do: on one core
the products of the bare model outweigh what either side adds."""

BARS = {
    "attach": attach,
    "lora-step": lora_step,
    "one-token": one_token,
    "other-steps": other_steps,
    "prompt-steps": prompt_steps,
    "side-networks": side_networks,
    "rows": rows,
    "save-load": save_and_load,
}
