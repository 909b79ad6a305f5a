"""The small models of the mechanism suite and the few things done to them in most of its tests."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attunement as at

WIDTH = 16
HIDDEN = 24
VOCABULARY = 37


class Attention(nn.Module):
    """One head of attention, four plain matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.output(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Tower(nn.Module):
    """An encoder written by hand: every base parameter trains, no dropout, no head."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, width)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def tower(dtype: torch.dtype = torch.float32, blocks: int = 2) -> Tower:
    torch.manual_seed(1)
    return Tower(blocks).to(dtype).eval()


def ids(batch: int = 3, tokens: int = 5, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(2))


QUERY_VALUE = "*.attention.{query,value}"

# One line a method: every form there is, and three of them together.
RECIPES: dict[str, Callable[[], object]] = {
    "lora": lambda: {QUERY_VALUE: at.LoRA(rank=2), "*.mlp.{up,down}": at.LoRA(rank=3, alpha=5)},
    "dora": lambda: {QUERY_VALUE: at.DoRA(rank=2)},
    "vera": lambda: {"*.mlp.{up,down}": at.VeRA(rank=4)},
    "hra": lambda: {QUERY_VALUE: at.HRA(rank=4)},
    "svfit": lambda: {QUERY_VALUE: at.SVFit()},
    "bottleneck": lambda: at.Bottleneck(size=4),
    "parallel": lambda: at.Bottleneck(size=4, style="parallel"),
    "ssf": lambda: {"*.mlp.{up,down}": at.SSF(), "*norm": at.SSF()},
    "ia3": lambda: {"*.attention.{key,value}": at.IA3(), "*.mlp.down": at.IA3()},
    "train": lambda: {"*norm": at.Train()},
    "mixed": lambda: {QUERY_VALUE: at.LoRA(rank=2), "mlp": at.Bottleneck(size=4), "*norm": at.Train()},
}


def perturb(adapter: at.Adapter, seed: int = 0, scale: float = 0.1) -> at.Adapter:
    """Move every trained tensor of an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype))
    return adapter


def adapted(model: nn.Module, recipe: str, name: str = "default", seed: int = 0) -> at.Adapter:
    return perturb(at.adapt(model, RECIPES[recipe](), name=name), seed)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, copied."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".attuned." not in f".{key}"}


def adapter_keys(model: nn.Module, name: str) -> list[str]:
    """The keys of one adapter; a name that nn.Module uses itself stands there with a mark behind it."""
    return [key for key in model.state_dict() if re.search(rf"(^|\.)attuned\.{re.escape(name)}~?\.", key)]


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def look(model: nn.Module) -> dict[str, tuple]:
    """Everything about a model's modules that adapting may touch: classes, attributes, hooks, gradients wanted."""
    seen: dict[str, tuple] = {}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        wanted = [(key, id(p), p.requires_grad) for key, p in module._parameters.items() if p is not None]
        seen[name] = (type(module), sorted(vars(module)), hooks, wanted, sorted(module._modules), module.training)
    return seen


def gradients(adapter: at.Adapter) -> dict[str, Tensor]:
    named = dict(adapter.named_parameters())
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in named.items()}


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    """Relative to the largest value, so that one bound suits every model."""
    return bool((left - right).abs().max() <= tolerance * right.abs().max().clamp_min(1e-30))


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


# transformers, tiny


def bert(cls: str = "BertModel", **fields):
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(1)
    return getattr(transformers, cls)(transformers.BertConfig(**{**sizes, **fields})).eval()


def llama(**fields):
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **fields})).eval()


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config).eval()


def mixture(kind: str):
    """Three layouts of experts: (E, 2I, H) twice, and (E, H, 2I), interleaved, with biases."""
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(1)
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes))
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            num_experts=4, moe_intermediate_size=HIDDEN, decoder_sparse_step=1, **sizes
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.GptOssConfig(num_local_experts=4, sliding_window=8, pad_token_id=0, **sizes)
        model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():  # tiny weights leave an expert's share below the noise
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def in_double(model):
    """In float64, with the one implementation of experts that takes it."""
    model.set_experts_implementation("eager")
    return model.double()


def logits(model: nn.Module, given: Tensor) -> Tensor:
    """Whatever a model returns, as one tensor."""
    with torch.no_grad():
        out = model(given)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


def parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)
