"""What the modules of a model are: its repeated blocks and the role of every matrix, structure first, names second.

>>> print(anatomy(model))                     # a tree of blocks, roles, types, shapes and parameters
>>> anatomy(model).blocks[0].members          # the places inside the first block

Roles:

============================ ==========================================================================================
`embedding`                  token embeddings; others are `embedding.position`, `embedding.type`, `embedding.relative`
`block`                      one item of a stack of repeated blocks
`attention`                  one attention as a whole; `.query .key .value .qkv .kv .output` its matrices
`cross_attention`            the same over another sequence; the word `attention` selects both
`mlp`                        one feed-forward part as a whole; `.up .gate .gate_up .down` its matrices
`experts`, `router`          a bank of expert matrices (`.up .gate .gate_up .down`), and what chooses among them
`norm`, `conv`, `pooler`     by themselves
`head`                       the matrices after the backbone
============================ ==========================================================================================

What feeds what is read off, nothing is run: lists of like modules are stacks of blocks; the width of a block is what
its query takes in; a feed-forward part is a matrix that leaves the width and one that comes back to it. Names decide
among matrices of one shape, and where the rows of a fused matrix lie.
Limits: a model whose roles cannot be found (state-space mixers, for one) still has its names and module types.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from attunement.errors import AttunementError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.tree import Tree

CONTAINER = "attuned"
"""The child under which adapters live in the modules that they adapt: no part of the model's own anatomy."""


class RowView(NamedTuple):
    """Rows of a matrix that play one role: seen as (groups, rows/groups), they are start:start+size of every group.

    Contiguous thirds of a fused qkv: RowView(1, 0, d); GPT-NeoX, interleaved per head: RowView(heads, 0, head_dim);
    gate and up interleaved row by row: RowView(I, 0, 1).
    """

    groups: int
    start: int
    size: int


@dataclass(eq=False, slots=True)  # not frozen: that triples the price of making one, and a model has hundreds
class Place:
    """A place in a model; two places are equal only when they are the same object.

    name: dotted module path as in `named_modules`, "" for the model itself; for a sublayer the path of `module`.
    module: the module there. For a sublayer (role `attention`, `cross_attention`, `mlp`) the one whose output is the
        sublayer's output before the residual is added.
    role: what it does, "" if unknown.
    block: index within its stack of repeated blocks, None outside of one.
    stack: "" for a model with one stack, else "encoder", "decoder", "text", "vision", "audio" or the name of the part.
    parameter: None for the module's own `weight` or the module as a whole, else the name of the parameter meant.
    view: the rows of one role inside a fused matrix.
    transposed: the parameter is stored (..., in, out).
    entry: for a sublayer, the module whose first input is the sublayer's input; None where `module` takes it itself.
    members: for sublayers and blocks, the places inside.
    """

    name: str
    module: nn.Module
    role: str = ""
    block: int | None = None
    stack: str = ""
    parameter: str | None = None
    view: RowView | None = None
    transposed: bool = False
    entry: nn.Module | None = None
    members: tuple[Place, ...] = ()

    def __repr__(self) -> str:
        rows = f", rows={tuple(self.view)}" if self.view else ""
        path = f"{self.name}.{self.parameter}" if self.parameter else self.name
        return f"Place({path!r}, role={self.role!r}, block={self.block}{rows})"


