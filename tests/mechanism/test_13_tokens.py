"""Point 13: tokens that a backbone reads and nobody outside sees: lengths, pads, positions, generation, refusals."""

import pytest
import torch
from families import CAUSAL, family, logits, moved, own, padded, text
from test_12_prefix import WANTED, words

import attunement as at

METHODS = {
    "prompt": at.Prompt(count=3, std=1.0),
    "mlp": at.PTuning(count=3),
    "lstm": at.PTuning(count=3, encoder="lstm"),
    "dept": at.DePT(count=3, rank=2, length=16, std=1.0),
}
PROMPT = METHODS["prompt"]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
GENERATING = ("llama", "gpt2", "mistral", "bloom", "gptj", "falcon", "opt", "t5", "bart")


def prompted(name, method=PROMPT, seed=0, adapter="a", model=None, **options):
    model = family(name, **options) if model is None else model
    torch.manual_seed(seed)
    moved(at.adapt(model, method, name=adapter), seed, 0.3)
    return model


def states(model, given):
    with torch.no_grad():
        return model.base_model(**given).last_hidden_state


# --- what they are ---


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_prompt_is_embeddings_before_those_of_the_text(name, implementation):
    model, given = family(name, attn_implementation=implementation), text(name)
    table = model.get_input_embeddings()
    torch.manual_seed(0)
    adapter = moved(at.adapt(model, PROMPT))
    stack = (lambda: model.encoder) if name == "t5" else (lambda: model.base_model)
    inputs = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    with torch.no_grad():
        found = stack()(**inputs).last_hidden_state
        P = next(tensor for key, tensor in adapter.state().items() if key.endswith("tokens.P"))
        adapter.detach()
        both = torch.cat((P.expand(2, -1, -1), table(inputs["input_ids"])), dim=1)
        expected = stack()(inputs_embeds=both, attention_mask=torch.ones(2, 9)).last_hidden_state
    if name == "t5":  # its decoder reads them too
        assert torch.allclose(found, expected, atol=1e-5)
    else:
        assert torch.allclose(found, expected[:, 3:], atol=1e-5)


@every_method
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "t5", "bart"])
def test_lengths_and_losses_are_those_of_the_text(name, method):
    model, given = family(name), text(name)
    bare = logits(model, given)
    prompted(name, method, model=model)
    labels = torch.tensor([0, 1]) if bare.dim() == 2 else given.get("decoder_input_ids", given["input_ids"])
    with torch.no_grad():
        out = model(**given, labels=labels, output_hidden_states=True)
    assert out.logits.shape == bare.shape
    assert not torch.allclose(out.logits, bare, atol=1e-4)
    hidden = out.get("hidden_states") or out.decoder_hidden_states
    assert {one.shape[1] for one in hidden} == {bare.shape[1] if bare.dim() == 3 else 6}
    if name in ("llama", "gpt2"):
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert torch.allclose(out.loss, expected, atol=1e-5)
    with torch.no_grad():
        as_tuple = model(**given, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits)


@every_method
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_no_mask_is_a_full_one_and_embeddings_are_as_good_as_ids(name, method):
    model, given = prompted(name, method), text(name)
    found = logits(model, given)
    assert torch.allclose(logits(model, {k: v for k, v in given.items() if k != "attention_mask"}), found, atol=1e-5)
    embeds = {key: value for key, value in given.items() if key != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(given["input_ids"]).detach()
    if name == "t5":
        embeds["decoder_input_ids"] = given["decoder_input_ids"]
    assert torch.allclose(logits(model, embeds), found, atol=1e-5)


# --- pads ---


@pytest.mark.parametrize("side", ["left", "right"])
@every_method
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_padded_row_is_the_row_alone(name, implementation, method, side):
    model, given = prompted(name, method, attn_implementation=implementation), text(name)
    alone = logits(model, given)
    assert torch.allclose(own(logits(model, padded(name, given, side)), alone, side), alone, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*CAUSAL, "bloom", "falcon", "gptj", "gpt_neo", "mpt", "mamba"])
def test_a_padded_row_is_the_row_alone_in_other_decoders(name, side):
    model, given = prompted(name), text(name)
    alone = logits(model, given)
    assert torch.allclose(own(logits(model, padded(name, given, side)), alone, side), alone, atol=1e-5)
    with at.using(model, None):
        assert not torch.allclose(logits(model, given), alone, atol=1e-4)


@every_method
@pytest.mark.parametrize("name", ["bert", "roberta", "bart", "electra", "albert", "modernbert", "deberta_v2"])
def test_pads_on_the_right_of_an_encoder_change_nothing(name, method):
    model, given = prompted(name, method), text(name)
    alone = logits(model, given)
    assert torch.allclose(logits(model, padded(name, given, "right")), alone, atol=1e-5)


