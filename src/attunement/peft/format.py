"""What a PEFT type is here, and what reading and writing one needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.method import Method

if TYPE_CHECKING:
    from attunement.part import Part

Config = Mapping[str, Any]
Named = Mapping[str, Tensor]


def always(config: Config) -> bool:
    """Whatever the configuration says."""
    return True


@dataclass(frozen=True, eq=False)
class Format:
    """One PEFT type.

    Attributes:
        kind: its `peft_type`.
        suffixes: how the names of its tensors end.
        fields: configuration fields that `read` takes into account.
        layers: classes of layers that PEFT adapts in this way.
        read: configuration, module name, module, {suffix: tensor} -> the method there and its tensors.
        write: a part and its tensors -> {suffix: tensor}.
        config: parts by module name -> fields of the configuration.
        shared: names of tensors that all modules share, in the file -> here.
        stored: whether a file of this configuration has them.
        repeated: endings of tensors that say again what others say.
        numbered: beginnings of names of shared tensors that a number ends, in the file -> the tensor here that stacks them.
        tied: the name of the shared tensor that a module's tensor is, or None: for files that write it at every module.
        category: module name -> the word under which the file has what its modules share, `base_model.<suffix>.<word>`.
    """

    kind: str
    suffixes: tuple[str, ...]
    fields: frozenset[str]
    layers: tuple[str, ...]
    read: Callable[[Config, str, nn.Module, Named], tuple[Method, Named]]
    write: Callable[[Part, Named], Named]
    config: Callable[[Mapping[str, Part]], Config]
    shared: Mapping[str, str] = field(default_factory=dict)
    stored: Callable[[Config], bool] = always
    repeated: tuple[str, ...] = ()
    numbered: Mapping[str, str] = field(default_factory=dict)
    tied: Callable[[Part, str], str | None] | None = None
    category: Callable[[str], str] | None = None


def plain(
    kind: str,
    made: type[Any],
    names: Mapping[str, str],
    fields: Mapping[str, str] | None = None,
    layers: tuple[str, ...] = ("Linear",),
    passed_over: Iterable[str] = (),
    sizes: Callable[[Config, Named], Mapping[str, Any]] = lambda config, tensors: {},
    also: Callable[[Mapping[str, Part]], Config] = lambda parts: {},
    **shared: Any,
) -> Format:
    """The format of a method whose tensors and hyper-parameters PEFT has under other names.

    Args:
        names: ending in the file -> tensor here.
        fields: field of the configuration -> hyper-parameter here, one for the whole adapter.
        passed_over: fields that change nothing, or nothing beside what the tensors say.
        sizes: hyper-parameters that the configuration and a module's tensors say together.
        also: further fields of the configuration.
    """
    fields = fields or {}

    def read(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
        known = {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}
        values = {ours: tensors[theirs] for theirs, ours in names.items() if theirs in tensors}
        return made(**known, **sizes({**config, "module": module}, values)), values

    def write(part: Part, values: Named) -> Named:
        return {theirs: values[ours] for theirs, ours in names.items() if ours in values}

    def config(parts: Mapping[str, Part]) -> Config:
        methods = [part.method for part in parts.values()]
        said = {theirs: one(ours, (getattr(method, ours) for method in methods)) for theirs, ours in fields.items()}
        return {**said, **also(parts)}

    return Format(kind, tuple(names), frozenset((*fields, *passed_over)), layers, read, write, config, **shared)


def patterned(word: str, values: Mapping[str, Any], pattern: str | None = None, expressions: bool = True) -> Config:
    """A field that most modules share, and the pattern of those that differ: regular expressions, or plain names."""
    usual = most(values.values())
    others = {name: value for name, value in values.items() if value != usual}
    if expressions:
        others = {f"^{re.escape(name)}": value for name, value in others.items()}
    return {word: usual, pattern or f"{word}_pattern": others}


def said(config: Config, word: str, pattern: str, default: Any) -> Any:
    """The value of a field at a module, whose name stands in the configuration beside it."""
    patterns = config.get(pattern) or {}
    found = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", config["module"])), None)
    return patterns.get(found, config.get(word, default))


def number(value: float) -> float:
    """A number as configurations have it: without a point where it needs none."""
    return int(value) if value == int(value) else value


def own(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the base, whatever adapters make of it."""
    tensor: Any = {**module._buffers, **module._parameters}[name]
    return tensor.detach()


def transposed(parts: Mapping[str, Part]) -> bool:
    return any(type(part.site.module).__name__ == "Conv1D" for part in parts.values())


def most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def one(what: str, values: Iterable[Any]) -> Any:
    """The value that all parts share: PEFT keeps one for the whole adapter."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise AttunementError(
            f"peft: PEFT keeps one {what} for the whole adapter, this one has {found[0]} and {found[1]}"
        )
    return found[0]
