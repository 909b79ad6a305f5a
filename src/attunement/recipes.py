"""Techniques that are a method at a place: recipes by name, to give to `adapt` or to extend.

    at.adapt(model, at.recipes.bitfit())
    at.adapt(model, {**at.recipes.norm_tuning(), "attention.{query,value}": at.LoRA()})

Classification and regression heads train beside any of them, as with every recipe that does not name `head`.
"""

from __future__ import annotations

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.selective.train import Train

Recipe = dict[str, Method]


def bitfit() -> Recipe:
    """Every bias and nothing else (https://arxiv.org/abs/2106.10199)."""
    return {"*": Train(only="bias")}


def norm_tuning() -> Recipe:
    """The weights and biases of the norms (https://arxiv.org/abs/2312.11420)."""
    return {"norm": Train()}


def attention_tuning() -> Recipe:
    """Every matrix of the attentions, the rest frozen (https://arxiv.org/abs/2203.09795)."""
    return {"attention.*": Train()}


def linear_probe() -> Recipe:
    """The head alone, on frozen features."""
    return {"head": Train()}


def new_tokens(count: int) -> Recipe:
    """The last `count` rows of the token embedding: tokens that were added to the vocabulary.

    Raises:
        AttunementError: `count` is not a positive whole number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise AttunementError(f"new_tokens: count must be a positive whole number, got {count!r}")
    return {"embedding": Train(rows=tuple(range(-count, 0)))}


def lora_everywhere(rank: int = 8, alpha: float | None = None) -> Recipe:
    """LoRA on every matrix of attention and mlp, the placement of QLoRA (https://arxiv.org/abs/2305.14314)."""
    return {"attention.*|mlp.*": LoRA(rank=rank, alpha=alpha)}


def full() -> Recipe:
    """Every parameter: full fine-tuning, as an adapter that can be switched and taken off."""
    return {"*": Train()}
