"""Rows where it is hard to tell which dimension holds them: each row as if its adapter had run alone, or a sentence."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
)

import attunement as at

ROWS = ("a", "b")
LORA = at.LoRA(rank=2)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def two(model, on, scale=0.5, method=LORA):
    """The model with adapters a and b, neither of them active."""
    torch.manual_seed(0)
    for name in ROWS:
        adapter = at.adapt(model.eval(), {on: method, "head": None}, name=name)
        for parameter in adapter.parameters():
            parameter.data += scale * torch.randn_like(parameter)
    at.use(model, None)
    return model


def one_by_one(model) -> bool:
    return model._attuned_bench.one_by_one


@torch.no_grad()
def check(model, given, get=lambda out: out, rows=ROWS):
    """Rows of one call against each row by itself; whether it took several passes."""
    bare = get(model(**given))
    with at.using(model, at.Rows(rows)):
        together = get(model(**given))
        several = one_by_one(model)
    for row, name in enumerate(rows):
        with at.using(model, name):
            alone = get(model(**{k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}))
        assert (together[row] - bare[row]).abs().max() > 1e-3
        assert torch.allclose(together[row], alone[0], atol=2e-5), name
    return several


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids):
        x = self.e(ids).transpose(0, 1)  # (tokens, batch, width)
        return self.b(torch.tanh(self.a(x)).mean(0))


class BatchFirst(SequenceFirst):
    def forward(self, ids):
        return self.b(torch.tanh(self.a(self.e(ids))).mean(1))

    def encode(self, ids):
        return torch.tanh(self.a(self.e(ids)))


@pytest.mark.parametrize("lengths", [(8, 7, 2), (2, 4), (7, 2, 8)], ids=str)
def test_tokens_first(lengths):
    model = two(SequenceFirst(), "a")
    assert all(check(model, {"ids": torch.randint(50, (2, tokens))}) for tokens in lengths)


def test_as_many_tokens_as_rows():
    """Rows come first as far as was seen; before anything was seen it is not guessed."""
    model = two(BatchFirst(), "{a,e}")
    square, other = torch.randint(50, (2, 2)), torch.randint(50, (2, 5))
    assert [check(model, {"ids": ids}) for ids in (square, other, square)] == [True, False, False]


def test_tokens_first_inside_a_language_model():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=100, tgt_vocab_size=100, d_model=32, **sizes)
    model, ids = two(FSMTForConditionalGeneration(config), "mlp.up"), torch.randint(5, 100, (2, 8))
    given = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    assert check(model, given, lambda out: out.logits)


def test_windows_stay_in_one_pass():
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    model = two(SwinModel(config), "attention.{query,value}|mlp.up")
    assert not check(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, lambda out: out.last_hidden_state)


@pytest.mark.parametrize("on", ["mlp.up", "attention.query|mlp.up", "embedding.position"])
def test_tokens_of_all_rows_in_one_dimension_stay_in_one_pass(on):
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    given = {"input_ids": torch.randint(5, 100, (2, 6))}
    assert check(two(OPTForCausalLM(config), on), given, lambda out: out.logits) == (on == "embedding.position")


class Routed(nn.Module):
    """Two experts, of which one gets four of ten tokens: as many as two for each row, and others."""

    def __init__(self):
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids):
        x = self.e(ids)
        y = torch.zeros_like(x)
        for expert, which in ((self.a, ids < 25), (self.b, ids >= 25)):
            y[which] = expert(x[which])
        return y


def test_routed_tokens_that_are_a_multiple_of_the_rows():
    model = two(Routed(), "{a,b}")
    assert check(model, {"ids": torch.tensor([[1, 2, 3, 30, 31], [4, 40, 41, 42, 43]])})


def test_images_that_belong_to_rows_unseen():
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                              image_size=8, patch_size=4)  # fmt: skip
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=99,
                         vision_feature_layer=-1)  # fmt: skip
    ids = torch.tensor([[99] * 12 + [5, 6], [99] * 4 + [7] * 8 + [8, 9]])
    given = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 8, 8)}  # three images in row 0, one in row 1
    model = two(LlavaForConditionalGeneration(config), "attention.{query,value}")
    with at.using(model, at.Rows(ROWS)), pytest.raises(at.AttunementError, match=r"\(4, 3, 8, 8\).*2 rows"):
        model(**given)
    at.detach(model)
    model = two(model, "model.language_model.*self_attn.{q,v}_proj")  # whose tokens have their row
    with torch.no_grad(), at.using(model, at.Rows(ROWS)):
        together = model(**given).logits
    for row, images in enumerate((slice(0, 3), slice(3, 4))):
        with torch.no_grad(), at.using(model, ROWS[row]):
            alone = model(input_ids=ids[row : row + 1], pixel_values=given["pixel_values"][images]).logits
        assert torch.allclose(together[row], alone[0], atol=2e-5)


def test_keys_shared_with_relative_positions():
    config = DebertaV2Config(**TEXT, relative_attention=True, position_buckets=8, share_att_key=True,
                             pos_att_type=["p2c", "c2p"], max_position_embeddings=32)  # fmt: skip
    given = {"input_ids": torch.randint(5, 100, (2, 8))}
    assert check(two(DebertaV2Model(config), "attention.*"), given, lambda out: out.last_hidden_state)


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("method", [LORA, at.DoRA(rank=2)], ids=["lora", "dora"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_relative_positions_are_no_rows(tokens, method):
    ids = torch.randint(5, 100, (2, tokens))
    model = two(t5(), "embedding.relative", method=method)
    model._attuned_bench.course.batch_first = True
    assert check(model, {"input_ids": ids, "decoder_input_ids": ids}, lambda out: out.logits)


def bart():
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    return BartForConditionalGeneration(BartConfig(d_model=32, vocab_size=100, max_position_embeddings=64, **sizes))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, pad_token_id=0))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=64))


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "on", "several"),
    [
        (t5, "*", True),
        (bart, "*", True),
        (bart, "mlp.up", False),
        (mixtral, "*", True),
        (llama, "*", False),
        (gpt2, "embedding.position", False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("tokens", [7, 2])
def test_generates_the_same_at_each_call(make, on, several, tokens):
    model = two(make(), on, 0.1)
    ids = torch.randint(5, 90, (2, tokens))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with at.using(model, at.Rows(ROWS)):
        found = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for _ in range(2)]
        assert one_by_one(model) >= several
    for row, name in enumerate(ROWS):
        with at.using(model, name):
            mine = ids[row : row + 1]
            alone = model.generate(mine, attention_mask=torch.ones_like(mine), **options)[0]
        assert all(torch.equal(some[row], alone) for some in found)


def test_a_cache_is_not_divided_while_generating():
    model, ids = two(mixtral(), "*"), torch.randint(5, 90, (2, 4))
    with at.using(model, "a"), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with at.using(model, at.Rows(ROWS)), pytest.raises(at.AttunementError, match="cache cannot be shared"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_another_way_in():
    """Sites that tell rows apart do so whoever calls them; others say what to call."""
    model, ids = two(BatchFirst(), "a"), torch.randint(50, (2, 5))
    with torch.no_grad(), at.using(model, at.Rows(ROWS)):
        together = model.encode(ids)
        with pytest.raises(at.AttunementError, match="call of the adapted model itself"):
            model.encode(torch.randint(50, (4, 5)))  # twice as many rows as there are adapters
        with pytest.raises(at.AttunementError, match="call of the adapted model itself"):
            _ = model.a.weight
    for row, name in enumerate(ROWS):
        with torch.no_grad(), at.using(model, name):
            assert torch.allclose(together[row], model.encode(ids)[row], atol=1e-5)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.head(self.encode(x).mean(1))


@pytest.mark.parametrize("grad", [True, False])
def test_another_way_into_what_reads_weights(grad):
    model, x = two(Classifier(), "attention.{query,value}|mlp.up"), torch.randn(2, 4, 16)
    with at.using(model, at.Rows(ROWS)), torch.set_grad_enabled(grad), pytest.raises(at.AttunementError, match="Rows"):
        model.encode(x)
    assert check(model, {"x": x})


def test_rows_of_one_adapter_are_that_adapter():
    model, x = two(Classifier(), "mlp.up"), torch.randn(2, 4, 16)
    assert not check(model, {"x": x}, rows=("a", "a"))
    with at.using(model, at.Rows(["a", "a"])), pytest.raises(at.AttunementError, match="2 rows"):
        model(torch.randn(3, 4, 16))
