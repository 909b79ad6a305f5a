"""The ResNet for CIFAR-10 as a model of transformers: importing this file makes `AutoModelForImageClassification` know it.

Three stacks of basic blocks of 16, 32 and 64 channels on images of 32 x 32; where the size halves, the shortcut takes
every second pixel and fills the new channels with zeros, so that it has no parameters (option A).
Source: He et al., Deep residual learning for image recognition, section 4.2, https://arxiv.org/abs/1512.03385; weights
with these names: https://github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

WIDTHS = (16, 32, 64)


class CifarResNetConfig(PreTrainedConfig):
    """`blocks` in each of the three stacks: 3, 5, 7 or 9 for ResNet-20, -32, -44 or -56."""

    model_type = "cifar_resnet"

    def __init__(self, blocks: int = 9, **options: Any):
        self.blocks = blocks
        super().__init__(**options)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))"""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (batch, outputs, height / stride, width / stride)
        y = self.bn2(self.conv2(y))
        beside = (0, 0, 0, 0, self.missing, self.missing)  # half of the new channels before the old ones, half after
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], beside))


class CifarResNetForImageClassification(PreTrainedModel):
    """logits = linear(mean over the pixels of the last stack)"""

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stack(WIDTHS[0], WIDTHS[0], 1)
        self.layer2 = self._stack(WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = self._stack(WIDTHS[1], WIDTHS[2], 2)
        self.linear = nn.Linear(WIDTHS[2], config.num_labels)
        self.post_init()

    def _stack(self, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        later = [BasicBlock(outputs, outputs, 1) for _ in range(self.config.blocks - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *later)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        x = F.relu(self.bn1(self.conv1(pixel_values)))  # (batch, 16, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, 8, 8)
        logits = self.linear(x.mean((2, 3)))  # (batch, labels)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutputWithNoAttention(loss, logits)


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