class Anatomy:
    """The places of one model, in the order of `named_modules`.

    model: the model itself.
    places: one place for each module (role "" if unknown), followed where there are any by the places inside its
        parameters (row views of a fused matrix, projections of an `nn.MultiheadAttention`, expert matrices), by the
        block or the backbone it is and by the sublayers that end in it.
    modules: only those that stand for a module, by name.
    blocks: only the blocks.
    stacks: how many blocks each stack has, by name; {"": 12} for a model with one.
    task_heads: modules with parameters after the backbone, when the model ends in a classification, regression or
        question-answering head: empty for language models and for bare backbones. Norms inside a head are included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        root = _grow(model, {model})
        stacks = _find_stacks(root)
        self.stacks: dict[str, int] = {name: len(items) for name, (_, items) in stacks.items()}
        sublayers = _find_roles(root, stacks)
        heads = _find_heads(root, stacks)
        self.places: tuple[Place, ...]
        self.modules: dict[str, Place]
        self.places, self.modules = _collect(root, sublayers, _backbones(root, stacks))
        self.task_heads: tuple[Place, ...] = tuple(
            self.modules[node.name] for head in heads for node in head.walk() if _own_parameters(node.module)
        )
        for node in root.order:  # without cycles the model is freed as soon as it is let go
            node.parent = None
        root.order.clear()

    @cached_property
    def blocks(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place.role == "block")

    def tree(self, chosen: Mapping[str, str] | None = None, width: int = 80) -> Tree:
        """The model as a `rich` tree, `width` columns wide, consecutive blocks that are alike folded into one.

        chosen: module path -> short text to show beside it; blocks with different texts are not folded.
        """
        from attunement.tree import draw  # rich is imported only to print

        return draw(self, chosen or {}, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.tree(width=options.max_width)

    def __str__(self) -> str:
        from rich.console import Console

        width = max(80, shutil.get_terminal_size().columns)
        console = Console(width=width, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self.tree(width=width))
        return capture.get().rstrip("\n")

    def __repr__(self) -> str:
        stacks = ", ".join(f"{count} {name} blocks".replace("  ", " ") for name, count in self.stacks.items())
        return f"<Anatomy of {type(self.model).__name__}: {len(self.modules)} modules{stacks and ', ' + stacks}>"


def anatomy(model: nn.Module) -> Anatomy:
    """The blocks, roles and places of any model. Nothing is run and nothing is changed."""
    if not isinstance(model, nn.Module):
        hint = f"; load it first, as in AutoModel.from_pretrained({model!r})" if isinstance(model, str) else ""
        raise AttunementError(f"anatomy: expected a model, got {type(model).__name__} {str(model)[:60]!r}{hint}")
    return Anatomy(model)


# Reading the modules


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `model.named_modules()` gives, without its nested generators: several times faster on a deep model."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            if children := module._modules:
                prefix = f"{path}." if path else ""
                waiting += [(prefix + key, child) for key, child in reversed(children.items()) if child is not None]


class _Node:
    """A module on its way to become a place."""

    __slots__ = (
        *("module", "name", "parent", "leaf", "children", "kind", "inputs", "outputs"),
        *("role", "matrices", "block", "stack", "parts", "order", "first", "last"),
    )

    def __init__(self, module: nn.Module, name: str, parent: _Node | None, leaf: str, order: list[_Node]) -> None:
        self.module, self.name, self.parent, self.leaf = module, name, parent, leaf
        self.children: list[_Node] = []
        self.kind, self.inputs, self.outputs = sizes(module)
        self.role = self.kind if self.kind in ("norm", "conv") else ""
        self.matrices = _MATRICES.get(self.kind, 0)  # in the whole subtree
        self.block: int | None = None
        self.stack = ""
        self.parts: list[dict[str, Any]] = []  # of places inside its parameters
        self.order, self.first, self.last = order, len(order), 0  # all nodes, and where its subtree stands among them

    def walk(self) -> list[_Node]:
        """The module and all inside it, in the order of `named_modules`."""
        return self.order[self.first : self.last]


_MATRICES = {"linear": 1, "conv": 1, "mha": 2, "experts": 2}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
_EXPERT = re.compile(r"^(gate_up|gate|up|down)(_proj)?$")


def _grow(
    module: nn.Module, seen: set[nn.Module], name: str = "", parent: _Node | None = None, leaf: str = ""
) -> _Node:
    node = _Node(module, name, parent, leaf, [] if parent is None else parent.order)
    node.order.append(node)
    for key, child in module._modules.items():
        if child is not None and child not in seen and key != CONTAINER:
            seen.add(child)
            grown = _grow(child, seen, f"{name}.{key}" if name else key, node, key)
            node.children.append(grown)
            node.matrices += grown.matrices
    if node.kind == "mha":
        node.matrices = _MATRICES["mha"]
    node.last = len(node.order)
    return node


def sizes(module: nn.Module) -> tuple[str, int, int]:
    """(kind, inputs, outputs) by class where the class is torch's own, else by the parameters that it holds."""
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    parameters = module._parameters
    weight = parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv", module.in_channels, module.out_channels
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return "mha", module.embed_dim, module.embed_dim
    if isinstance(module, _NORMS):
        return ("norm" if weight is not None else ""), 0, 0
    if weight is None:
        if not parameters and not module._buffers:
            return "", 0, 0
        for key, value in parameters.items():
            if value is not None and value.dim() == 3 and _EXPERT.match(key):
                return "experts", value.shape[0], 0
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        known = isinstance(inputs, int) and isinstance(outputs, int)  # a quantised weight under other names
        return ("linear", inputs, outputs) if known else ("", 0, 0)  # type: ignore[return-value]
    if weight.dim() == 1 and weight.numel() > 1 and not isinstance(module, nn.PReLU):
        return "norm", 0, 0
    if weight.dim() == 2:
        rows, columns = weight.shape
        return ("linear", rows, columns) if type(module).__name__ == "Conv1D" else ("linear", columns, rows)
    return "", 0, 0


