"""Point 10: a merge would change the twin of a tied weight, and cannot be stored in a quantised one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hostile import base_state, close, gpt2, gradients, ids, llama, logits, look, perturb, same_bits
from torch import nn

import attunement as at


class Tied(nn.Module):
    """Tied as `transformers` does it: one Parameter under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(37, 16)
        self.middle = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 37, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.lm_head(self.middle(self.embedding(ids)))


def tied():
    torch.manual_seed(1)
    return Tied()


def both(model):
    if isinstance(model, Tied):
        return model.embedding, model.lm_head
    return model.get_input_embeddings(), model.get_output_embeddings()


MAKE = {"hand": tied, "llama": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}


def name_of(model, module):
    return next(name for name, m in model.named_modules() if m is module)


@pytest.mark.parametrize("end", [0, 1], ids=["embedding", "head"])
@pytest.mark.parametrize("make", MAKE)
def test_merge_into_one_of_two_tied_uses_is_refused_and_untie_works(make, end):
    model = MAKE[make]()
    ends = both(model)
    assert ends[0].weight is ends[1].weight
    bare, state = logits(model, ids()), base_state(model)
    adapter = perturb(at.adapt(model, {name_of(model, ends[end]): at.LoRA(rank=2)}), scale=0.3)
    out = logits(model, ids())
    assert not close(out, bare, 1e-3)
    with pytest.raises(at.AttunementError, match="untie"):
        adapter.merge()
    assert same_bits(base_state(model), state)
    assert torch.equal(logits(model, ids()), out)

    adapter.merge(untie=True)
    assert close(logits(model, ids()), out)
    assert ends[0].weight is not ends[1].weight
    assert torch.equal(ends[1 - end].weight, state[name_of(model, ends[1 - end]) + ".weight"])
    adapter.unmerge()
    assert ends[0]._parameters["weight"] is ends[1]._parameters["weight"], "unmerge has to tie again"
    assert same_bits(base_state(model), state)
    assert torch.equal(logits(model, ids()), out)
    adapter.detach()
    assert ends[0].weight is ends[1].weight
    assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("make", MAKE)
def test_adapting_elsewhere_merges_as_ever_and_stays_tied(make):
    model = MAKE[make]()
    site = {"hand": "middle", "llama": "*.q_proj", "gpt2": "*.c_attn"}[make]
    adapter = perturb(at.adapt(model, {site: at.LoRA(rank=2)}), scale=0.3)
    out = logits(model, ids())
    adapter.merge()
    assert close(logits(model, ids()), out)
    one, other = both(model)
    assert one.weight is other.weight


@pytest.mark.parametrize("selection", ["embedding", "head"])
@pytest.mark.parametrize("make", MAKE)
def test_train_on_a_tied_weight_keeps_both_uses_equal(make, selection):
    model, plain = MAKE[make](), MAKE[make]()
    bare = logits(model, ids())
    end = 0 if selection == "embedding" else 1
    adapter = perturb(at.adapt(model, {name_of(model, both(model)[end]): at.Train()}), scale=0.3)
    (value,) = adapter.parameters()
    with torch.no_grad():
        both(plain)[0].weight.copy_(value)
    assert both(plain)[0].weight is both(plain)[1].weight
    assert torch.equal(logits(model, ids()), logits(plain, ids()))
    one, other = both(model)
    assert torch.equal(one.weight, other.weight)

    model.train(), plain.train()
    for m in (model, plain):
        out = m(ids())
        (out if isinstance(out, torch.Tensor) else out.logits).pow(3).sum().backward()
    assert close(value.grad, both(plain)[0].weight.grad), "the gradient of one use was lost"
    model.eval()
    with at.using(model, None):
        assert torch.equal(logits(model, ids()), bare)
    adapter.detach()
    assert both(model)[0].weight is both(model)[1].weight
    assert torch.equal(logits(model, ids()), bare)


def test_train_on_both_names_of_a_tied_weight_is_one_parameter_or_refused():
    model = tied()
    seen = look(model)
    try:
        adapter = at.adapt(model, {"embedding|lm_head": at.Train()})
    except at.AttunementError:
        assert look(model) == seen
        return
    assert len(list(adapter.parameters())) == 1


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_tie_weights_after_adapt_changes_nothing(make):
    """transformers calls it again in from_pretrained, resize and post_init."""
    model = MAKE[make]()
    bare = logits(model, ids())
    ends = both(model)
    perturb(at.adapt(model, {name_of(model, ends[1]): at.LoRA(rank=2)}), scale=0.3)
    out, state = logits(model, ids()), base_state(model)
    model.tie_weights()
    assert torch.equal(logits(model, ids()), out)
    assert same_bits(base_state(model), state)
    assert ends[0]._parameters["weight"] is ends[1]._parameters["weight"]
    at.detach(model)
    assert ends[0].weight is ends[1].weight
    assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("make", MAKE)
def test_everything_skips_what_it_cannot_take_and_copies_stay_tied(make):
    model = MAKE[make]()
    adapter = perturb(at.adapt(model, {"*": at.LoRA(rank=2)}), scale=0.1)
    assert str(adapter.summary())
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids()), logits(model, ids()))
    one, two = both(other)
    assert one._parameters["weight"] is two._parameters["weight"]


