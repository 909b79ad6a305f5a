"""One small model with every type of layer, and a list of the places in it where a method may act."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, HIDDEN, TOKENS, VOCABULARY, EXPERTS = 8, 12, 4, 11, 3


class Attention(nn.Module):
    """Two heads over a fused qkv: the rows of query, key and value one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """Gate and up in one matrix, as transformers keeps them; every expert sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.4 * torch.randn(EXPERTS, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(0.4 * torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor, share: Tensor) -> Tensor:  # (batch, tokens, width), (batch, tokens, experts)
        y = torch.zeros_like(x)
        for expert in range(EXPERTS):
            gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = y + share[..., expert, None] * F.linear(F.silu(gate) * up, self.down_proj[expert])
        return y


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.gate(x).softmax(-1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Toy(nn.Module):
    """Every layer feeds every logit, so that a change anywhere is a change of the output.

    Args:
        classes: a classification head of so many outputs; None for a language model's, tied to the embedding.
        batch_first: whether the `nn.MultiheadAttention` takes the batch first.
    """

    home = "toy"

    def __init__(self, classes: int | None = None, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(TOKENS, WIDTH)
        self.dense = nn.Linear(WIDTH, 10)
        self.transposed = Conv1D(WIDTH, 10)  # GPT-2's: 10 in, 8 out
        self.conv1d = nn.Conv1d(WIDTH, 6, 3, stride=2, padding=1, groups=2)
        self.conv2d = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 1), groups=2)
        self.conv3d = nn.Conv3d(4, 4, (2, 1, 3), stride=(2, 1, 1), padding=(1, 0, 1), groups=2, bias=False)
        self.spread = nn.Linear(16, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.sparse = Sparse()
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes or VOCABULARY, bias=False)
        if classes is None:
            self.head.weight = self.embedding.weight
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.normal_(norm.weight, 1.0, 0.1)
            nn.init.normal_(norm.bias, 0.0, 0.1)
        for bias in (self.transposed.bias, self.attention.in_proj_bias, self.attention.out_proj.bias):
            nn.init.normal_(bias, 0.0, 0.1)  # they start at zero, where what scales a bias has no gradient
        self.batch_first = batch_first
        self._gradient_checkpointing_func: Callable | None = None  # as transformers calls it

    def forward(self, ids: Tensor, learn: bool = False) -> Tensor:
        """Logits (batch, tokens, vocabulary) of (batch, tokens), or a loss, (), for what starts from gradients."""
        x = self.embedding(ids) + self.position(torch.arange(TOKENS, device=ids.device).expand_as(ids))
        x = x + self.transposed(torch.tanh(self.dense(x)))
        image = x.mT  # (batch, width, tokens)
        seen = (self.conv1d(image), self.conv2d(image.unflatten(1, (4, 2))), self.conv3d(image.unflatten(1, (4, 2, 1))))
        pooled = torch.cat([torch.tanh(y).flatten(2).mean(-1) for y in seen], dim=-1)  # (batch, 16)
        x = x + self.spread(pooled)[:, None]
        u = x if self.batch_first else x.transpose(0, 1)
        attended = self.attention(u, u, u, need_weights=False)[0]
        x = x + (attended if self.batch_first else attended.transpose(0, 1))
        x = x + self.sparse(x)
        x = x + self.twice(torch.tanh(self.twice(x)))
        for block in self.blocks:
            again = self._gradient_checkpointing_func
            x = block(x) if again is None else again(block.__call__, x)
        y = self.head(self.norm(x))
        return y.square().mean() + y[..., 0].mean() if learn else y


class Layer(NamedTuple):
    """A place of the toy model.

    path: of the module.
    parameter, role: which matrix of it is meant, and which rows, where it has several.
    read: its module reads the weight and nobody calls it, so that it has no output of its own.
    home, kinds: the model it is in, and what methods that have a place there act on.
    """

    path: str
    parameter: str | None = None
    role: str | None = None
    read: bool = False
    home: str = "toy"
    kinds: tuple[str, ...] = ("matrix", "output", "parameter")

    def __call__(self, place) -> bool:
        return (
            place.name == self.path
            and place.parameter == self.parameter
            and (
                place.role == self.role if self.role else place.view is None and place.role not in ("attention", "mlp")
            )
        )


LAYERS: dict[str, Layer] = {
    "linear": Layer("dense"),
    "linear_down": Layer("blocks.0.mlp.down"),
    "conv1D_of_gpt2": Layer("transposed"),
    "conv1d": Layer("conv1d"),
    "conv2d": Layer("conv2d"),
    "conv3d": Layer("conv3d"),
    "embedding": Layer("position"),
    "tied_embedding": Layer("embedding"),
    "tied_head": Layer("head"),
    "used_twice": Layer("twice"),
    "norm": Layer("norm"),
    "fused_qkv": Layer("blocks.0.attention.qkv"),
    "query_rows": Layer("blocks.0.attention.qkv", None, "attention.query"),
    "value_rows": Layer("blocks.0.attention.qkv", None, "attention.value"),
    "mha_in": Layer("attention", "in_proj_weight", "attention.qkv", read=True),
    "mha_value_rows": Layer("attention", "in_proj_weight", "attention.value", read=True),
    "mha_out": Layer("attention.out_proj", read=True),
    "experts_gate_up": Layer("sparse.experts", "gate_up_proj", "experts.gate_up", read=True),
    "experts_gate_rows": Layer("sparse.experts", "gate_up_proj", "experts.gate", read=True),
    "experts_down": Layer("sparse.experts", "down_proj", "experts.down", read=True),
    "attention_sublayer": Layer("blocks.1.attention.proj", None, "attention"),
    "mlp_sublayer": Layer("blocks.1.mlp.down", None, "mlp"),
    "mha_sublayer": Layer("attention", None, "attention"),
    "experts_sublayer": Layer("sparse", None, "mlp"),
}
TIED = ("tied_embedding", "tied_head")


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, key: int) -> Tensor:
        return copy.deepcopy(self.tensors[key], self.copies)


class Mould:
    """Copies of a model, as `copy.deepcopy` makes them in five times the time: nearly every test begins with one."""

    def __init__(self, model: nn.Module) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        self.bytes, self.tensors = file.getvalue(), pickler.tensors

    def __call__(self) -> Any:
        return _Unpickler(io.BytesIO(self.bytes), self.tensors).load()


@functools.cache
def _mould(dtype: torch.dtype, classes: int | None, batch_first: bool) -> Mould:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Mould(Toy(classes, batch_first).to(dtype).eval())


def toy(dtype: torch.dtype = torch.float64, classes: int | None = None, batch_first: bool = True) -> Toy:
    """A fresh copy of the one toy model, in eval mode."""
    return _mould(dtype, classes, batch_first)()


def ids(batch: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(2))


def look(model: nn.Module) -> dict[str, tuple]:
    """What a model is, beside the values of its tensors."""
    seen: dict[str, tuple] = {}
    configs: dict[int, str] = {}  # most modules have the same one
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        wanted = [(key, id(p), p.requires_grad) for key, p in module._parameters.items() if p is not None]
        config = module.__dict__.get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = repr(vars(config))
        known = None if config is None else (id(config), config._attn_implementation, configs[id(config)])
        seen[name] = (
            type(module),
            sorted(vars(module)),
            hooks,
            wanted,
            sorted(module._modules),
            module.training,
            known,
        )
    return seen


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, copied."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".attuned." not in f".{key}"}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))
