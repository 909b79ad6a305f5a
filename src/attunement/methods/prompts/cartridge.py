"""Cartridge: the keys and values of a long text, trained into a few."""

from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.method import Tagged, Tensors, fixed, register
from attunement.methods.prompts.prefix import Prefix
from attunement.site import put


@register("prompts/cartridge", source="https://arxiv.org/abs/2506.06266")
class Cartridge(Prefix):
    """Cartridge: a prefix K, V (key heads, count, head width) in each layer whose first `frozen` tokens stay as they are.

    Args:
        count: tokens; 128, the smallest of the paper, which goes to 8,192.
        frozen: of them; 1, the attention's sink.
        std, offset_positions: as in `Prefix`; the text begins behind it, as behind the text that it stands for. Under
            `at.Weighted` it does so whatever the weight but zero.

    `fill` starts it from the cache of a text. The paper trains it on conversations about that text which the model had
    with itself, towards what it says with the whole text before it: data and a loss, which are the trainer's.
    """

    count: PositiveInt = 128
    offset_positions: bool = True
    frozen: NonNegativeInt = 1

    def tensors(self, site: Any) -> Tensors:
        made: dict[str, Tensor | Tagged] = {}
        for name in "KV":
            start = self.std * torch.randn(site.key_heads, self.count, site.width)
            made |= {name: start[:, self.frozen :].clone(), f"{name}0": fixed(start[:, : self.frozen].clone())}
        return made

    def refuse(self, site: Any) -> str | None:
        return None if self.frozen < self.count else f"frozen={self.frozen} of count={self.count} leaves none to train"

    def attend(
        self, call: Any, q: Tensor, k: Tensor, v: Tensor, project: object, K: Tensor, V: Tensor, **t: Tensor
    ) -> Tensor:
        K, V = torch.cat((t["K0"], K), dim=1), torch.cat((t["V0"], V), dim=1)  # (key heads, count, head width)
        return Prefix.attend(self, call, q, k, v, project, K, V)

    @staticmethod
    def fill(adapter: Adapter, cache: Any) -> None:
        """Take over the first tokens of a cache, such as `model(ids, use_cache=True).past_key_values` of the bare model.

        Raises:
            AttunementError: for an adapter without a cartridge, a cache of several texts, or one of too few tokens.
        """
        found = [(part, part.method) for part in adapter.parts if isinstance(part.method, Cartridge)]
        if not found:
            raise AttunementError(f"Cartridge.fill: adapter {adapter.name!r} has no cartridge")
        layers = [cache.layers[part.site.layer] for part, _ in found]  # type: ignore[attr-defined]
        for (part, method), layer in zip(found, layers, strict=True):
            texts, _, length, _ = layer.keys.shape
            if texts != 1 or length < method.count:
                raise AttunementError(
                    f"Cartridge.fill: {part.key} holds {method.count} tokens of one text, and the cache has {length} of {texts}"
                )
        for (part, method), layer in zip(found, layers, strict=True):
            for name, rows in (("K", layer.keys[0]), ("V", layer.values[0])):
                put(part.tensor(f"{name}0"), rows[:, : method.frozen])
                put(part.tensor(name), rows[:, method.frozen : method.count])
