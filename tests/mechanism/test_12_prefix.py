"""Point 12: a prefix never enters the cache, and moves no position unless it is told to."""

import dataclasses

import pytest
import torch
from families import family, logits, moved, own, padded, text

import attunement as at

PREFIX = at.Prefix(count=3, std=1.0)
GENERATING = ("llama", "gpt2", "mistral", "t5", "bart")


def prefixed(name, method=PREFIX, seed=0, **options):
    model = family(name, **options)
    torch.manual_seed(seed)
    moved(at.adapt(model, method, name="a"), seed)
    return model


def words(model, name, given, **wanted):
    """What is generated behind the text."""
    inputs = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    torch.manual_seed(3)
    found = model.generate(**inputs, max_new_tokens=5, **wanted)
    return found if model.config.is_encoder_decoder else found[:, inputs["input_ids"].shape[1] :]


WANTED = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled_beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("name", GENERATING)
def test_with_and_without_a_cache_the_words_are_the_same(name, wanted):
    model, given = prefixed(name), text(name)
    found = words(model, name, given, **wanted)
    assert torch.equal(words(model, name, given, **wanted, use_cache=False), found)
    changed = logits(model, text(name))
    with at.using(model, None):
        assert not torch.allclose(logits(model, text(name)), changed, atol=1e-3)


# a decoder adds words behind pads on the right, where the base alone differs too
PADDED = [(name, side) for name in GENERATING for side in ("left", "right")
          if side == "left" or name not in ("llama", "gpt2", "mistral")]  # fmt: skip


@pytest.mark.parametrize(("name", "side"), PADDED)
def test_pads_change_no_word(name, side):
    model, given = prefixed(name), text(name)
    found = words(model, name, given, do_sample=False)
    assert torch.equal(words(model, name, padded(name, given, side), do_sample=False), found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cache_is_that_of_the_text(name, implementation):
    model, given = prefixed(name, attn_implementation=implementation), text(name)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
    assert cache.get_seq_length() == 6
    with at.using(model, None), torch.no_grad():
        plain = model(**given, use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys), "the first layer reads what it read"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_has_one_too(name):
    model, given = family(name), text(name)
    base = logits(model, given)
    torch.manual_seed(0)
    moved(at.adapt(model, PREFIX, on="cross_attention"))
    found = words(model, name, given, do_sample=False)
    assert torch.equal(words(model, name, given, do_sample=False, use_cache=False), found)
    assert torch.equal(words(model, name, padded(name, given, "left"), do_sample=False), found) or name == "bart"
    assert torch.equal(words(model, name, padded(name, given, "right"), do_sample=False), found)
    assert not torch.allclose(logits(model, given), base, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_move_where_that_is_asked_for(name):
    """A prefix with positions, as PEFT's checkpoints mean it: the text stands behind it."""
    model, given = prefixed(name), text(name)
    behind = {**given, "position_ids": torch.arange(3, 9).expand(2, -1)}
    expected = logits(model, behind)
    assert not torch.allclose(logits(model, given), expected, atol=1e-4)
    other = prefixed(name, at.Prefix(count=3, std=1.0, offset_positions=True))
    assert torch.allclose(logits(other, given), expected, atol=1e-5)
    assert torch.allclose(logits(other, {"input_ids": given["input_ids"]}), expected, atol=1e-5)
    for side in ("left", "right"):
        assert torch.allclose(own(logits(other, padded(name, given, side)), expected, side), expected, atol=1e-5)
    found = words(other, name, given, do_sample=False)
    assert torch.equal(words(other, name, given, do_sample=False, use_cache=False), found)
    assert torch.equal(words(other, name, padded(name, given, "left"), do_sample=False), found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_weight_no_position_moves(name):
    model, given = prefixed(name, at.Prefix(count=3, std=1.0, offset_positions=True)), text(name)
    (only,) = at.adapters(model)
    with at.using(model, None):
        expected = logits(model, given)
    for none in (at.Weighted({only: 0.0}), at.Sum(at.Weighted({only: 0.0}), None), at.Weighted({at.Stack(only): 0.0})):
        with at.using(model, none):
            assert torch.equal(logits(model, given), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_the_user_are_kept(name):
    model, given = prefixed(name), text(name)
    expected = logits(model, given)
    at_six = {**given, "position_ids": torch.arange(6).expand(2, -1)}
    assert torch.equal(logits(model, at_six), expected)
    at_other = {**given, "position_ids": torch.arange(6).flip(0).expand(2, -1)}
    assert not torch.allclose(logits(model, at_other), expected, atol=1e-4)


def test_two_prefixes_stand_side_by_side():
    model, given = prefixed("llama"), text("llama")
    alone = logits(model, given)
    torch.manual_seed(1)
    moved(at.adapt(model, at.Prefix(count=2, std=1.0), name="b"), 1)
    with at.using(model, at.Stack("a", "b")):
        both = logits(model, given)
        found = words(model, "llama", given, do_sample=False)
        assert torch.equal(words(model, "llama", given, do_sample=False, use_cache=False), found)
        left = words(model, "llama", padded("llama", given, "left"), do_sample=False)
    assert torch.equal(left, found)
    assert not torch.allclose(both, alone, atol=1e-4)
    with at.using(model, at.Stack("b", "a")):
        assert torch.allclose(logits(model, given), both, atol=1e-5), "keys have no order"


ROWS = ("a", None, "b", "a")


@pytest.mark.parametrize("wanted", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "none", "beams"])
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", [PREFIX, at.Prompt(count=3, std=1.0)], ids=["prefix", "prompt"])
def test_rows_have_tokens_of_their_own(name, method, wanted):
    model, given = prefixed(name, method), text(name, batch=4)
    given["attention_mask"][1, :2] = 0
    torch.manual_seed(1)
    moved(at.adapt(model, dataclasses.replace(method, count=2), name="b"), 1)
    with at.using(model, at.Rows(ROWS)):
        together = logits(model, given)
        found = words(model, name, given, do_sample=False, **wanted)
        with pytest.raises(at.AttunementError, match="4 rows, but the batch has 3"):
            words(model, name, {key: value[:3] for key, value in given.items()})
    for row, item in enumerate(ROWS):
        mine = {key: value[row : row + 1] for key, value in given.items()}
        with at.using(model, item):
            assert torch.allclose(logits(model, mine)[0], together[row], atol=1e-5)
            alone = words(model, name, mine, do_sample=False, **wanted)[0]
        assert torch.equal(found[row, : len(alone)], alone)
        assert not found[row, len(alone) :].any(), "pads"


def test_rows_refuse_a_cache_that_they_cannot_share():
    model, given = prefixed("llama"), text("llama", batch=2)
    with at.using(model, "a"), torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
    with at.using(model, at.Rows(["a", None])), pytest.raises(at.AttunementError, match="use_cache=False"):
        model(input_ids=given["input_ids"][:, :1], past_key_values=cache)
