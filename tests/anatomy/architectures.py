"""Tiny models with random weights, one function an architecture: `build(name)` makes one on the spot."""

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

BUILDERS: dict[str, Callable[[], nn.Module]] = {}
TEXT = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}


def build(name: str) -> nn.Module:
    """A fresh model of that architecture, in eval mode."""
    return BUILDERS[name]().eval()


def architecture(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    BUILDERS[make.__name__] = make
    return make


# transformers: encoders


@architecture
def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT))


@architecture
def bert_backbone() -> nn.Module:
    return tf.BertModel(tf.BertConfig(**TEXT))


@architecture
def bert_masked() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT))


@architecture
def bert_questions() -> nn.Module:
    return tf.BertForQuestionAnswering(tf.BertConfig(**TEXT))


@architecture
def bert_tokens() -> nn.Module:
    return tf.BertForTokenClassification(tf.BertConfig(**TEXT))


@architecture
def roberta() -> nn.Module:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT))


@architecture
def roberta_masked() -> nn.Module:
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT))


@architecture
def distilbert() -> nn.Module:
    config = tf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_heads=4, n_layers=3)
    return tf.DistilBertForSequenceClassification(config)


@architecture
def deberta() -> nn.Module:
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**TEXT))


@architecture
def modernbert() -> nn.Module:
    return tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**TEXT, pad_token_id=0))


# transformers: decoders


@architecture
def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))


@architecture
def llama_classifier() -> nn.Module:
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER))


@architecture
def llama_regression() -> nn.Module:
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER, num_labels=1))


@architecture
def qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, tie_word_embeddings=True))


@architecture
def gemma() -> nn.Module:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER))


@architecture
def phi3() -> nn.Module:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER, pad_token_id=0))


@architecture
def opt() -> nn.Module:
    config = tf.OPTConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, ffn_dim=48, word_embed_proj_dim=32
    )
    return tf.OPTForCausalLM(config)


@architecture
def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4))


@architecture
def qwen3_moe() -> nn.Module:
    config = tf.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return tf.Qwen3MoeForCausalLM(config)


@architecture
def deepseek() -> nn.Module:
    config = tf.DeepseekV3Config(
        **(TEXT | {"num_key_value_heads": 4}),
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, n_group=2,
        topk_group=1, kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


@architecture
def gpt_oss() -> nn.Module:
    return tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


@architecture
def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64))


@architecture
def gpt2_classifier() -> nn.Module:
    return tf.GPT2ForSequenceClassification(tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4))


@architecture
def gpt_neox() -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT))


@architecture
def bloom() -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=3, n_head=4))


@architecture
def falcon() -> nn.Module:
    return tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    )


@architecture
def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3))


# transformers: encoder and decoder


@architecture
def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


@architecture
def t5_gated() -> nn.Module:
    config = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return tf.T5ForConditionalGeneration(config)


def bart_config() -> tf.BartConfig:
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return tf.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        **sizes,
    )


@architecture
def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(bart_config())


@architecture
def bart_classifier() -> nn.Module:
    return tf.BartForSequenceClassification(bart_config())


@architecture
def whisper() -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


# transformers: images, sound, two towers


@architecture
def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5))


@architecture
def convnext() -> nn.Module:
    return tf.ConvNextForImageClassification(tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2))


@architecture
def resnet_hf() -> nn.Module:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return tf.ResNetForImageClassification(config)


@architecture
def swin() -> nn.Module:
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return tf.SwinForImageClassification(config)


@architecture
def wav2vec2() -> nn.Module:
    config = tf.Wav2Vec2Config(
        **TEXT, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, classifier_proj_size=16, num_labels=4,
    )  # fmt: skip
    return tf.Wav2Vec2ForSequenceClassification(config)


@architecture
def wav2vec2_ctc() -> nn.Module:
    config = tf.Wav2Vec2Config(
        **TEXT, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return tf.Wav2Vec2ForCTC(config)


@architecture
def ast() -> nn.Module:
    sizes = {key: value for key, value in VISION.items() if key != "image_size"}
    return tf.ASTForAudioClassification(tf.ASTConfig(**sizes, max_length=32, num_mel_bins=16))


@architecture
def clip() -> nn.Module:
    text = TEXT | {"max_position_embeddings": 16, "num_hidden_layers": 2}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


@architecture
def llava() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**DECODER), image_token_index=5
    )
    return tf.LlavaForConditionalGeneration(config)


# written by hand


@architecture
def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


@architecture
def torch_transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 3, 48, batch_first=True)


class TimmAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class TimmMlp(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 48):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(32)
        self.attn = TimmAttention()
        self.norm2 = nn.LayerNorm(32)
        self.mlp = TimmMlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        self.norm = nn.Identity()


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = TimmPatches()
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*[TimmBlock() for _ in range(3)])
        self.norm = nn.LayerNorm(32)
        self.fc_norm = nn.Identity()
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


@architecture
def timm_vit() -> nn.Module:
    return TimmViT()


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, planes - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """He et al., https://arxiv.org/abs/1512.03385, section 4.2: 6n + 2 layers, shortcuts without parameters."""

    def __init__(self, n: int = 2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(n)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), *[BasicBlock(32, 32) for _ in range(n - 1)])
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), *[BasicBlock(64, 64) for _ in range(n - 1)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


@architecture
def cifar_resnet() -> nn.Module:
    return CifarResNet()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.lstm = nn.LSTM(16, 32, 2, batch_first=True)
        self.fc = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embedding(ids))[0][:, -1])


@architecture
def lstm() -> nn.Module:
    return Recurrent()


@architecture
def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


@architecture
def one_linear() -> nn.Module:
    return nn.Linear(8, 3)
