"""What data say about sites, gathered in one pass of the bare base over them: for methods whose start depends on it.

A method names what it needs (`Method.needs`): words or `Need` values. Sites that see one and the same input share its
statistics, and what is kept does not grow with the number of batches. Padding, as `attention_mask` marks it, is left out.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError, nearest
from attunement.site import ConvLayout, LinearLayout, QuantisedLayout, Site, working_dtype
from attunement.subspace import singular

State = dict[str, Tensor]
"""What a need keeps between batches; empty before the first."""


@dataclass(frozen=True)
class Need(ABC):
    """One thing to gather. Subclasses say how a batch is added and what is made of it at the end."""

    name: ClassVar[str] = ""
    of_gradient: ClassVar[bool] = False
    """Whether `add` gets the gradient of the loss by the weight, (..., out, in), instead of inputs (tokens, in)."""
    of_idle: ClassVar[bool] = False
    """Whether a weight that the loss does not depend on, while it does on others, has a value too: that of zero."""

    @abstractmethod
    def add(self, state: State, given: Tensor) -> None:
        """Take in what one batch gives: inputs (tokens, in), or a gradient."""

    def value(self, state: State) -> Any:
        """What a method reads as `statistics[name]`."""
        return state["mean"]

    def settled(self, state: State) -> bool:
        """Whether more data would change nothing; once all that is gathered says so, the pass ends."""
        return False


def _averaged(state: State, mean: Tensor, count: int) -> None:
    """Move the running mean towards the mean of `count` more."""
    before = state.get("mean")
    seen = state.get("count", torch.zeros((), dtype=torch.long)) + count
    state["mean"] = mean if before is None else before + (mean - before) * (count / int(seen))
    state["count"] = seen


@dataclass(frozen=True)
class Mean(Need):
    """The mean input, (in,)."""

    name: ClassVar[str] = "mean"

    def add(self, state: State, given: Tensor) -> None:
        _averaged(state, given.mean(0), len(given))


@dataclass(frozen=True)
class Covariance(Need):
    """The second moment of the inputs, E[x x^T], not centred, (in, in)."""

    name: ClassVar[str] = "covariance"

    def add(self, state: State, given: Tensor) -> None:
        _averaged(state, given.T @ given / len(given), len(given))


class Found(NamedTuple):
    """Principal components of the inputs: directions (k, in) of length one, singular values (k,), and the share of the
    whole variance that each explains (k,); whether each kept its direction at the last batch (k,)."""

    directions: Tensor
    singular: Tensor
    share: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Components(Need):
    """The `count` first principal components of the centred inputs, by incremental PCA.

    The pass may end when the first `watched` of them (all where None) have kept their direction from one batch to the
    next, up to a cosine of `tau`. A batch with fewer tokens than components is left out.
    """

    name: ClassVar[str] = "components"

    count: int = 16
    watched: int | None = None
    tau: float = 0.99

    def add(self, state: State, given: Tensor) -> None:
        tokens, width = given.shape
        count = min(self.count, width)
        if tokens < count:
            return
        seen, before = int(state.get("tokens", 0)), state.get("directions")
        mean = given.mean(0, dtype=torch.float64)  # (in,)
        spread = (given - mean).square().sum(0, dtype=torch.float64)  # (in,)
        X = given - mean.to(given.dtype)  # (tokens, in)
        if before is not None:
            apart = state["mean"] - mean
            spread = state["spread"] + spread + apart.square() * (seen * tokens / (seen + tokens))
            mean = state["mean"] - apart * (tokens / (seen + tokens))
            shift = (seen * tokens / (seen + tokens)) ** 0.5 * apart
            X = torch.vstack([state["singular"][:, None] * before, X, shift.to(X.dtype)])
        _, values, directions = singular(X, count)
        kept = torch.zeros(count, dtype=torch.bool, device=given.device)
        if before is not None:
            kept = torch.cosine_similarity(directions, before) >= self.tau
        share = values.square() / spread.sum().clamp_min(torch.finfo(torch.float64).tiny)
        state.update(directions=directions, singular=values, share=share, kept=kept, mean=mean, spread=spread)
        state["tokens"] = torch.tensor(seen + tokens)

    def value(self, state: State) -> Found:
        if not state:
            raise AttunementError(f"adapt: no batch of the data has {self.count} tokens, one for each component")
        return Found(*(state[name] for name in Found._fields))

    def settled(self, state: State) -> bool:
        return bool(state) and bool(state["kept"][: self.watched].all())


@dataclass(frozen=True)
class Gradient(Need):
    """The mean over the batches of the gradient of the loss by the weight, (..., out, in)."""

    name: ClassVar[str] = "gradient"
    of_gradient: ClassVar[bool] = True

    def add(self, state: State, given: Tensor) -> None:
        _averaged(state, given, 1)


@dataclass(frozen=True)
class Fisher(Need):
    """The mean over the batches of that gradient squared: the empirical Fisher information where a batch is one row."""

    name: ClassVar[str] = "fisher"
    of_gradient: ClassVar[bool] = True
    of_idle: ClassVar[bool] = True

    def add(self, state: State, given: Tensor) -> None:
        _averaged(state, given.square(), 1)


WORDS: dict[str, Need] = {need.name: need for need in (Mean(), Covariance(), Components(), Gradient(), Fisher())}


class Statistics:
    """What was gathered at one site: `statistics["covariance"]`, by the name of a need.

    Attributes:
        tokens: how many inputs, padding left out, from `batches` calls of the module.
        peak: the largest value among them.
    """

    def __init__(self, values: Mapping[str, Any], tokens: int = 0, batches: int = 0, peak: float = 0.0) -> None:
        self.values, self.tokens, self.batches, self.peak = dict(values), tokens, batches, peak

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise AttunementError(f"statistics: {name!r} was not gathered; name it in `needs`{nearest(name, WORDS)}")
        return self.values[name]

    def single(self, index: int) -> Statistics:
        """Those of one of a stack of matrices."""
        return Statistics({name: value.flatten(0, -3)[index] for name, value in self.values.items()})


def needs_of(method: Any) -> tuple[Need, ...]:
    """What a method needs, the words among it made `Need` values."""
    found = []
    for need in method.needs:
        if isinstance(need, str) and need not in WORDS:
            raise AttunementError(f"{type(method).__name__}: there is no statistic {need!r}{nearest(need, WORDS)}")
        found.append(WORDS[need] if isinstance(need, str) else need)
    return tuple(found)


def out_of_sight(site: Site) -> str | None:
    """Why what a site's matrix is multiplied with cannot be seen (the end of a sentence), or None."""
    if not site.called:
        return f"{type(site.module).__name__} reads this weight, and is not called with what it is multiplied with"
    if not isinstance(site.layout, (LinearLayout, ConvLayout, QuantisedLayout)) or not site.transparent:
        return f"what the weight of {type(site.module).__name__} is multiplied with is not known"
    return None


