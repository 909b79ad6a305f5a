"""The models of the matrix: the toy model, and tiny models of transformers for the places that it has not.

They are built once and copied. `given` makes a batch for any of them, `run` and `out` give its logits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from toy_model import LAYERS, Layer, Mould, ids, toy

WIDTH, HIDDEN, HEADS, TOKENS, WORDS, END = 8, 12, 2, 5, 13, 1
TEXT = {"vocab_size": WORDS, "bos_token_id": 2, "eos_token_id": END, "pad_token_id": 0, "use_cache": False}
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
POSITIONS = {"max_position_embeddings": 24}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Spot(NamedTuple):
    """A place for methods that act on more than one matrix: what it is called in any model, where it stands, and which
    kinds of methods have a place there."""

    home: str
    role: str
    kinds: tuple[str, ...]
    block: int | None = None
    stack: str = ""

    def __call__(self, place: Any) -> bool:
        return (place.role, place.block, place.stack) == (self.role, self.block, self.stack)


SPOTS: dict[str, Spot] = {
    "any_stack": Spot("toy", "backbone", ("sequence", "network")),
    "any_block": Spot("toy", "block", ("sequence",), 0),
    "decoder_backbone": Spot("decoder", "backbone", ("sequence", "network")),
    "grouped_self_attention": Spot("decoder", "attention", ("attention",), 0),
    "fused_self_attention": Spot("fused", "attention", ("attention",), 1),
    "encoder_backbone": Spot("encoder", "backbone", ("sequence", "network")),
    "encoder_self_attention": Spot("encoder", "attention", ("attention",), 0),
    "backbone_of_encoder": Spot("encoder_decoder", "backbone", ("sequence", "network"), stack="encoder"),
    "backbone_of_decoder": Spot("encoder_decoder", "backbone", ("sequence",), stack="decoder"),
    "self_attention_of_decoder": Spot("encoder_decoder", "attention", ("attention",), 1, "decoder"),
    "cross_attention": Spot("encoder_decoder", "cross_attention", ("attention",), 0, "decoder"),
    "vision_backbone": Spot("vision", "backbone", ("sequence", "network")),
    "vision_block": Spot("vision", "block", ("sequence",), 1),
    "vision_self_attention": Spot("vision", "attention", ("attention",), 0),
}
PLACES: dict[str, Layer | Spot] = {**LAYERS, **SPOTS}
HOMES = tuple(dict.fromkeys(place.home for place in PLACES.values()))


# models whose norms compute in the precision that they are given: others would bound what a test can see in float64


def _decoder(classes: int | None) -> nn.Module:
    still = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None}
    groups = {"num_key_value_heads": 1, "num_labels": classes or 2}
    config = transformers.Starcoder2Config(**SIZES, **TEXT, **POSITIONS, **still, **groups)
    kind = transformers.Starcoder2ForSequenceClassification if classes else transformers.Starcoder2ForCausalLM
    return kind(config)


def _fused(classes: int | None) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 24}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **still, **TEXT, num_labels=classes or 2)
    kind = transformers.GPT2ForSequenceClassification if classes else transformers.GPT2LMHeadModel
    return kind(config)


def _encoder(classes: int | None) -> nn.Module:
    text = {key: value for key, value in TEXT.items() if key != "use_cache"}
    config = transformers.BertConfig(**SIZES, **STILL, **text, **POSITIONS, num_labels=classes or 2)
    kind = transformers.BertForSequenceClassification if classes else transformers.BertForMaskedLM
    return kind(config)


def _encoder_decoder(classes: int | None) -> nn.Module:
    sizes = {f"{side}_{word}": size for side in ("encoder", "decoder") for word, size in _SIDE.items()}
    ends = {"decoder_start_token_id": END, "forced_eos_token_id": None, "num_labels": classes or 2}
    config = transformers.BartConfig(d_model=WIDTH, dropout=0.0, **sizes, **TEXT, **POSITIONS, **ends)
    kind = transformers.BartForSequenceClassification if classes else transformers.BartForConditionalGeneration
    return kind(config)


_SIDE = {"layers": 2, "ffn_dim": HIDDEN, "attention_heads": HEADS}


def _vision(classes: int | None) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, **STILL, image_size=4, patch_size=2, num_labels=classes or 2)
    if classes:
        return transformers.ViTForImageClassification(config)
    return transformers.ViTModel(config, add_pooling_layer=False)


@functools.cache
def _mould(name: str, dtype: torch.dtype, classes: int | None) -> Mould:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: nn.Module = globals()[f"_{name}"](classes)
        for key, parameter in model.named_parameters():  # their own start is so small that nothing would be seen
            spread = 0.3 if parameter.dim() > 1 or "bias" in key else 0.1
            nn.init.normal_(parameter, float(parameter.dim() == 1 and key.endswith("weight")), spread)
        model.home = name  # type: ignore[assignment]
        return Mould(model.to(dtype).eval())


def home(name: str, dtype: torch.dtype = torch.float64, classes: int | None = None) -> nn.Module:
    """A fresh copy of the model of that name, in eval mode: a language model, or one with so many classes."""
    return toy(dtype, classes) if name == "toy" else _mould(name, dtype, classes)()


def data(model: Any) -> list[Any]:
    """What a method may look at before it starts: batches of which all but the bare vision model make a loss."""
    batch: Any = given(model)
    if model.home == "toy":
        return [(batch, True)]
    if model.home == "vision":
        return [batch]
    labels = batch["input_ids"]
    return [{**batch, "labels": labels[:, 0] * 0 if "Classification" in type(model).__name__ else labels}]


def given(model: Any, batch: int = 3) -> Tensor | dict[str, Tensor]:
    """A batch for a model; a text of it is shorter than the others."""
    name = model.home
    if name == "toy":
        return ids(batch)
    generator = torch.Generator().manual_seed(2)
    if name == "vision":
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {"pixel_values": torch.randn(batch, 3, 4, 4, generator=generator).to(dtype)}
    words = torch.randint(3, WORDS, (batch, TOKENS), generator=generator)
    mask = torch.ones_like(words)
    words[:, -1] = END
    words[-1, -2:], mask[-1, -1] = torch.tensor([END, 0]), 0
    inputs = {"input_ids": words, "attention_mask": mask}
    if type(model).__name__ == "BartForConditionalGeneration":
        inputs["decoder_input_ids"] = torch.randint(3, WORDS, (batch, 4), generator=generator)
    return inputs


def some(inputs: Tensor | dict[str, Tensor], rows: slice) -> Any:
    """Some rows of a batch."""
    return inputs[rows] if isinstance(inputs, Tensor) else {key: value[rows] for key, value in inputs.items()}


def run(model: Any, inputs: Any = None) -> Tensor:
    """What a model gives, as one tensor."""
    inputs = given(model) if inputs is None else inputs
    if isinstance(inputs, Tensor):
        return model(inputs)  # type: ignore[no-any-return]
    found = model(**inputs)
    return found["logits"] if "logits" in found else found["last_hidden_state"]  # type: ignore[no-any-return]


def out(model: Any, inputs: Any = None) -> Tensor:
    """The same without a graph."""
    with torch.no_grad():
        return run(model, inputs)


@functools.cache
def alone(name: str) -> Tensor:
    """What the model of that name gives before anything is done to it: the same bits each time."""
    return out(home(name))


def fill(model: Any, state: dict[str, Tensor], assign: bool) -> None:
    """Values for a model that has none; buffers that a state dict leaves out are those of another such model."""
    model.load_state_dict(state, assign=assign)
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    for name, buffer in home(model.home, dtype).named_buffers():
        if name not in state:
            owner, _, word = name.rpartition(".")
            model.get_submodule(owner)._buffers[word] = buffer