def test_rows_of_unlike_lengths_in_one_batch():
    model, given = prompted("llama"), text("llama", batch=3)
    given["attention_mask"][1, :2] = given["attention_mask"][2, :4] = 0
    together = logits(model, given)
    for row, pads in enumerate((0, 2, 4)):
        alone = logits(model, {"input_ids": given["input_ids"][row : row + 1, pads:]})
        assert torch.allclose(together[row, pads:], alone[0], atol=1e-5)


# --- generation ---


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@every_method
def test_with_and_without_a_cache_the_words_are_the_same(name, wanted, method):
    model, given = prompted(name, method), text(name)
    found = words(model, name, given, **wanted)
    assert torch.equal(words(model, name, given, **wanted, use_cache=False), found)


@pytest.mark.parametrize("name", GENERATING)
def test_generating_in_many_models(name):
    model, given = prompted(name), text(name)
    found = words(model, name, given, do_sample=False)
    assert torch.equal(words(model, name, given, do_sample=False, use_cache=False), found)
    if name != "bart":  # whose own positions count pads on the left
        assert torch.equal(words(model, name, padded(name, given, "left"), do_sample=False), found)


def test_generating_is_choosing_the_likeliest_word_again_and_again():
    model, given = prompted("llama"), text("llama")
    rows = given["input_ids"]
    for _ in range(5):
        rows = torch.cat((rows, logits(model, {"input_ids": rows})[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(words(model, "llama", given, do_sample=False, eos_token_id=None), rows[:, 6:])


def test_generating_from_embeddings():
    model, given = prompted("llama"), text("llama")
    found = words(model, "llama", given, do_sample=False)
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    mask = given["attention_mask"]
    assert torch.equal(
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=5, do_sample=False), found
    )


# --- several ---


def test_two_prompts_stand_one_after_the_other():
    model, given = prompted("llama"), text("llama")
    prompted("llama", at.Prompt(count=2, std=1.0), 1, "b", model)
    P = {name: next(iter(adapter.state().values())) for name, adapter in at.adapters(model).items()}
    found = {}
    for order in (("a", "b"), ("b", "a")):
        with at.using(model, at.Stack(*order)):
            found[order] = logits(model, given)
            left = padded("llama", given, "left")
            assert torch.allclose(own(logits(model, left), found[order], "left"), found[order], atol=1e-5)
            cached = words(model, "llama", given, do_sample=False)
            assert torch.equal(words(model, "llama", given, do_sample=False, use_cache=False), cached)
    assert not torch.allclose(found["a", "b"], found["b", "a"], atol=1e-4)
    at.detach(model)
    table = model.get_input_embeddings()(given["input_ids"])
    possible = [
        logits(model, {"inputs_embeds": torch.cat((P[x].expand(2, -1, -1), P[y].expand(2, -1, -1), table), 1)})[:, 5:]
        for x, y in ("ab", "ba")
    ]
    for one in found.values():
        assert any(torch.allclose(one, two, atol=1e-5) for two in possible)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_tokens_have_no_weight(name):
    method = at.VPT(count=3) if name == "vit" else PROMPT
    model = prompted(name, method)
    prompted(name, method, 1, "b", model)
    for active in (at.Weighted({"a": 0.5}), at.Weighted({"a": 1.5, "b": 1.0}), at.Average("a", "b")):
        with pytest.raises(at.AttunementError, match="no weight; Stack puts them"):
            at.use(model, active)
    at.use(model, at.Weighted({"a": 1.0, "b": 0.0}))


def test_prompt_prefix_and_weights_in_one_recipe():
    model, given = family("llama"), text("llama")
    base = logits(model, given)
    torch.manual_seed(0)
    recipe = {
        "backbone": PROMPT,
        "self_attention": at.Prefix(count=2, std=1.0),
        "attention.{query,value}": at.LoRA(rank=2),
        "mlp": at.Bottleneck(size=4),
    }
    adapter = moved(at.adapt(model, recipe))
    alone = logits(model, given)
    for side in ("left", "right"):
        assert torch.allclose(own(logits(model, padded("llama", given, side)), alone, side), alone, atol=1e-5)
    found = words(model, "llama", given, do_sample=False)
    assert torch.equal(words(model, "llama", given, do_sample=False, use_cache=False), found)
    adapter.merge(partial=True)
    assert torch.allclose(logits(model, given), alone, atol=1e-4)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(logits(model, given), base)


# --- among the patches of an image ---


def patches(model, pixels, shallow=None, deep=None):
    """A ViT written out, with tokens behind the patches: one lot through all blocks, others in one block each."""
    vit = model.vit
    x = vit.embeddings(pixels)
    patches = x.shape[1]
    if shallow is not None:
        x = torch.cat((x, shallow.expand(len(x), -1, -1)), 1)
    for i, block in enumerate(vit.layers):
        if deep is None:
            x = block(x)
            continue
        here = torch.cat((x, deep[i].expand(len(x), -1, -1)), 1)
        x = block(here)[:, : x.shape[1]]
    return model.classifier(vit.layernorm(x[:, :patches])[:, 0])


def test_visual_prompts_are_what_the_paper_says():
    torch.manual_seed(0)
    model, pixels = family("vit"), torch.randn(2, 3, 32, 32)
    given, base = {"pixel_values": pixels}, {}
    base = logits(model, given)
    head = {key: value.clone() for key, value in model.classifier.state_dict().items()}
    shallow = at.adapt(model, at.VPT(count=3, deep=False), name="shallow")
    deep = at.adapt(model, at.VPT(count=2), name="deep")
    P = next(part.tensor("P") for part in shallow.parts if type(part.method) is at.VPT)
    Q = [part.tensor("P") for part in deep.parts if type(part.method) is at.VPT]
    assert len(Q) == 2
    with torch.no_grad():
        with at.using(model, None):
            plain = patches(model, pixels)
            one, many = patches(model, pixels, P), patches(model, pixels, None, Q)
            both = patches(model, pixels, P, Q)
        assert torch.allclose(plain, base, atol=1e-5)
        for active, expected in (("shallow", one), ("deep", many), (at.Stack("shallow", "deep"), both)):
            with at.using(model, active):
                assert torch.allclose(model(**given).logits, expected, atol=1e-5), active
    at.detach(model)
    assert all(torch.equal(value, head[key]) for key, value in model.classifier.state_dict().items())


def test_visual_prompts_keep_out_of_positions_that_turn():
    """The last tokens of DINOv3 are turned to the places of the patches, so that others must not be last."""
    torch.manual_seed(0)
    model, pixels = family("dinov3"), torch.randn(2, 3, 32, 32)
    deep = moved(at.adapt(model, at.VPT(count=2)), 0)
    P = [part.tensor("P") for part in deep.parts]
    with torch.no_grad():
        found = model(pixels).last_hidden_state
        deep.detach()
        x, turns = model.embeddings(pixels), model.rope_embeddings(pixels)
        for new, block in zip(P, model.model.layer, strict=True):
            x = block(torch.cat((new.expand(2, -1, -1), x), 1), position_embeddings=turns)[:, 2:]
        assert torch.allclose(found, model.norm(x), atol=1e-5)
    at.adapt(model, at.VPT(count=2, deep=False))
    refused(lambda: model(pixels), "select 'blocks'")


# --- refusals ---


def refused(act, match):
    with pytest.raises(at.AttunementError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_more_tokens_than_positions_are_refused(name):
    limit = 32 if name == "gpt2" else 512
    model = family(name)
    words = f"count {limit} leaves no room in its {limit} positions; the most is {limit - 1}"
    refused(lambda: at.adapt(model, at.Prompt(count=limit)), words)
    assert at.adapters(model) == {}
    at.adapt(model, at.Prompt(count=limit - 4))
    refused(lambda: model(**text(name)), f"{limit - 4} tokens and 6 of the text are more than its {limit} positions")
    at.use(model, None)
    model(**text(name))


def test_ids_outside_the_vocabulary_are_refused():
    refused(lambda: at.adapt(family("llama"), at.Prompt(count=2, ids=(3, 50))), "id 50 is outside its 50 words")


@pytest.mark.parametrize("name", ["swin", "swinv2", "convnext"])
@pytest.mark.parametrize("deep", [True, False])
def test_no_place_for_visual_prompts(name, deep):
    refused(lambda: at.adapt(family(name), at.VPT(count=2, deep=deep)), "windows|no attention|backbone")


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_tokens_inside_a_model_of_text_are_refused(name):
    refused(lambda: at.adapt(family(name), at.Prompt(count=2), on="blocks[0]"), "select 'backbone'")
    refused(lambda: at.adapt(family(name), at.VPT(count=2), on="backbone"), "a model of text|Prompt is the method")


def test_a_tower_of_text_that_takes_ids_alone_is_refused():
    model = family("clip")
    refused(lambda: at.adapt(model, at.Prompt(count=2), on="text.backbone"), "takes ids alone")
    assert len(at.adapt(model, at.VPT(count=2)).parts) == 2, "the tower of images"


def test_what_has_a_value_for_each_token_is_refused_by_name():
    model = family("longformer")
    at.adapt(model, PROMPT)
    refused(lambda: model(**text("longformer")), "'global_attention_mask' has a value for each token")


def test_a_mask_of_another_kind_is_refused():
    model, given = prompted("llama"), text("llama")
    refused(lambda: model(**{**given, "attention_mask": torch.ones(2, 1, 6, 6)}), r"\(batch, tokens\) is expected")
    refused(lambda: model(**{**given, "attention_mask": {"full_attention": None}}), r"\(batch, tokens\) is expected")


def test_a_layer_alone_is_no_place_for_them():
    refused(lambda: at.adapt(family("llama"), PROMPT, on="mlp.up"), "tokens enter at a backbone or at a block")