def collect(model: nn.Module, wanted: Mapping[Site, Sequence[Need]], data: Any) -> dict[Site, Statistics]:
    """Run a model, in eval mode, once over the batches and gather what is wanted at its sites.

    Args:
        data: an iterable of batches. A mapping is called as `model(**batch)`, a tuple or list as `model(*batch)`, a
            tensor as `model(batch)`; for gradients the model must return a loss.

    Raises:
        AttunementError: no batch, no loss, inputs that are not finite, a site that the data never reach or whose input
            cannot be seen.
    """
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise AttunementError(
            f"adapt: data must be an iterable of batches, got a {type(data).__name__}; pass [batch] for a single one"
        )
    for site, needs in wanted.items():
        if any(not need.of_gradient for need in needs) and (reason := out_of_sight(site)) is not None:
            raise AttunementError(f"adapt: {site.key}: {reason}")
        if any(need.of_gradient for need in needs) and (site.parameter is None or site.layout.beside_only):
            raise AttunementError(f"adapt: {site.key} has no gradient: it is quantised or no weight")
    if any(p.is_meta for site in wanted for p in site.module._parameters.values() if p is not None):
        raise AttunementError("adapt: data can only run through a model that has values, and this one is on 'meta'")
    inputs, gradients = _Inputs(wanted), _Gradients(wanted)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with _bare(model, gradients.parameters), inputs.watching():
        for batch in data:
            batch, count = _moved(batch, device), count + 1
            inputs.masks = _masks(batch)
            if gradients.parameters:
                loss = _loss(_call(model, batch))
                if not loss.requires_grad:
                    raise AttunementError(f"adapt: the loss does not depend on {next(iter(gradients.states)).key}")
                loss.backward()
            else:
                _call(model, batch)
            inputs.flush()
            gradients.add()
            if inputs.settled() and not gradients.parameters:
                break
    if not count:
        raise AttunementError("adapt: the data have no batch")
    return {site: _value(site, inputs.streams.get(site), gradients.states.get(site, {})) for site in wanted}


