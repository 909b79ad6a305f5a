"""A site: one place in a model where an expression acts, and the weight there as a matrix.

A `Layout` says how one kind of module holds a matrix and runs with one; methods know no layer type, layouts no method.
Shapes: W (..., out, in); x and y channels last unless a layout says otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.method import split

if TYPE_CHECKING:
    from attunement.anatomy import Place, RowView


class Layout:
    """A parameter that is its own matrix (out, in), in a module whose forward is not known: weights enter by attribute."""

    channels = -1
    """Where the output has its channels."""
    beside_only = False
    """The weight cannot be replaced (it is quantised): only additive changes, run beside the layer."""

    def axis(self, module: Any) -> int:
        """Where the output of this module has its channels, with a batch and without one."""
        return self.channels

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as (..., out, in): a view."""
        return parameter

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        """(..., out, in) in the parameter's own shape."""
        return W

    def dense(self, module: nn.Module, name: str) -> Tensor:
        """The values of the parameter, (..., out, in), detached."""
        return self.matrix(_parameter(module, name).detach())

    def size(self, module: nn.Module, name: str) -> torch.Size:
        return self.matrix(_parameter(module, name)).shape

    def known(self, module: nn.Module) -> bool:
        """Whether `call` reproduces the module's forward."""
        return False

    def call(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The module's function with another weight and bias; of layouts that know it."""
        raise TypeError(f"{type(self).__name__} does not know what {type(module).__name__} computes")

    def beside(self, module: Any, x: Tensor, chain: Sequence[Tensor]) -> Tensor:
        """What the weight that a chain of factors is would give, without forming it; of layouts that know it."""
        raise TypeError(f"{type(self).__name__} does not know what {type(module).__name__} computes")

    def absorb(self, W: Tensor, shift: Tensor) -> Tensor | None:
        """W with a shift of the output folded in, where the layout can; else the shift needs a bias."""
        return None


def apply_chain(x: Tensor, chain: Sequence[Tensor]) -> Tensor:
    """x (..., in) -> (..., out): the factors from the right, a matrix by a product, a vector or a 0-d tensor by scaling."""
    for link in reversed(chain):
        x = F.linear(x, link) if link.dim() == 2 else x * link.to(x.dtype)
    return x


class LinearLayout(Layout):
    def known(self, module: nn.Module) -> bool:
        own = base_of(type(module))
        return own.forward is nn.Linear.forward and own.__name__ != READ_ONLY  # type: ignore[attr-defined]

    def call(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def beside(self, module: Any, x: Tensor, chain: Sequence[Tensor]) -> Tensor:
        return apply_chain(x, chain)


class TransposedLayout(LinearLayout):
    """GPT-2's `Conv1D`: the weight is (in, out)."""

    def matrix(self, parameter: Tensor) -> Tensor:
        return parameter.mT

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        return W.mT

    def known(self, module: nn.Module) -> bool:
        return True

    def call(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.mT, bias)


class ConvLayout(Layout):
    """Conv1d-3d: the weight (out, in/groups, *kernel) as (out, in/groups * kernel)."""

    channels = 1

    def axis(self, module: Any) -> int:
        return -1 - len(module.kernel_size)

    def matrix(self, parameter: Tensor) -> Tensor:
        return parameter.flatten(1)

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        return W.reshape(parameter.shape)

    def known(self, module: nn.Module) -> bool:
        own: Any = base_of(type(module))
        return own.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def call(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return module._conv_forward(x, weight, bias)

    def beside(self, module: Any, x: Tensor, chain: Sequence[Tensor]) -> Tensor:
        B, A = split(chain)
        kernel = module._parameters["weight"].shape[1:]
        A = A.reshape(-1, *kernel)  # (r, in/groups, *kernel)
        if B is None:
            return module._conv_forward(x, A, None)
        points = (1,) * (len(kernel) - 1)
        h = module._conv_forward(x, A.repeat(module.groups, 1, *points), None)  # (batch, groups*r, *space)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(points)]
        return convolve(h, B.reshape(*B.shape, *points), groups=module.groups)  # each group of rows on its own channels


class EmbeddingLayout(Layout):
    """The weight (count, width) as (out, in) = (width, count): a token is a one-hot input."""

    def matrix(self, parameter: Tensor) -> Tensor:
        return parameter.mT

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        return W.mT

    def known(self, module: nn.Module) -> bool:
        return base_of(type(module)).forward is nn.Embedding.forward  # type: ignore[attr-defined]

    def call(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, module.padding_idx)

    def beside(self, module: Any, x: Tensor, chain: Sequence[Tensor]) -> Tensor:
        B, A = split(chain)
        looked_up = F.embedding(x, A.mT, module.padding_idx)
        return looked_up if B is None else F.linear(looked_up, B)

    def absorb(self, W: Tensor, shift: Tensor) -> Tensor:
        return W + shift[:, None]


class NormLayout(Layout):
    """A norm's weight (n,) as (n, 1)."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def matrix(self, parameter: Tensor) -> Tensor:
        return parameter[:, None]

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        return W.reshape(parameter.shape)


class QuantisedLayout(Layout):
    """bitsandbytes' 8-bit and 4-bit Linear: the weight stays packed, additive changes run beside."""

    beside_only = True

    def dense(self, module: Any, name: str) -> Tensor:
        from attunement.quantised import dense

        return dense(module)

    def size(self, module: Any, name: str) -> torch.Size:
        return torch.Size((module.out_features, module.in_features))

    def known(self, module: nn.Module) -> bool:
        return True

    def beside(self, module: Any, x: Tensor, chain: Sequence[Tensor]) -> Tensor:
        return apply_chain(x, chain)


class PlainLayout(Layout):
    """A parameter of any shape, taken as it is."""

    def size(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size(())


PLAIN = PlainLayout()
OPAQUE, LINEAR, TRANSPOSED, CONV, EMBEDDING = (
    Layout(),
    LinearLayout(),
    TransposedLayout(),
    ConvLayout(),
    EmbeddingLayout(),
)
NORM_LAST, NORM_FIRST, QUANTISED = NormLayout(-1), NormLayout(1), QuantisedLayout()


class _ExpertsTransposed(Layout):
    """Experts stored (E, in, out)."""

    def matrix(self, parameter: Tensor) -> Tensor:
        return parameter.mT

    def native(self, W: Tensor, parameter: Tensor) -> Tensor:
        return W.mT


EXPERTS_TRANSPOSED = _ExpertsTransposed()
READ_ONLY = "NonDynamicallyQuantizableLinear"  # MultiheadAttention reads the weight of its out_proj and never calls it
_READS = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim)|,\s*torch\.Tensor\)|\s+is\b)")
_CHANNELS_SECOND = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters.get(name)
    if parameter is None:
        raise AttunementError(f"{type(module).__name__} has no parameter {name!r}")
    return parameter


def base_of(cls: type) -> type:
    """The class that a module had before it was adapted."""
    return getattr(cls, "_attuned_base", cls)


@functools.cache
def children_read(cls: type) -> frozenset[str]:
    """The children whose weights the code of a module class reads itself; a fused path does, or a product spelt out."""
    found: set[str] = set()
    for name, function in vars(cls).items():
        if inspect.isfunction(function) and not any(word in name for word in ("init", "reset", "tie")):
            with contextlib.suppress(OSError, TypeError):
                found.update(_READS.findall(inspect.getsource(function)))
    return frozenset(found)


def layout_of(module: nn.Module, parameter: str, transposed: bool = False) -> Layout | str:
    """The layout of a parameter that is a matrix, or why it is none (the end of a sentence)."""
    cls = type(module)
    if isinstance(module, nn.RNNBase):
        return f"{cls.__name__} hides its weights in flat copies that its forward reads"
    value = module._parameters.get(parameter)
    if value is None:
        if hasattr(module, "parametrizations"):
            return f"the {parameter} of this {cls.__name__} is computed by torch.nn.utils.parametrize"
        return f"{cls.__name__} has no {parameter!r} of its own"
    if base_of(cls).__module__.startswith("bitsandbytes."):
        return QUANTISED
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{cls.__name__} is a layer type whose weight is not known as a matrix"
    if (parameter != "weight" or value.dim() == 3) and not isinstance(module, nn.Conv1d):
        if value.dim() not in (2, 3):
            return f"{parameter!r} of {cls.__name__} has {value.dim()} dimensions, which is no matrix"
        return EXPERTS_TRANSPOSED if transposed else OPAQUE
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONV
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an Embedding with max_norm rewrites its own weight in every forward"
        return EMBEDDING
    if value.dim() == 2:
        return TRANSPOSED if base_of(cls).__name__ == "Conv1D" and hasattr(module, "nf") else OPAQUE
    if value.dim() == 1:
        first = isinstance(module, _CHANNELS_SECOND) or getattr(module, "data_format", "") == "channels_first"
        return NORM_FIRST if first else NORM_LAST
    return f"{cls.__name__} is a layer type whose weight is not known as a matrix"


class Site:
    """One place where an expression acts. What a method's `tensors` reads:

    Attributes:
        name: dotted path of the module.
        parameter: name of the parameter, or None where the module's output is the site.
        role, block, stack: where it stands, as `anatomy` found it.
        module: the module itself.
        outputs, inputs: the two sizes of the matrix; at an output, the channels of y and of x.
        batch: leading sizes of stacked matrices (experts), usually ().
        head_width: of the attention that it belongs to, or that stands in its block; 0 where that is not known.
        between: what happens there to queries and keys before they meet, as the end of a sentence, or None.
        partners: the other matrices of its sublayer that have been asked for, by the last word of their role.
        among: the sites of its method in this adapter, itself among them, in their order.

    `head_width`, `between` and `partners` are for methods that name `partners`.
    """

    def __init__(self, place: Place, parameter: str | None, layout: Layout, view: RowView | None = None) -> None:
        self.place, self.parameter, self.layout, self.view = place, parameter, layout, view
        self.name, self.module, self.role = place.name, place.module, place.role
        self.block, self.stack = place.block, place.stack
        self.transparent = layout.known(place.module)
        # whether calling the module applies this parameter: an attention's projections are read, not called
        self.called = parameter in (None, "weight") and base_of(type(place.module)).__name__ != READ_ONLY
        # the bias that goes with the matrix: "weight" -> "bias", "in_proj_weight" -> "in_proj_bias"
        self.bias = (
            (parameter or "").replace("weight", "bias") if "weight" in (parameter or "") else f"{parameter}_bias"
        )
        slot = parameter or "output"
        self.slot = slot if view is None else f"{slot}-{place.role.rpartition('.')[2]}"
        self.key = f"{place.name}.{self.slot}" if place.name else self.slot
        self.batch: tuple[int, ...] = ()
        self.head_width = 0
        self.between: str | None = None
        self.beside: dict[str, Site] = {}
        self.partners: dict[str, Site] = {}
        self.among: Sequence[Site] = ()
        self._index: int | None = None
        self.inputs = self.outputs = 0
        if parameter is not None and (size := layout.size(place.module, parameter)) and len(size) >= 2:
            self.batch, self.outputs, self.inputs = tuple(size[:-2]), size[-2], size[-1]
            if view is not None:
                self.outputs = view.groups * view.size

    def __repr__(self) -> str:
        return f"Site({self.key!r}, role={self.role!r}, {self.outputs} x {self.inputs})"

    @property
    def weight(self) -> Tensor:
        """The base's values as the method sees them, detached, float64 where the base is, else float32: (..., out, in)."""
        if self.parameter is None:
            raise AttunementError(
                f"{self.key} is a place for outputs, which has no weight of its own; its module is `site.module`"
            )
        dense = self.layout.dense(self.module, self.parameter)
        dense = dense if self.view is None else rows_of(dense, self.view)
        dense = dense if self._index is None else dense.flatten(0, -3)[self._index]
        return dense.to(working_dtype(dense))

    reference = weight
    """The values before quantisation where they are still known; here the weight itself."""

    def partner(self, word: str) -> Site | None:
        """The site of another matrix of the same sublayer (`query`, `output`), or None; one of the method's `partners`.

        What a method has asked for is what its result depends on: the fingerprint of a saved adapter covers it.
        """
        if word in self.beside:
            self.partners[word] = self.beside[word]
        return self.beside.get(word)

    def single(self, index: int) -> Site:
        """The site of one of its stacked matrices."""
        one = copy.copy(self)
        one.batch, one._index = (), index
        return one

    def take(self, parameter: Tensor) -> Tensor:
        """This site's matrix out of the whole parameter."""
        W = self.layout.matrix(parameter)
        return W if self.view is None else rows_of(W, self.view)

    def put(self, parameter: Tensor, W: Tensor) -> Tensor:
        """The whole parameter with this site's matrix in it; out of place."""
        if self.view is None:
            return self.layout.native(W, parameter)
        whole = self.layout.matrix(parameter).clone()
        grouped = whole.unflatten(-2, (self.view.groups, -1))
        grouped[..., self.view.start : self.view.start + self.view.size, :] = W.unflatten(-2, (self.view.groups, -1))
        return self.layout.native(whole, parameter)

    def take_bias(self, bias: Tensor) -> Tensor:
        """This site's part (..., out) of the bias that goes with the matrix."""
        return bias if self.view is None else rows_of(bias[..., None], self.view)[..., 0]

    def put_bias(self, bias: Tensor, part: Tensor) -> Tensor:
        """The whole bias with this site's part in it; out of place."""
        view = self.view
        if view is None:
            return part
        grouped = bias.clone().unflatten(-1, (view.groups, -1))
        grouped[..., view.start : view.start + view.size] = part.unflatten(-1, (view.groups, -1))
        return grouped.flatten(-2)


def rows_of(W: Tensor, view: RowView) -> Tensor:
    """The rows of one role, (..., groups * size, in)."""
    return W.unflatten(-2, (view.groups, -1))[..., view.start : view.start + view.size, :].flatten(-3, -2)


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Every (path, module, name) under which each parameter stands, by the parameter's identity."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module, name))
    return owners


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor, detached, gathered where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def put(here: Any, value: Tensor) -> None:
    """Write a full value into a tensor in place, sharded where that is."""
    if hasattr(here, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(here.device), here.device_mesh, here.placements)
    with torch.no_grad():
        here.copy_(value)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which adapters are kept: float64 over float64, float32 otherwise."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