def test_new_token_rows_after_resize(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(40)
    given = torch.tensor([[1, 38, 39]])
    adapter = perturb(at.adapt(model, {"embedding": at.Train(), "attention.query": at.LoRA(rank=2)}), scale=0.3)
    out = logits(model, given)
    adapter.save(tmp_path / "rows")
    other = llama(tie_word_embeddings=True)
    with pytest.raises(at.AttunementError, match=r"37|40"):
        at.load(other, tmp_path / "rows")
    other.resize_token_embeddings(40)
    at.load(other, tmp_path / "rows")
    assert torch.equal(logits(other, given), out)


# Quantised

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra [quantised] is not installed")


def quantised(bits):
    torch.manual_seed(1)
    if bits == 8:
        layers = [bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0) for _ in range(2)]
    else:
        make = bitsandbytes.nn.Linear4bit
        layers = [make(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).to("cpu")


def packed(model):
    return {key: value.clone() for key, value in base_state(model).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [at.LoRA(rank=4), at.VeRA(rank=8)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("bits", [8, 4])
def test_an_additive_change_trains_beside_a_quantised_weight(bits, method):
    model = quantised(bits)
    x = torch.randn(5, 64)
    bare, state, seen = model(x).detach(), packed(model), look(model)
    adapter = at.adapt(model, {"0|2": method})
    assert torch.equal(model(x), bare), "nothing changes at the start"
    perturb(adapter, scale=0.05)
    out = model(x)
    assert not close(out.detach(), bare, 1e-3)
    out.pow(3).sum().backward()
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    gradients(adapter)
    torch.optim.AdamW(adapter.parameters(), lr=1e-2).step()
    assert not torch.equal(model(x), out)
    assert same_bits(packed(model), state)
    moved, halves = model(x).detach(), look(model)
    with pytest.raises(at.AttunementError, match="quanti"):
        adapter.merge()
    assert look(model) == halves
    assert torch.equal(model(x), moved)
    with at.using(model, None):
        assert torch.equal(model(x), bare)
    adapter.detach()
    assert look(model) == seen
    assert torch.equal(model(x), bare)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_the_change_is_exactly_the_low_rank_product(bits):
    model = quantised(bits)
    x = torch.randn(5, 64)
    bare = model[0](x).detach()
    adapter = perturb(at.adapt(model, {"0": at.LoRA(rank=4, alpha=4)}), scale=0.05)
    tensors = {key.rpartition(".")[2]: value for key, value in adapter.state().items()}
    expected = bare + F.linear(F.linear(x, tensors["A"]), tensors["B"])
    assert close(model[0](x).detach(), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [at.DoRA(rank=4), at.SVFit(), at.HRA(rank=4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_form_that_reads_the_weight_acts_or_is_refused(bits, method):
    """Never silently on the packed bytes."""
    model = quantised(bits)
    x = torch.randn(5, 64)
    bare, seen = model(x).detach(), look(model)
    refusal = ""
    try:
        adapter = at.adapt(model, {"0": method})
    except at.AttunementError as error:
        refusal = str(error)
    if refusal:
        assert "quanti" in refusal or "additive" in refusal
        assert look(model) == seen
        return
    assert close(model(x).detach(), bare, 0.05)
    perturb(adapter, scale=0.3)
    out = model(x)
    assert not close(out.detach(), bare, 1e-2)
    out.pow(3).sum().backward()
    gradients(adapter)
    with pytest.raises(at.AttunementError):
        adapter.merge()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_from_transformers(bits, tmp_path):
    import transformers

    llama(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    model.train()  # in eval, bitsandbytes packs 4-bit weights for inference on some CPUs and has no backward then
    bare = logits(model, ids())
    adapter = perturb(at.adapt(model, at.LoRA(rank=4)), scale=0.05)
    assert not close(logits(model, ids()), bare, 1e-3)
    model(ids()).logits.pow(3).sum().backward()
    gradients(adapter)
    out = logits(model, ids())
    adapter.save(tmp_path / "adapter")
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)
    at.load(model, tmp_path / "adapter")
    assert torch.equal(logits(model, ids()), out)


def bert_mlm():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=37)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)  # as any pretrained one has it
    return model


def test_an_untied_model_is_written_whole(tmp_path):
    model = bert_mlm()
    state = base_state(model)
    head = model.cls.predictions
    adapter = perturb(at.adapt(model, at.LoRA(rank=2), on="embedding"), scale=0.3)
    out = logits(model, ids())
    adapter.merge(untie=True)
    assert head.decoder.bias is not head.bias, "the ties of other parameters go with the config's"
    adapter.unmerge()
    assert head.decoder.bias is head.bias
    assert same_bits(base_state(model), state)
    adapter.merge(untie=True, keep=False)
    adapter.detach()
    model.save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), ids()), out)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_a_tied_weight_wants_gradients_again_under_both_names(make):
    model = MAKE[make]()
    adapter = at.adapt(model, {name_of(model, both(model)[0]): at.LoRA(rank=2)})
    adapter.merge(untie=True, keep=False)
    adapter.detach()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []


@pytest.mark.parametrize("end", [0, 1])
def test_ties_are_made_again_beside_an_adapter(end):
    model = MAKE["llama"]()
    name = name_of(model, both(model)[end])
    perturb(at.adapt(model, {name: at.LoRA(rank=2)}), scale=0.3)
    out = logits(model, ids())
    model.tie_weights()
    one, other = both(model)
    assert one._parameters["weight"] is other._parameters["weight"]
    assert model.get_parameter(f"{name}.weight") is one._parameters["weight"]
    assert torch.equal(logits(model, ids()), out)