def _own_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


# Stacks of repeated blocks


def _is_stack(node: _Node) -> bool:
    """A list of modules of two or more matrices each: of any class in a ModuleList, of one class in a Sequential."""
    return (
        _is_list(node)
        and bool(node.children)
        and node.leaf != "experts"  # one of them runs, not one after the other
        and all(child.matrices >= 2 and child.children for child in node.children)
        and (isinstance(node.module, nn.ModuleList) or _alike(node.children))
    )


def _alike(nodes: list[_Node]) -> bool:
    return len({type(node.module).__name__ for node in nodes}) == 1


def _unfold(items: list[_Node]) -> list[_Node]:
    """Stages that hold little besides a list of blocks are opened: blocks count through all of them."""
    inner = [[child for child in item.children if _is_stack(child) and _alike(child.children)] for item in items]
    staged = all(
        len(lists) == 1 and item.matrices - lists[0].matrices <= 2 for item, lists in zip(items, inner, strict=True)
    )
    return [block for lists in inner for block in _unfold(lists[0].children)] if staged else items


def _search(node: _Node, found: dict[tuple[str, ...], list[_Node]]) -> None:
    """The outermost lists of blocks, by path; layer1, layer2 and layer3 of one parent are one stack."""
    if _is_stack(node):
        found.setdefault(tuple(node.name.rstrip("0123456789").split(".")), []).extend(_unfold(node.children))
    else:
        for child in node.children:
            if child.matrices > 1:
                _search(child, found)


def _find_stacks(root: _Node) -> dict[str, tuple[str, list[_Node]]]:
    """{stack: (path of the part of the model that it is in, its blocks)}; every block's nodes know their index."""
    found: dict[tuple[str, ...], list[_Node]] = {}
    _search(root, found)
    named = _name_stacks(list(found)) if len(found) > 1 else dict.fromkeys(found, ("", ""))
    stacks = {}
    for path, items in found.items():
        stack, prefix = named[path]
        stacks[stack] = (prefix, items)
        for index, item in enumerate(items):
            for node in item.walk():
                node.block, node.stack = index, stack
    if len(stacks) > 1:
        prefixes = sorted(((prefix, stack) for stack, (prefix, _) in stacks.items()), key=lambda pair: len(pair[0]))
        for node in root.walk():
            for prefix, stack in prefixes:
                if node.name == prefix or node.name.startswith(prefix + "."):
                    node.stack = stack
    return stacks