def _value(site: Site, stream: _Stream | None, gradients: Mapping[Need, State]) -> Statistics:
    if stream is None and not gradients:
        raise AttunementError(f"adapt: the data never reached {site.key}, so it has no statistics; leave it out")
    states = {**(stream.states if stream is not None else {}), **gradients}
    values = {need.name: need.value(state) for need, state in states.items()}
    return Statistics(values) if stream is None else Statistics(values, stream.tokens, stream.batches, stream.peak)


# --- inputs ---


class _Stream:
    """The inputs that some sites see alike."""

    def __init__(self, sites: set[Site], needs: Iterable[Need]) -> None:
        self.sites = sites
        self.states: dict[Need, State] = {need: {} for need in needs}
        self.tokens, self.batches, self.peak = 0, 0, float("-inf")

    def add(self, rows: Tensor) -> None:
        self.tokens, self.batches = self.tokens + len(rows), self.batches + 1
        self.peak = max(self.peak, float(rows.max()))
        for need, state in self.states.items():
            need.add(state, rows)


class _Held(NamedTuple):
    """An input whose rows wait until it is known which sites see it."""

    x: Tensor
    version: int
    shape: Any
    rows: Tensor
    sites: list[Site]


class _Inputs:
    """Follows what enters the modules of some sites."""

    def __init__(self, wanted: Mapping[Site, Sequence[Need]]) -> None:
        self.needs = {s: [n for n in needs if not n.of_gradient] for s, needs in wanted.items()}
        self.by_module: dict[nn.Module, list[Site]] = {}
        for site, needs in self.needs.items():
            if needs:
                self.by_module.setdefault(site.module, []).append(site)
        self.streams: dict[Site, _Stream] = {}
        self.masks: list[Tensor] = []
        self.held: _Held | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(self._entering(sites), with_kwargs=True)
            for module, sites in self.by_module.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, sites: list[Site]) -> Any:
        site = sites[0]
        shape = _geometry(site)

        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            held = self.held
            if held is not None and held.x is x and held.version == x._version and held.shape == shape:
                held.sites.extend(sites)
                return
            self.flush()
            rows = _rows(site, x, self.masks)
            if not torch.isfinite(rows).all():
                raise AttunementError(f"adapt: what the data send into {site.key} is not finite")
            if len(rows):
                self.held = _Held(x, x._version, shape, rows, list(sites))

        return hook

    @torch.no_grad()
    def flush(self) -> None:
        """Count the input that waits for all sites that saw it; sites that part ways here go on with copies."""
        held, self.held = self.held, None
        if held is None:
            return
        saw = set(held.sites)
        if new := saw - self.streams.keys():
            needs = dict.fromkeys(need for site in held.sites if site in new for need in self.needs[site])
            stream = _Stream(new, needs)
            self.streams.update(dict.fromkeys(new, stream))
        for stream in {id(self.streams[site]): self.streams[site] for site in held.sites}.values():
            if left := stream.sites - saw:
                parting = copy.copy(stream)
                parting.sites, parting.states = left, copy.deepcopy(stream.states)
                self.streams.update(dict.fromkeys(left, parting))
                stream.sites = stream.sites - left
            stream.add(held.rows)

    def settled(self) -> bool:
        return self.streams.keys() == {site for sites in self.by_module.values() for site in sites} and all(
            need.settled(state) for stream in self.streams.values() for need, state in stream.states.items()
        )


