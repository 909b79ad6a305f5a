"""Blocks of convolutions, whose outputs are maps with the channels in second place."""

from __future__ import annotations

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import attunement as at


@pytest.fixture
def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3)).double().eval()


def test_what_leaves_a_block_of_convolutions_is_changed_channel_by_channel(resnet):
    method = at.Bottleneck(size=2)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    blocks = [resnet.resnet.encoder.stages[i].layers[0] for i in range(2)]
    seen: list[torch.Tensor] = []
    blocks[1].register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    with torch.no_grad():
        resnet(x)
        adapter = at.adapt(resnet, {"blocks": method, "head": None})
        assert [part.site.outputs for part in adapter.parts] == [8, 12]
        for name, value in adapter.named_parameters():
            if "stages.1" in name:
                value.add_(0.3 * torch.randn_like(value))
        resnet(x)
        maps = seen[0].movedim(1, -1)
        values = adapter.parts[1].values("output")
        expected = method.output(maps, maps, **values).movedim(-1, 1)
    assert (seen[1] - seen[0]).abs().max() > 1e-3
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize(
    ("method", "on", "words"),
    [
        (at.Bottleneck(style="parallel"), "blocks", "ResNetBasicLayer, which convolves, has other positions"),
        (at.UniPT(), "backbone", "maps, not tokens"),
        (at.LST(), "backbone", "maps, not tokens"),
    ],
)
def test_what_needs_tokens_is_refused(resnet, method, on, words):
    with pytest.raises(at.AttunementError, match=words):
        at.adapt(resnet, method, on=on)


@pytest.mark.parametrize(("make", "shape"), [(torch.nn.Conv1d, (3, 5)), (torch.nn.Conv2d, (3, 5, 5))])
@pytest.mark.parametrize("method", [at.SSF(), at.LoRA(rank=2), at.IA3(side="output")], ids=repr)
def test_a_convolution_of_one_image_without_a_batch(make, shape, method):
    model = torch.nn.Sequential(make(3, 5, 3, padding=1)).double()  # as many channels as points in a row
    adapter = at.adapt(model, method, on="0")
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(model(x[0]), model(x)[0])
    wanted = model(x[0])
    adapter.merge()
    torch.testing.assert_close(model(x[0]), wanted)


@pytest.mark.parametrize("make", [torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d])
def test_a_transposed_convolution_is_refused(make):
    with pytest.raises(at.AttunementError, match=f"{make.__name__} is a layer type whose weight is not known"):
        at.adapt(torch.nn.Sequential(make(4, 4, 3)), at.LoRA(rank=2), on="0")
