"""A pooled encoder with a linear head: the classifier for models that were trained to be pooled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledForSequenceClassification(PreTrainedModel):
    """logits = scale * W f + b with f = pool(h) / |pool(h)|, where h are the last hidden states of the backbone.

    `pool` is the mean over the tokens that the attention mask keeps ("mean"), or the first of them ("cls").
    Sentence encoders such as MiniLM are trained with a mean-pooled, normalised feature; read at [CLS] instead, the
    same adapter on banking77 stays thirty points behind. A feature of length one makes logits too small for the
    softmax to become certain, hence `scale`: 20, the inverse temperature of 0.05 such encoders are trained with
    (https://arxiv.org/abs/1908.10084, https://arxiv.org/abs/2004.04906).

    With `num_labels=1` it is a regression: the loss is the mean squared error.
    Raises ValueError for a backbone that has no last hidden state.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config) if backbone is None else backbone
        self.head = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.head.to(self.backbone.dtype)
        if backbone is None:  # a pretrained backbone must not meet the initialisation that this brings
            self.post_init()

    @classmethod
    def from_backbone(cls, path: str, pooling: str = "mean", scale: float = 20.0, **kwargs: Any) -> Any:
        """The pretrained backbone at `path` (a folder or a hub id) under a new head.

        `num_labels`, `id2label` and `label2id` go to the configuration, everything else to `from_pretrained`.
        """
        labels = {key: kwargs.pop(key) for key in ("num_labels", "id2label", "label2id") if key in kwargs}
        config = AutoConfig.from_pretrained(path, revision=kwargs.get("revision"), **labels)
        config.update({"pooling": pooling, "scale": scale})
        return cls(config, AutoModel.from_pretrained(path, config=config, **kwargs))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """A model that `save_pretrained` wrote, as `attune merge` does."""
        if "config" not in kwargs:
            kwargs["config"] = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        given = {name: value for name, value in (inputs | wanted).items() if value is not None}
        outputs = self.backbone(**given)
        hidden = outputs.last_hidden_state  # (batch, tokens, width)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (batch, tokens)
        if self.config.pooling == "mean":
            kept = mask[..., None].to(hidden.dtype)  # (batch, tokens, 1)
            pooled = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)  # (batch, width)
        else:
            first = mask.long().argmax(1)  # (batch,): the first token that is not padding, left or right
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), first]  # (batch, width)
        logits = self.head(self.config.scale * F.normalize(pooled, dim=-1))  # (batch, labels)
        loss = None
        if labels is not None:
            loss = (
                F.mse_loss(logits.squeeze(-1).float(), labels.float())
                if self.config.num_labels == 1
                else F.cross_entropy(logits.float(), labels)
            )
        return SequenceClassifierOutput(loss, logits, outputs.get("hidden_states"), outputs.get("attentions"))
