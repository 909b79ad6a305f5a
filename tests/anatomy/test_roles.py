"""Architecture by architecture: what a selection means, as the exact set of module names, and which rows of them."""

import gc
import weakref

import pytest
import torch
from architectures import BUILDERS, build

from attunement.anatomy import Place, anatomy
from attunement.selection import select


def over(count: int, *names: str) -> set[str]:
    """The names with # replaced by 0, 1, ..., count - 1."""
    return {name.replace("#", str(index)) for name in names for index in range(count)}


BERT = {
    "attention.query": over(3, "bert.encoder.layer.#.attention.self.query"),
    "attention.{query,value}": over(
        3, "bert.encoder.layer.#.attention.self.query", "bert.encoder.layer.#.attention.self.value"
    ),
    "attention.output": over(3, "bert.encoder.layer.#.attention.output.dense"),
    "mlp.up": over(3, "bert.encoder.layer.#.intermediate.dense"),
    "mlp.*": over(3, "bert.encoder.layer.#.intermediate.dense", "bert.encoder.layer.#.output.dense"),
    "blocks[-1:].mlp.down": {"bert.encoder.layer.2.output.dense"},
    "blocks[0,2].attention.key": {
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.2.attention.self.key",
    },
    "norm": {"bert.embeddings.LayerNorm"}
    | over(3, "bert.encoder.layer.#.attention.output.LayerNorm", "bert.encoder.layer.#.output.LayerNorm"),
    "blocks[1].norm": {
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "bert.encoder.layer.1.output.LayerNorm",
    },
    "embedding": {"bert.embeddings.word_embeddings"},
    "embedding.*": {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"},
    "pooler": {"bert.pooler.dense"},
    "head": {"classifier"},
    "blocks": over(3, "bert.encoder.layer.#"),
}
LLAMA = {
    "attention.query": over(3, "model.layers.#.self_attn.q_proj"),
    "attention.*": over(3, *(f"model.layers.#.self_attn.{part}_proj" for part in "qkvo")),
    "mlp.gate": over(3, "model.layers.#.mlp.gate_proj"),
    "mlp.{up,down}": over(3, "model.layers.#.mlp.up_proj", "model.layers.#.mlp.down_proj"),
    "norm": {"model.norm"} | over(3, "model.layers.#.input_layernorm", "model.layers.#.post_attention_layernorm"),
    "embedding": {"model.embed_tokens"},
    "blocks[1:].attention": {"model.layers.1.self_attn.o_proj", "model.layers.2.self_attn.o_proj"},
    "blocks[:-2].mlp": {"model.layers.0.mlp.down_proj"},
}
EXPERTS = {
    "experts": over(3, "model.layers.#.mlp.experts"),
    "experts.{gate,down}": over(3, "model.layers.#.mlp.experts"),
    "mlp": over(3, "model.layers.#.mlp"),
    "head": {"lm_head"},
}
VIT = {
    "attention.{query,key,value}": over(3, *(f"vit.layers.#.attention.{part}_proj" for part in "qkv")),
    "attention.output": over(3, "vit.layers.#.attention.o_proj"),
    "mlp.up": over(3, "vit.layers.#.mlp.fc1"),
    "mlp.down": over(3, "vit.layers.#.mlp.fc2"),
    "norm": {"vit.layernorm"} | over(3, "vit.layers.#.layernorm_before", "vit.layers.#.layernorm_after"),
    "conv": {"vit.embeddings.patch_embeddings.projection"},
    "head": {"classifier"},
}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "bert": BERT,
    "bert_backbone": {
        "attention.value": over(3, "encoder.layer.#.attention.self.value"),
        "pooler": {"pooler.dense"},
        "embedding": {"embeddings.word_embeddings"},
    },
    "bert_masked": {"head": {"cls.predictions.transform.dense", "cls.predictions.decoder"}},
    "bert_questions": {"head": {"qa_outputs"}},
    "bert_tokens": {"head": {"classifier"}},
    "roberta": {
        "attention.query": over(3, "roberta.encoder.layer.#.attention.self.query"),
        "head": {"classifier.dense", "classifier.out_proj"},
        "embedding.position": {"roberta.embeddings.position_embeddings"},
    },
    "roberta_masked": {"head": {"lm_head.dense", "lm_head.decoder"}},
    "distilbert": {
        "attention.*": over(
            3, *(f"distilbert.transformer.layer.#.attention.{part}_lin" for part in ("q", "k", "v", "out"))
        ),
        "mlp.up": over(3, "distilbert.transformer.layer.#.ffn.lin1"),
        "mlp.down": over(3, "distilbert.transformer.layer.#.ffn.lin2"),
        "head": {"pre_classifier", "classifier"},
    },
    "deberta": {
        "attention.query": over(3, "deberta.encoder.layer.#.attention.self.query_proj"),
        "mlp.up": over(3, "deberta.encoder.layer.#.intermediate.dense"),
        "pooler": {"pooler.dense"},
        "head": {"classifier"},
    },
    "modernbert": {
        "attention.qkv": over(3, "model.layers.#.attn.Wqkv"),
        "attention.query": over(3, "model.layers.#.attn.Wqkv"),
        "mlp.*": over(3, "model.layers.#.mlp.Wi", "model.layers.#.mlp.Wo"),
        "head": {"head.dense", "classifier"},
    },
    "llama": LLAMA | {"head": {"lm_head"}},
    "llama_classifier": LLAMA | {"head": {"score"}},
    "llama_regression": {"head": {"score"}},
    "qwen3": LLAMA
    | {
        "norm": LLAMA["norm"] | over(3, "model.layers.#.self_attn.q_norm", "model.layers.#.self_attn.k_norm"),
        "head": {"lm_head"},
    },
    "gemma": {key: value for key, value in LLAMA.items() if key != "norm"},
    "phi3": {
        "attention.{query,value}": over(3, "model.layers.#.self_attn.qkv_proj"),
        "attention.output": over(3, "model.layers.#.self_attn.o_proj"),
        "mlp.up": over(3, "model.layers.#.mlp.gate_up_proj"),
        "mlp.*": over(3, "model.layers.#.mlp.gate_up_proj", "model.layers.#.mlp.down_proj"),
    },
    "opt": {
        "attention.query": over(3, "model.decoder.layers.#.self_attn.q_proj"),
        "mlp.up": over(3, "model.decoder.layers.#.fc1"),
        "mlp": over(3, "model.decoder.layers.#.fc2"),
        "blocks[0].attention": {"model.decoder.layers.0.self_attn.out_proj"},
    },
    "mixtral": EXPERTS
    | {"router": over(3, "model.layers.#.mlp.gate"), "attention.value": over(3, "model.layers.#.self_attn.v_proj")},
    "qwen3_moe": EXPERTS | {"router": over(3, "model.layers.#.mlp.gate")},
    "gpt_oss": EXPERTS | {"router": over(3, "model.layers.#.mlp.router")},
    "deepseek": {
        "attention.query": over(3, "model.layers.#.self_attn.q_b_proj"),
        "experts": {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"},
        "mlp.down": {
            "model.layers.0.mlp.down_proj",
            "model.layers.1.mlp.shared_experts.down_proj",
            "model.layers.2.mlp.shared_experts.down_proj",
        },
        "mlp": {"model.layers.0.mlp.down_proj", "model.layers.1.mlp", "model.layers.2.mlp"},
        "router": {"model.layers.1.mlp.gate", "model.layers.2.mlp.gate"},
    },
    "gpt2": {
        "attention.{query,value}": over(3, "transformer.h.#.attn.c_attn"),
        "attention.*": over(3, "transformer.h.#.attn.c_attn", "transformer.h.#.attn.c_proj"),
        "mlp.*": over(3, "transformer.h.#.mlp.c_fc", "transformer.h.#.mlp.c_proj"),
        "mlp.down": over(3, "transformer.h.#.mlp.c_proj"),
        "norm": {"transformer.ln_f"} | over(3, "transformer.h.#.ln_1", "transformer.h.#.ln_2"),
        "embedding": {"transformer.wte"},
        "embedding.position": {"transformer.wpe"},
        "head": {"lm_head"},
    },
    "gpt2_classifier": {"head": {"score"}},
    "gpt_neox": {
        "attention.query": over(3, "gpt_neox.layers.#.attention.query_key_value"),
        "attention.output": over(3, "gpt_neox.layers.#.attention.dense"),
        "mlp.*": over(3, "gpt_neox.layers.#.mlp.dense_h_to_4h", "gpt_neox.layers.#.mlp.dense_4h_to_h"),
        "head": {"lm_head"},
    },
    "bloom": {
        "attention.{qkv,output}": over(
            3, *(f"transformer.h.#.self_attention.{n}" for n in ("query_key_value", "dense"))
        )
    },
    "falcon": {"attention.value": over(3, "transformer.h.#.self_attention.query_key_value")},
    "mamba": {
        "norm": {"backbone.norm_f"} | over(3, "backbone.layers.#.norm"),
        "head": {"lm_head"},
        "blocks[-1].conv": {"backbone.layers.2.mixer.conv1d"},
        "*.in_proj": over(3, "backbone.layers.#.mixer.in_proj"),
    },
    "t5": {
        "attention.query": over(
            2,
            "encoder.block.#.layer.0.SelfAttention.q",
            "decoder.block.#.layer.0.SelfAttention.q",
            "decoder.block.#.layer.1.EncDecAttention.q",
        ),
        "cross_attention.{query,value}": over(
            2, "decoder.block.#.layer.1.EncDecAttention.q", "decoder.block.#.layer.1.EncDecAttention.v"
        ),
        "self_attention.output": over(
            2, "encoder.block.#.layer.0.SelfAttention.o", "decoder.block.#.layer.0.SelfAttention.o"
        ),
        "decoder.blocks[0].mlp.*": {
            "decoder.block.0.layer.2.DenseReluDense.wi",
            "decoder.block.0.layer.2.DenseReluDense.wo",
        },
        "encoder.norm": {"encoder.final_layer_norm"}
        | over(2, "encoder.block.#.layer.0.layer_norm", "encoder.block.#.layer.1.layer_norm"),
        "encoder.blocks[*].norm": over(2, "encoder.block.#.layer.0.layer_norm", "encoder.block.#.layer.1.layer_norm"),
        "embedding": {"shared", "encoder.embed_tokens", "decoder.embed_tokens"},
        "embedding.relative": {
            f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias" for s in ("encoder", "decoder")
        },
        "head": {"lm_head"},
    },
    "t5_gated": {
        "encoder.mlp.gate": over(2, "encoder.block.#.layer.1.DenseReluDense.wi_0"),
        "encoder.mlp.up": over(2, "encoder.block.#.layer.1.DenseReluDense.wi_1"),
        "encoder.mlp": over(2, "encoder.block.#.layer.1.DenseReluDense.wo"),
    },
    "bart": {
        "encoder.attention.query": over(2, "model.encoder.layers.#.self_attn.q_proj"),
        "decoder.attention.query": over(
            3, "model.decoder.layers.#.self_attn.q_proj", "model.decoder.layers.#.encoder_attn.q_proj"
        ),
        "blocks[-1].mlp.up": {"model.encoder.layers.1.fc1", "model.decoder.layers.2.fc1"},
        "blocks[2].mlp.up": {"model.decoder.layers.2.fc1"},
        "head": {"lm_head"},
    },
    "bart_classifier": {"head": {"classification_head.dense", "classification_head.out_proj"}},
    "whisper": {
        "head": {"proj_out"},
        "conv": {"model.encoder.conv1", "model.encoder.conv2"},
        "cross_attention": over(2, "model.decoder.layers.#.encoder_attn.out_proj"),
    },
    "vit": VIT,
    "ast": {
        name: {
            module.replace("vit.", "audio_spectrogram_transformer.").replace("classifier", "classifier.dense")
            for module in modules
        }
        | ({"classifier.layernorm"} if name == "norm" else set())
        for name, modules in VIT.items()
    },
    "convnext": {
        "blocks": {f"convnext.encoder.stages.{stage}.layers.{layer}" for stage in (0, 1) for layer in (0, 1)},
        "blocks[2].mlp.*": {f"convnext.encoder.stages.1.layers.0.pwconv{index}" for index in (1, 2)},
        "blocks[-1].conv": {"convnext.encoder.stages.1.layers.1.dwconv"},
        "head": {"classifier"},
    },
    "resnet_hf": {
        "blocks[3].conv": {f"resnet.encoder.stages.1.layers.1.layer.{index}.convolution" for index in (0, 1)}
    },
    "swin": {"blocks[2:].attention.query": over(2, "swin.encoder.layers.1.blocks.#.attention.q_proj")},
    "wav2vec2": {
        "blocks": over(3, "wav2vec2.encoder.layers.#"),
        "attention.value": over(3, "wav2vec2.encoder.layers.#.attention.v_proj"),
        "mlp.up": over(3, "wav2vec2.encoder.layers.#.feed_forward.intermediate_dense"),
        "conv": over(2, "wav2vec2.feature_extractor.conv_layers.#.conv") | {"wav2vec2.encoder.pos_conv_embed.conv"},
        "head": {"projector", "classifier"},
    },
    "wav2vec2_ctc": {"head": {"lm_head"}},
    "clip": {
        "text.attention.query": over(2, "text_model.encoder.layers.#.self_attn.q_proj"),
        "vision.blocks[-1].mlp.down": {"vision_model.encoder.layers.2.mlp.fc2"},
        "vision.blocks": over(3, "vision_model.encoder.layers.#"),
        "embedding": {"text_model.embeddings.token_embedding"},
        "conv": {"vision_model.embeddings.patch_embedding"},
    },
    "llava": {
        "text.attention.query": over(3, "model.language_model.layers.#.self_attn.q_proj"),
        "vision.attention.query": over(3, "model.vision_tower.encoder.layers.#.self_attn.q_proj"),
        "head": {"lm_head"},
    },
    "torch_encoder": {
        "attention": over(3, "layers.#.self_attn"),
        "attention.{query,key,value}": over(3, "layers.#.self_attn"),
        "attention.output": over(3, "layers.#.self_attn.out_proj"),
        "mlp.*": over(3, "layers.#.linear1", "layers.#.linear2"),
        "norm": over(3, "layers.#.norm1", "layers.#.norm2"),
    },
    "torch_transformer": {
        "cross_attention": over(3, "decoder.layers.#.multihead_attn"),
        "decoder.self_attention.qkv": over(3, "decoder.layers.#.self_attn"),
    },
    "timm_vit": {
        "attention.query": over(3, "blocks.#.attn.qkv"),
        "attention.output": over(3, "blocks.#.attn.proj"),
        "mlp.up": over(3, "blocks.#.mlp.fc1"),
        "mlp": over(3, "blocks.#.mlp.fc2"),
        "norm": {"norm"} | over(3, "blocks.#.norm1", "blocks.#.norm2"),
        "conv": {"patch_embed.proj"},
        "head": {"head"},
    },
    "cifar_resnet": {
        "blocks": over(2, "layer1.#", "layer2.#", "layer3.#"),
        "blocks[2].conv": {"layer2.0.conv1", "layer2.0.conv2"},
        "blocks[-1].norm": {"layer3.1.bn1", "layer3.1.bn2"},
        "head": {"linear"},
        "type:Conv2d": {"conv1"} | over(2, *(f"layer{stage}.#.conv{index}" for stage in (1, 2, 3) for index in (1, 2))),
    },
    "lstm": {"embedding": {"embedding"}, "lstm": {"lstm"}, "type:RNNBase": {"lstm"}, "head": {"fc"}},
    "perceptron": {"type:Linear": {"0", "2", "4"}, "2": {"2"}},
    "one_linear": {"type:Linear": {""}},
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_selections_mean_these_modules(architecture: str) -> None:
    tree = anatomy(build(architecture))
    found = {selection: {place.name for place in select(tree, selection)} for selection in EXPECTED[architecture]}
    assert found == EXPECTED[architecture]


TASK_HEADS = {
    "bert": {"classifier"},
    "bert_questions": {"qa_outputs"},
    "bert_tokens": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "deberta": {"pooler.dense", "classifier"},
    "modernbert": {"head.dense", "head.norm", "classifier"},
    "llama_classifier": {"score"},
    "llama_regression": {"score"},
    "gpt2_classifier": {"score"},
    "bart_classifier": {"classification_head.dense", "classification_head.out_proj"},
    "vit": {"classifier"},
    "convnext": {"classifier"},
    "resnet_hf": {"classifier.1"},
    "swin": {"classifier"},
    "ast": {"classifier.layernorm", "classifier.dense"},
    "wav2vec2": {"projector", "classifier"},
    "wav2vec2_ctc": {"lm_head"},  # no token embedding: a classifier of frames
    "timm_vit": {"head"},
    "cifar_resnet": {"linear"},
    "lstm": {"fc"},
}


@pytest.mark.parametrize("architecture", BUILDERS)
def test_only_classification_and_regression_heads_are_task_heads(architecture: str) -> None:
    heads = anatomy(build(architecture)).task_heads
    assert {place.name for place in heads} == TASK_HEADS.get(architecture, set())


@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_module_has_one_place_in_order(architecture: str) -> None:
    model = build(architecture)
    tree = anatomy(model)
    assert [(place.name, place.module) for place in tree.modules.values()] == list(model.named_modules())
    assert len(set(tree.places)) == len(tree.places)
    assert sum(tree.stacks.values()) == len(tree.blocks)


# The rows of a fused matrix are what they are called: seen in what the model computes


def rows(place: Place) -> torch.Tensor:
    """The rows of a place, a view of the parameter itself: (groups, size, in)."""
    parameter = getattr(place.module, place.parameter or "weight")
    matrix = parameter.mT if place.transposed or type(place.module).__name__ == "Conv1D" else parameter
    return _cut(matrix, place, -2)


def _cut(tensor: torch.Tensor, place: Place, dim: int) -> torch.Tensor:
    if place.view is None:
        return tensor
    groups, start, size = place.view
    return tensor.unflatten(dim, (groups, -1)).narrow(dim, start, size)


def bias(place: Place) -> torch.Tensor | None:
    name = {"in_proj_weight": "in_proj_bias", None: "bias"}.get(place.parameter, f"{place.parameter}_bias")
    parameter = getattr(place.module, name, None)
    return None if parameter is None else _cut(parameter, place, -1)


@torch.no_grad()
def scale(places: list[Place], factor: float) -> None:
    for place in places:
        rows(place).mul_(factor)
        if (b := bias(place)) is not None:
            b.mul_(factor)


def outputs(architecture: str, model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if architecture == "timm_vit":
        return model(torch.randn(2, 3, 16, 16, generator=generator))
    if architecture == "torch_encoder":
        return model(torch.randn(2, 6, 32, generator=generator))
    return model(torch.randint(0, 96, (2, 6), generator=generator)).logits


def randomised(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(architecture).double() if architecture != "torch_encoder" else build(architecture)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


FUSED = ["gpt2", "gpt_neox", "bloom", "falcon", "phi3", "modernbert", "torch_encoder", "timm_vit"]


@pytest.mark.parametrize("architecture", FUSED)
def test_query_and_key_rows_only_meet_in_a_product(architecture: str) -> None:
    model = randomised(architecture)
    tree = anatomy(model)
    queries, keys = select(tree, "attention.query"), select(tree, "attention.key")
    assert all(place.view is not None for place in [*queries, *keys])
    before = outputs(architecture, model)
    scale(queries, 2.0)
    assert not torch.allclose(outputs(architecture, model), before, atol=1e-3)
    scale(keys, 0.5)
    torch.testing.assert_close(outputs(architecture, model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", FUSED)
def test_an_attention_without_its_value_rows_is_silent(architecture: str) -> None:
    model = randomised(architecture)
    tree = anatomy(model)
    scale(select(tree, "attention.value"), 0.0)
    before = outputs(architecture, model)
    scale(select(tree, "attention.query"), 3.0)
    torch.testing.assert_close(outputs(architecture, model), before)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "phi3"])
def test_a_gated_part_without_its_gate_rows_is_silent(architecture: str) -> None:
    model = randomised(architecture)
    tree = anatomy(model)
    word = "mlp" if architecture == "phi3" else "experts"
    scale(select(tree, f"{word}.gate"), 0.0)
    before = outputs(architecture, model)
    scale(select(tree, f"{word}.up"), 3.0)
    torch.testing.assert_close(outputs(architecture, model), before)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "phi3"])
def test_the_output_is_linear_in_the_up_rows_and_in_down(architecture: str) -> None:
    model = randomised(architecture)
    tree = anatomy(model)
    word = "mlp" if architecture == "phi3" else "experts"
    before = outputs(architecture, model)
    scale(select(tree, f"{word}.up"), 2.0)
    assert not torch.allclose(outputs(architecture, model), before, atol=1e-3)
    scale(select(tree, f"{word}.down"), 0.5)
    torch.testing.assert_close(outputs(architecture, model), before, rtol=1e-4, atol=1e-4)


# Sublayers: what enters at `entry` leaves at `module`, before the residual


@pytest.mark.parametrize(
    ("architecture", "selection", "whole"),
    [
        ("llama", "mlp", "model.layers.{}.mlp"),
        ("gpt2", "mlp", "transformer.h.{}.mlp"),
        ("vit", "mlp", "vit.layers.{}.mlp"),
        ("timm_vit", "attention", "blocks.{}.attn"),
        ("t5_gated", "encoder.mlp", "encoder.block.{}.layer.1.DenseReluDense"),
    ],
)
def test_a_sublayer_spans_what_the_module_around_it_does(architecture: str, selection: str, whole: str) -> None:
    model = build(architecture)
    tree = anatomy(model)
    place = select(tree, f"{selection}")[1]
    seen: dict[str, torch.Tensor] = {}
    around = tree.modules[whole.format(1)].module
    around.register_forward_pre_hook(lambda m, args: seen.update(into=args[0]))
    around.register_forward_hook(lambda m, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
    assert place.entry is not None
    place.entry.register_forward_pre_hook(lambda m, args: seen.update(entry=args[0]))
    place.module.register_forward_hook(lambda m, args, out: seen.update(exit=out))
    ids = torch.tensor([[1, 2, 3, 4]])
    if architecture in ("vit", "timm_vit"):
        model(torch.randn(1, 3, 16, 16))
    elif architecture == "t5_gated":
        model(ids, decoder_input_ids=ids)
    else:
        model(ids)
    assert torch.equal(seen["into"], seen["entry"])
    torch.testing.assert_close(seen["out"], seen["exit"])


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "torch_encoder", "mixtral"])
def test_a_block_knows_what_is_inside_it(architecture: str) -> None:
    tree = anatomy(build(architecture))
    assert [block.block for block in tree.blocks] == [0, 1, 2]
    for block in tree.blocks:
        assert {place.block for place in block.members} == {block.block}
        assert {"attention", "mlp"} <= {place.role for place in block.members}
        for sublayer in block.members:
            if sublayer.role in ("attention", "mlp"):
                assert sublayer.members
                assert set(sublayer.members) <= set(block.members)


def test_a_multihead_attention_with_projections_of_its_own() -> None:
    tree = anatomy(torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    assert [(p.role, p.parameter) for p in tree.places if p.role] == [
        ("attention.query", "q_proj_weight"),
        ("attention.key", "k_proj_weight"),
        ("attention.value", "v_proj_weight"),
        ("attention.output", None),
        ("attention", None),
    ]


@pytest.mark.parametrize("part", ["bert.encoder.layer.1", "bert.encoder.layer.1.attention", "bert"])
def test_a_part_of_a_model_has_the_roles_that_it_has_in_the_whole(part: str) -> None:
    model = build("bert")
    whole = anatomy(model).modules
    for name, place in anatomy(model.get_submodule(part)).modules.items():
        assert place.role == whole[f"{part}.{name}" if name else part].role


def test_experts_in_a_list_and_a_block_alone() -> None:
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8), torch.nn.Linear(8, 12)

    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(8, 4)
            self.experts = torch.nn.ModuleList(Expert() for _ in range(4))

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)
            self.moe = Sparse()

    alone = anatomy(Block())
    assert {p.name for p in select(alone, "experts.gate")} == over(4, "moe.experts.#.w1")
    assert {p.name for p in select(alone, "experts.{up,down}")} == over(4, "moe.experts.#.w3", "moe.experts.#.w2")
    assert [p.name for p in select(alone, "router|mlp|experts")] == ["moe.gate", "moe.experts", "moe"]
    stack = anatomy(torch.nn.ModuleList([Block(), Block()]))
    assert [p.name for p in select(stack, "blocks[1].mlp|blocks[1].attention")] == ["1.attn", "1.moe"]
    layer = anatomy(torch.nn.TransformerEncoderLayer(8, 2, 12))
    assert [p.name for p in select(layer, "mlp.*")] == ["linear1", "linear2"]


def test_reading_a_model_does_not_keep_it_alive() -> None:
    model = build("llama")
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        str(anatomy(model))
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_quantised_matrix_is_found_by_its_sizes() -> None:
    class Packed(torch.nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.in_features, self.out_features = inputs, outputs
            self.register_buffer("packed", torch.zeros(3))

    model = build("llama")
    for block in model.model.layers:
        block.self_attn.q_proj = Packed(32, 32)
        block.mlp.down_proj = Packed(48, 32)
    tree = anatomy(model)
    assert len(select(tree, "attention.query|mlp.down")) == 6


def test_an_adapters_own_modules_are_no_part_of_the_model() -> None:
    model = build("perceptron")
    model[0].add_module("attuned", torch.nn.Linear(2, 2))
    assert list(anatomy(model).modules) == ["", "0", "1", "2", "3", "4"]