_PARTS = {
    "text": ("text", "language"),
    "vision": ("vision", "visual", "image", "pixel"),
    "audio": ("audio", "speech"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}


def _name_stacks(paths: list[tuple[str, ...]], depth: int = 0) -> dict[tuple[str, ...], tuple[str, str]]:
    """{path: (name, prefix)}: each stack is called by the first step of its path that tells it from the others."""
    while len({path[depth] for path in paths}) == 1:
        depth += 1
    groups: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        groups.setdefault(path[depth], []).append(path)
    words = [
        next((word for word, hints in _PARTS.items() if any(h in step.lower() for h in hints)), step) for step in groups
    ]
    named = {}
    for (step, group), word in zip(groups.items(), words, strict=True):
        word = word if words.count(word) == 1 else step
        if len(group) == 1:
            named[group[0]] = (word, ".".join(group[0][: depth + 1]))
        else:
            inner = _name_stacks(group, depth + 1)
            named |= {path: (f"{word}_{name}", prefix) for path, (name, prefix) in inner.items()}
    return named


def _backbones(root: _Node, stacks: Mapping[str, tuple[str, list[_Node]]]) -> dict[_Node, str]:
    """{the module that turns ids, embeddings or pixels into what a stack's last block gives: the stack}.

    It is the innermost one around all blocks that takes `inputs_embeds`, else the innermost that embeds.
    """
    found: dict[_Node, str] = {}
    for stack, (_, blocks) in stacks.items():
        around = [node for node in root.order if node.first < blocks[0].first and blocks[-1].last <= node.last]
        takes = [node for node in around if _takes_embeddings(type(node.module))]  # type: ignore[arg-type]
        embeds = [n for n in around if any(i.block is None and i.role in ("embedding", "conv") for i in n.walk())]
        chosen = (takes or embeds or [n for n in around if not _is_list(n)] or [root])[-1]
        found.setdefault(chosen, stack)
    return found


@cache
def _takes_embeddings(cls: type) -> bool:
    return {"input_ids", "inputs_embeds"} <= inspect.signature(cls.forward).parameters.keys()  # type: ignore[attr-defined]


# Roles


class _Sublayer(NamedTuple):
    role: str
    exit: _Node
    entry: _Node | None
    members: list[_Node]


_FILLER = {"proj", "projection", "lin", "linear", "layer", "dense", "to", "attn", "weight", "fc"}
_ATTENTION = {
    "q": "query", "query": "query", "queries": "query", "wq": "query", "q_b": "query",
    "k": "key", "key": "key", "keys": "key", "wk": "key",
    "v": "value", "value": "value", "values": "value", "wv": "value",
    "qkv": "qkv", "wqkv": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "kv": "kv", "key_value": "kv", "wkv": "kv", "kv_b": "kv",
    "q_a": "query_down", "kv_a_with_mqa": "kv_down",
}  # fmt: skip
_OUTPUT = {"o", "out", "output", "wo", "o_proj", "out_proj", "proj", "dense", "c_proj", "projection"}
_GATE = re.compile(r"gate|^w1$|^wi_0$|_g$")
_DOWN = re.compile(r"down|^w2$|^wo$|^fc2$|out|^c_proj$|lin2|linear2|_2$|4h_to_h")
_CROSS = re.compile(r"cross|enc_?dec|encoder_?att|multihead_attn|attn2", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|ff$|feed_?forward|dense", re.IGNORECASE)
_POSITION = re.compile(r"pos|wpe", re.IGNORECASE)
_TYPE = re.compile(r"type|segment", re.IGNORECASE)


def _core(leaf: str) -> str:
    """`q_proj`, `to_q`, `q_lin` -> `q`."""
    if leaf == "c_attn":
        return leaf
    return "_".join(word for word in leaf.lower().split("_") if word not in _FILLER)


def _owner(node: _Node) -> tuple[_Node, str]:
    """The module that a matrix belongs to and its name there, through lists such as diffusers' `to_out.0`."""
    parent, leaf = node.parent, node.leaf
    while parent is not None and leaf.isdigit() and parent.parent is not None:
        parent, leaf = parent.parent, parent.leaf
    return parent or node, leaf


def _find_roles(root: _Node, stacks: Mapping[str, tuple[str, list[_Node]]]) -> dict[_Node, list[_Sublayer]]:
    """Sets the role of every node; returns the sublayers of each block, and those outside of blocks under the root."""
    blocks = [item for _, items in stacks.values() for item in items]
    sublayers = {block: _block_roles(block, block.walk(), whole=True) for block in blocks}
    for block in blocks:
        for node in block.walk():
            if node.kind == "embedding":
                node.role = "embedding.relative"
    outside = [node for node in root.walk() if node.block is None]
    sublayers[root] = _block_roles(root, outside, whole=not blocks)
    for node in outside:
        if node.kind == "embedding" and not node.role:
            kind = ".position" if _POSITION.search(node.leaf) else ".type" if _TYPE.search(node.leaf) else ""
            node.role = f"embedding{kind}"
        elif node.leaf == "pooler":
            for inner in node.walk():
                inner.role = inner.role or ("pooler" if inner.kind == "linear" else "")
    return sublayers


def _block_roles(block: _Node, nodes: list[_Node], whole: bool) -> list[_Sublayer]:
    """The roles inside one block; outside of blocks (`whole` false) a feed-forward part must be called so."""
    linear = [node for node in nodes if node.kind == "linear"]
    owners: dict[_Node, list[_Node]] = {}
    for node in linear:
        owners.setdefault(_owner(node)[0], []).append(node)
    sublayers = [_multihead(block, node) for node in nodes if node.kind == "mha"]
    sparse = _experts(nodes, owners)
    sublayers += sparse
    for owner in list(owners):
        found = _attention(block, owner, owners[owner], linear)
        if found:
            sublayers.append(found)
    whole = whole and bool(sublayers or block.block is not None)
    inside = tuple(f"{sublayer.exit.name}." for sublayer in sparse)  # a shared expert is no sublayer of its own
    sublayers += [found for found in _feed_forward(block, owners, whole) if not found.exit.name.startswith(inside)]
    return sublayers


def _attention_role(block: _Node, node: _Node) -> str:
    """Which attention it is, by its path inside the block."""
    return "cross_attention" if _CROSS.search(node.name[len(block.name) :]) else "attention"


def _multihead(block: _Node, node: _Node) -> _Sublayer:
    role, module = _attention_role(block, node), node.module
    assert isinstance(module, nn.MultiheadAttention)
    width = module.embed_dim
    if module.in_proj_weight is not None:
        node.parts.append({"role": f"{role}.qkv", "parameter": "in_proj_weight"})
        for index, word in enumerate(("query", "key", "value")):
            view = RowView(1, index * width, width)
            node.parts.append({"role": f"{role}.{word}", "parameter": "in_proj_weight", "view": view})
    else:
        for word in ("query", "key", "value"):
            node.parts.append({"role": f"{role}.{word}", "parameter": f"{word[0]}_proj_weight"})
    for child in node.children:
        if child.leaf == "out_proj":
            child.role = f"{role}.output"
    return _Sublayer(role, node, None, [node, *node.children])


def _attention(block: _Node, owner: _Node, own: list[_Node], linear: list[_Node]) -> _Sublayer | None:
    words = {node: _ATTENTION.get(_core(_owner(node)[1]), "") for node in own}
    found = set(words.values())
    called = re.search("att(n|ention)", f"{owner.leaf} {type(owner.module).__name__}", re.IGNORECASE)
    if not ("query" in found and found & {"key", "value", "kv", "qkv"}) and "qkv" not in found:
        unknown = [node for node in own if node.outputs == 3 * node.inputs]
        if not (called and len(unknown) == 1):
            return None
        words[unknown[0]] = "qkv"
    elif "query" in found and "qkv" in found:  # GPT-2's cross-attention: q_attn and c_attn
        words = {node: "kv" if word == "qkv" else word for node, word in words.items()}
    projections = [node for node in own if words[node] and not node.role]
    first = next((node for node in projections if words[node] in ("query_down", "query", "qkv")), None)
    if first is None:
        return None
    role = _attention_role(block, owner)
    for node in projections:
        node.role = f"{role}.{words[node]}"
    scope, output = owner, _attention_output(owner, first.inputs, linear)
    while output is None and scope is not block and scope.parent is not None:
        scope = scope.parent  # BERT: attention.output stands beside attention.self
        output = _attention_output(scope, first.inputs, linear, direct=scope.block is not None and scope is block)
    members = [*projections]
    if output is not None:
        output.role = f"{role}.output"
        members.append(output)
    for node in projections:
        _fused(node, owner, role, words[node], output)
    return _Sublayer(role, output or owner, first if output is not None else None, members)


def _attention_output(scope: _Node, width: int, linear: list[_Node], direct: bool = False) -> _Node | None:
    """The free matrix in a module that is called an output and comes back to the width; `direct`: one of its own."""
    inside = f"{scope.name}." if scope.name else ""
    free = [node for node in linear if not node.role and node.outputs == width and node.name.startswith(inside)]
    called = [node for node in free if (leaf := _owner(node)[1].lower()) in _OUTPUT or _core(leaf) in _OUTPUT]
    near = [node for node in called if _owner(node)[0] is scope]
    return next(iter(near or ([] if direct else called)), None)


def _number(module: nn.Module, *names: str) -> int | None:
    """A size that an attention keeps as an attribute, of itself or of its config."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


def _fused(node: _Node, owner: _Node, role: str, word: str, output: _Node | None) -> None:
    """The rows of query, key and value in a fused matrix, where the layout is known; else none."""
    if word == "kv" and _core(_owner(node)[1]) != "kv_b" and node.outputs % 2 == 0:
        sizes = [("key", node.outputs // 2), ("value", node.outputs // 2)]
    elif word == "qkv" and output is not None and (node.outputs - output.inputs) % 2 == 0:
        shared = (node.outputs - output.inputs) // 2
        sizes = [("query", output.inputs), ("key", shared), ("value", shared)]
    else:
        return
    leaf = _core(_owner(node)[1])
    groups = 1
    if leaf == "query_key_value" or getattr(owner.module, "multi_query", None) is False:  # (groups, q + k + v, head)
        size = _number(owner.module, "head_dim", "head_size", "attention_head_size")
        if size is None or sizes[-1][1] % size:
            return
        groups = sizes[-1][1] // size
    elif leaf not in _ATTENTION or (
        node.leaf == "qkv_proj"
        and sizes[0] == ("query", sizes[-1][1])
        and not hasattr(owner.module, "num_key_value_groups")
    ):  # `qkv_proj` is cut per head in some models and in thirds in others
        return
    start = 0
    for part, rows in sizes:
        node.parts.append({"role": f"{role}.{part}", "view": RowView(groups, start, rows // groups)})
        start += rows // groups


def _experts(nodes: list[_Node], owners: dict[_Node, list[_Node]]) -> list[_Sublayer]:
    sublayers = []
    for bank in nodes:
        listed = bank.leaf == "experts" and isinstance(bank.module, nn.ModuleList) and bank.children
        if bank.kind != "experts" and not listed:
            continue
        bank.role = "experts"
        count = len(bank.children) if listed else bank.inputs
        members = [bank]
        if listed:
            for expert in bank.children:
                inner = [node for node in expert.walk() if node.kind == "linear"]
                for node, word in _feed_forward_words(inner).items():
                    node.role = f"experts.{word}"
                    owners[_owner(node)[0]] = []
                members += inner
        else:
            _bank(bank)
        sparse = bank.parent or bank
        for node in sparse.walk():
            if node.kind == "linear" and not node.role and node.outputs == count:
                node.role = "router"
                members.append(node)
        sublayers.append(_Sublayer("mlp", sparse, None, members))
    return sublayers


def _bank(node: _Node) -> None:
    """The matrices of a bank of experts: gate and up one after the other or row by row, straight or transposed."""
    module = node.module
    banks = {key: value for key, value in module._parameters.items() if value is not None and value.dim() == 3}
    down = next((value for key, value in banks.items() if key.startswith("down")), None)
    transposed = getattr(module, "is_transposed", None)
    for key, value in banks.items():
        if not (match := _EXPERT.match(key)):
            continue
        word, (_, rows, columns) = match[1], value.shape
        if transposed is None and down is not None and word != "down":
            fold = 2 if word == "gate_up" else 1
            transposed = (rows, columns) != (fold * down.shape[2], down.shape[1])
        part = {"role": f"experts.{word}", "parameter": key, "transposed": bool(transposed)}
        node.parts.append(part)
        if word == "gate_up":
            half = (columns if transposed else rows) // 2
            side_by_side = getattr(module, "is_concatenated", True)
            groups, size = (1, half) if side_by_side else (half, 1)
            node.parts.append(part | {"role": "experts.gate", "view": RowView(groups, 0, size)})
            node.parts.append(part | {"role": "experts.up", "view": RowView(groups, size, size)})


def _feed_forward_words(own: list[_Node]) -> dict[_Node, str]:
    """{matrix: up, gate, gate_up or down} when these are all the matrices of one feed-forward part, else {}."""
    if len(own) not in (2, 3):
        return {}
    named = [node for node in own if _DOWN.search(_owner(node)[1].lower())]
    down = named[0] if len(named) == 1 else own[-1]
    rest = [node for node in own if node is not down]
    if down.outputs != rest[0].inputs or any(node.inputs != rest[0].inputs for node in rest):
        return {}
    if len(rest) == 1:
        fold = rest[0].outputs / down.inputs
        return {rest[0]: "up" if fold == 1 else "gate_up", down: "down"} if fold in (1, 2) else {}
    if any(node.outputs != down.inputs for node in rest):
        return {}
    gate = next((node for node in rest if _GATE.search(_owner(node)[1].lower())), rest[0])
    return {node: "gate" if node is gate else "up" for node in rest} | {down: "down"}


def _feed_forward(block: _Node, owners: Mapping[_Node, list[_Node]], whole: bool) -> list[_Sublayer]:
    sublayers: list[_Sublayer] = []
    left: dict[_Node | None, list[_Node]] = {}
    for owner, own in owners.items():
        free = [node for node in own if not node.role]
        attends = owner is not block and any("attention" in node.role for node in own)
        if attends or not (whole or _FEED_FORWARD.search(owner.leaf)):
            continue
        if words := _feed_forward_words(free):
            sublayers.append(_feed_forward_roles(words))
        elif whole:
            left.setdefault(owner.parent, []).extend(free)
    for free in left.values():  # BERT: intermediate.dense and output.dense, each in a module of its own
        if words := _feed_forward_words(free):
            sublayers.append(_feed_forward_roles(words))
    return sublayers


def _feed_forward_roles(words: Mapping[_Node, str]) -> _Sublayer:
    for node, word in words.items():
        node.role = f"mlp.{word}"
        if word == "gate_up" and ("gate_up" in node.leaf or node.leaf == "Wi"):
            half = node.outputs // 2
            node.parts.append({"role": "mlp.gate", "view": RowView(1, 0, half)})
            node.parts.append({"role": "mlp.up", "view": RowView(1, half, half)})
    nodes = list(words)
    return _Sublayer("mlp", nodes[-1], nodes[0], nodes)


# Heads

_HEAD = {"head", "classifier", "score", "lm_head", "classification_head", "qa_outputs", "logits"}
_LAST = _HEAD | {"fc", "linear", "output", "out"}


def _find_heads(root: _Node, stacks: Mapping[str, tuple[str, list[_Node]]]) -> list[_Node]:
    """Gives the matrices after the backbone their role; returns the parts of a head that is no language model's."""
    model: Any = root.module
    vocabulary: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if vocabulary is not None:
        for node in root.walk():
            if node.module is vocabulary:
                node.role = "head"
    if getattr(model, "base_model", None) is model and "For" not in type(model).__name__:
        return []  # a bare backbone of transformers: what follows its blocks belongs to it
    behind: set[_Node] = set()
    for _, items in stacks.values():
        for item in items:
            above: _Node | None = item
            while above is not None and above not in behind:
                behind.add(above)
                above = above.parent
    top = root
    while len(top.children) == 1 and not _is_list(top.children[0]):
        top = top.children[0]
    last = max((index for index, child in enumerate(top.children) if child in behind), default=None)
    if last is None:  # no blocks: only what is called a head is one
        ends = [child for child in top.children if child.kind == "linear" and child.leaf in _LAST][-1:]
    else:
        ends = [
            child for index, child in enumerate(top.children)
            if child.matrices and child not in behind and (index > last or child.leaf in _HEAD)
        ]  # fmt: skip
    matrices = [node for end in ends for node in end.walk() if node.kind == "linear"]
    for node in matrices:
        node.role = node.role or "head"
    vocabularies = {(node.inputs, node.outputs) for node in root.walk() if node.role == "embedding"}
    speaks = vocabulary is not None or any((node.outputs, node.inputs) in vocabularies for node in matrices)
    return [] if speaks else ends


def _is_list(node: _Node) -> bool:
    return isinstance(node.module, (nn.ModuleList, nn.Sequential))


# Places


def _collect(
    root: _Node, sublayers: Mapping[_Node, list[_Sublayer]], backbones: Mapping[_Node, str]
) -> tuple[tuple[Place, ...], dict[str, Place]]:
    places: list[Place] = []
    modules: dict[str, Place] = {}
    made: dict[_Node, list[Place]] = {}
    outer, start = root, 0  # the block that is being read, and where its own places begin
    for index, node in enumerate(root.order, start=1):
        place = modules[node.name] = Place(node.name, node.module, node.role, node.block, node.stack)
        made[node] = [
            place,
            *(Place(node.name, node.module, block=node.block, stack=node.stack, **p) for p in node.parts),
        ]
        places += made[node]
        if node in backbones:
            places.append(Place(node.name, node.module, "backbone", stack=backbones[node]))
        if node.block is not None and (node.parent is None or node.parent.block is None):
            outer, start = node, len(places)
        if outer is not root and index == outer.last:
            places += _places(sublayers[outer], made)
            inside = tuple(places[start:])
            block = Place(outer.name, outer.module, "block", outer.block, outer.stack, members=inside)
            places.insert(start, block)
            outer = root
    return (*places, *_places(sublayers[root], made)), modules


def _places(sublayers: list[_Sublayer], made: Mapping[_Node, list[Place]]) -> list[Place]:
    return [
        Place(
            end.name,
            end.module,
            role,
            end.block,
            end.stack,
            entry=None if entry is None else entry.module,
            members=tuple(place for member in members for place in made[member] if place.role),
        )
        for role, end, entry, members in sublayers
    ]