def _geometry(site: Site) -> Any:
    """What beside x decides the rows: nothing, or the window of a convolution."""
    if not isinstance(site.layout, ConvLayout):
        return None
    conv: Any = site.module
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def _rows(site: Site, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """What the matrix is multiplied with, (tokens, in), padding left out: a copy."""
    x = x.detach()
    dtype = working_dtype(x)
    if isinstance(site.layout, ConvLayout):
        conv: Any = site.module
        pick = torch.eye(site.inputs, dtype=x.dtype, device=x.device).repeat(conv.groups, 1)  # (groups*in, in)
        kernel = conv._parameters["weight"].shape[1:]
        patches = conv._conv_forward(x, pick.reshape(-1, *kernel), None)  # (batch, groups*in, *space)
        batched = patches if patches.dim() == len(kernel) + 1 else patches[None]
        return batched.movedim(1, -1).reshape(-1, site.inputs).to(dtype)
    fitting = [m for m in masks if m.shape == x.shape[:-1] or (x.dim() == 2 and m.numel() == len(x))]
    if len(fitting) > 1:  # of an encoder and of a decoder, equally long: cross-attention reads the encoder's
        decodes = "decoder" in site.name and not site.role.startswith("cross")
        fitting = fitting[1:] if decodes else fitting[:1]
    if fitting:
        return x[fitting[0].reshape(x.shape[:-1])].to(dtype)
    return x.reshape(-1, x.shape[-1]).to(dtype, copy=True)


# --- gradients ---


class _Gradients:
    """Takes up the gradients of the weights at some sites."""

    def __init__(self, wanted: Mapping[Site, Sequence[Need]]) -> None:
        self.states: dict[Site, dict[Need, State]] = {
            site: {need: {} for need in needs if need.of_gradient}
            for site, needs in wanted.items()
            if any(need.of_gradient for need in needs)
        }
        self.parameters = {id(p): p for site in self.states if (p := _weight(site)) is not None}

    def add(self) -> None:
        idle = [site for site in self.states if _weight(site).grad is None]
        for site in idle:
            if len(idle) == len(self.states) or not all(need.of_idle for need in self.states[site]):
                raise AttunementError(f"adapt: the loss does not depend on {site.key}, so it has no gradient")
        for site, states in self.states.items():
            P = _weight(site)
            gradient = torch.zeros_like(P) if P.grad is None else P.grad
            for need, state in states.items():
                need.add(state, site.take(gradient).to(working_dtype(P), copy=True))
        for P in self.parameters.values():
            P.grad = None


def _weight(site: Site) -> Tensor:
    return site.module._parameters[site.parameter or ""]  # type: ignore[return-value]


# --- the run ---


@contextlib.contextmanager
def _bare(model: nn.Module, parameters: Mapping[int, Tensor]) -> Iterator[None]:
    """Eval mode, and gradients of these parameters alone; everything is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    for p, *_ in kept:
        p.requires_grad_(id(p) in parameters)
        p.grad = None
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(bool(parameters)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, required, grad in kept:
            p.requires_grad_(required)
            p.grad = grad


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch) if type(batch) in (tuple, list) else batch
    return batch


def _masks(batch: Any) -> list[Tensor]:
    """The masks of a batch, (batch, tokens): true for what is no padding."""
    given = (
        [batch.get(name) for name in ("attention_mask", "decoder_attention_mask")] if isinstance(batch, dict) else []
    )
    return [mask != 0 for mask in given if isinstance(mask, Tensor) and mask.dim() == 2]


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise AttunementError(f"adapt: a batch of the data must be a mapping, a tuple or a tensor, got {batch!r:.80}")


def _loss(out: Any) -> Tensor:
    loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise AttunementError(
            "adapt: gradients need a loss: batches with labels, for a model that then returns a loss, or a model that "
            f"returns a number; got {type(out).__name__} without one"
        )
    return loss.reshape(())
