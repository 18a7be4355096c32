"""The experts of one MoE layer, brought to one arrangement at construction."""

from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.core.activations import SILU, Activation
from octomoe.core.formats import ALL, FP8_TENSOR, Format
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal

Weight = QTensor | Tensor

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How gate and up rows of a fused up-projection are arranged.

    Attributes:
        gate_first: whether gate comes before up.
        chunk: rows of one before rows of the other; 0 means two halves.
    """

    gate_first: bool = True
    chunk: int = 0


GATE_UP: Final = RowOrder()
UP_GATE: Final = RowOrder(gate_first=False)


def interleaved(chunk: int) -> RowOrder:
    """Gate and up in alternating chunks of rows: 1 for GPT-OSS, 8 for Alpha-MoE."""
    return RowOrder(chunk=chunk)


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts of one MoE layer.

    Attributes:
        w13: ``[E, 2F, D]``, gate rows then up rows; ``[E, F, D]`` if the activation is not gated.
            A QTensor, or bf16 / fp16 / fp32.
        w2: ``[E, D, F]``.
        activation: what stands between the two GEMMs.
        w13_bias: ``[E, 2F]`` (``[E, F]``) or None.
        w2_bias: ``[E, D]`` or None.
        w13_input_scale: one float32 element or None: the static scale of the hidden states. Used
            with activation format `FP8_TENSOR`; without it that format's scale is dynamic.
        w2_input_scale: the same for what enters the down-projection.

    Raises:
        TypeError: a weight is neither a QTensor nor bf16, fp16 or float32.
        ValueError: shapes or devices do not fit together.

    Other arrangements are converted by `ExpertWeights.arrange`.
    """

    w13: Weight
    w2: Weight
    activation: Activation = SILU
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.w13.shape) != 3 or len(self.w2.shape) != 3:
            got = f"have shapes {tuple(self.w13.shape)} and {tuple(self.w2.shape)}"
            needs = "3-D [E, 2F, D] and [E, D, F]"
            raise ValueError(refusal("ExpertWeights", "w13 and w2", got, needs))
        num_experts, width, hidden_size = self.w13.shape
        rows = 2 * self.w2.shape[2] if self.activation.gated else self.w2.shape[2]
        if tuple(self.w2.shape[:2]) != (num_experts, hidden_size) or width != rows:
            got = f"has shape {tuple(self.w2.shape)}"
            gate = "half of " if self.activation.gated else ""
            needs = (
                f"[E, D, F] = [{num_experts}, {hidden_size}, {gate}{width}] "
                f"for w13 {tuple(self.w13.shape)} and activation {self.activation.name}"
            )
            do = "transposed or interleaved weights go through ExpertWeights.arrange"
            raise ValueError(refusal("ExpertWeights", "w2", got, needs, do))
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            if isinstance(weight, Tensor) and weight.dtype not in _FLOATS:
                needs = "a QTensor, or float32, bfloat16 or float16"
                got = f"has dtype {weight.dtype}"
                raise TypeError(refusal("ExpertWeights", name, got, needs))
        for name, bias, shape in (
            ("w13_bias", self.w13_bias, (num_experts, width)),
            ("w2_bias", self.w2_bias, (num_experts, hidden_size)),
        ):
            if bias is not None and tuple(bias.shape) != shape:
                got = f"has shape {tuple(bias.shape)}"
                raise ValueError(refusal("ExpertWeights", name, got, str(shape)))
        for name, scale in (
            ("w13_input_scale", self.w13_input_scale),
            ("w2_input_scale", self.w2_input_scale),
        ):
            if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
                got = f"is {scale.dtype} of shape {tuple(scale.shape)}"
                do = "of several experts' static scales, engines use the largest"
                raise ValueError(refusal("ExpertWeights", name, got, "one float32 element", do))
        for name, tensor in (
            ("w2", self.w2),
            ("w13_bias", self.w13_bias),
            ("w2_bias", self.w2_bias),
            ("w13_input_scale", self.w13_input_scale),
            ("w2_input_scale", self.w2_input_scale),
        ):
            if tensor is not None and tensor.device != self.w13.device:
                needs = f"w13's device {self.w13.device}"
                raise ValueError(refusal("ExpertWeights", name, f"is on {tensor.device}", needs))

    @classmethod
    def arrange(
        cls,
        w13: Weight,
        w2: Weight,
        *,
        row_order: RowOrder = GATE_UP,
        is_transposed: bool = False,
        activation: Activation = SILU,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Self:
        """Bring other arrangements to gate-then-up rows, once.

        Args:
            w13: ``[E, 2F, D]``, or ``[E, D, 2F]`` if transposed; rows in `row_order`.
            w2: ``[E, D, F]``, or ``[E, F, D]`` if transposed.
            row_order: arrangement of w13's (and w13_bias') gate and up rows.
            is_transposed: whether both weights have their last two axes swapped. Said by the
                caller, never guessed from a shape.
            activation, w13_bias, w2_bias: as the attributes.

        Raises:
            ValueError: shapes do not fit, or a quantised w13 has scale blocks that hold gate and
                up rows at once, which no reordering can separate.
        """
        if is_transposed:
            w13, w2 = _transpose(w13), _transpose(w2)
        given = cls(w13, w2, activation, w13_bias, w2_bias)
        if row_order == GATE_UP or not activation.gated:
            return given
        order = _gate_up_order(w13.shape[1], row_order, w13.device)
        return replace(
            given,
            w13=_take_rows(w13, order, row_order),
            w13_bias=None if w13_bias is None else w13_bias[:, order],
        )

    @property
    def num_experts(self) -> int:
        """E, experts held here."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.w2.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.w13.device

    @property
    def num_bytes(self) -> int:
        """Bytes of both weights, scales included."""
        return sum(w.num_bytes if isinstance(w, QTensor) else w.nbytes for w in (self.w13, self.w2))

    def append(self, shared: "ExpertWeights") -> "ExpertWeights":
        """These experts followed by shared ones of the same width, in the same format.

        Scales become COMPACT; of two static input scales the larger is kept.

        Route to the shared ones with `append_shared_experts`.

        Raises:
            ValueError: shapes, formats, activations or biases differ, or one scale spans experts.
        """
        ours, theirs = _describe(self), _describe(shared)
        if ours != theirs:
            raise ValueError(refusal("ExpertWeights.append", "shared", f"is {theirs}", ours))
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            if isinstance(weight, QTensor) and weight.format.block[0] != 1:
                got = f"is {weight.format.name}, one scale over all experts"
                needs = "a scale per expert"
                do = "append before quantizing"
                raise ValueError(refusal("ExpertWeights.append", name, got, needs, do))
        return replace(
            self,
            w13=_cat(self.w13, shared.w13),
            w2=_cat(self.w2, shared.w2),
            w13_bias=_cat_bias(self.w13_bias, shared.w13_bias),
            w2_bias=_cat_bias(self.w2_bias, shared.w2_bias),
            w13_input_scale=_larger(self.w13_input_scale, shared.w13_input_scale),
            w2_input_scale=_larger(self.w2_input_scale, shared.w2_input_scale),
        )

    def pad_width(self, multiple: int) -> "ExpertWeights":
        """Unquantised experts with F rounded up to a multiple, by rows and columns of zeros.

        The output does not change: every `Activation` maps a zero gate (and a zero x) to zero.

        Raises:
            TypeError: the weights are quantised.
            ValueError: the multiple is not positive.
        """
        if multiple < 1:
            needs = "a positive size"
            raise ValueError(
                refusal("ExpertWeights.pad_width", "multiple", f"is {multiple}", needs)
            )
        extra = -self.intermediate_size % multiple
        if extra == 0:
            return self
        if isinstance(self.w13, QTensor) or isinstance(self.w2, QTensor):
            needs = "unquantised weights"
            raise TypeError(refusal("ExpertWeights.pad_width", "w13 or w2", "is quantised", needs))
        halves = 2 if self.activation.gated else 1
        num_experts, width = self.num_experts, self.intermediate_size
        w13 = self.w13.reshape(num_experts, halves, width, self.hidden_size)
        bias = self.w13_bias
        if bias is not None:
            bias = pad(bias.reshape(num_experts, halves, width), (0, extra)).flatten(1, 2)
        return replace(
            self,
            w13=pad(w13, (0, 0, 0, extra)).flatten(1, 2),
            w2=pad(self.w2, (0, extra)),
            w13_bias=bias,
        )


def static_scale(scale: Tensor | None, format: Format) -> Tensor | None:
    """A layer's static activation scale as ``[1, 1]``, None where scales are dynamic.

    Static scales belong to per-tensor activations only.
    """
    return scale.reshape(1, 1) if scale is not None and format == FP8_TENSOR else None


def _transpose(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.transpose(-1, -2).contiguous()
    experts, rows, columns = weight.format.block
    flipped = replace(weight.format, block=(experts, columns, rows))
    scale = weight.compact_scale.transpose(-1, -2).contiguous()
    return QTensor(weight.data.transpose(-1, -2).contiguous(), scale, flipped)


def _gate_up_order(num_rows: int, row_order: RowOrder, device: torch.device) -> Tensor:
    """Row indices that bring rows in `row_order` to gate-then-up."""
    chunk = row_order.chunk or num_rows // 2
    if chunk < 1 or num_rows % (2 * chunk):
        got = f"has {num_rows} rows"
        needs = f"a multiple of {2 * chunk} for chunks of {chunk} gate and {chunk} up rows"
        raise ValueError(refusal("ExpertWeights.arrange", "w13", got, needs))
    rows = torch.arange(num_rows, device=device).view(-1, 2, chunk)
    if not row_order.gate_first:
        rows = rows.flip(1)
    return rows.transpose(0, 1).reshape(-1)


def _take_rows(weight: Weight, order: Tensor, row_order: RowOrder) -> Weight:
    if isinstance(weight, Tensor):
        return weight[:, order]
    block = weight.format.block[1]
    data = weight.data.view(torch.uint8)[:, order].view(weight.data.dtype)
    scale = weight.compact_scale
    chunk = row_order.chunk or weight.shape[1] // 2
    if block != ALL:
        if chunk % block:
            got = f"has scale blocks of {block} rows across chunks of {chunk} gate or up rows"
            do = "dequantize it, arrange, and quantize again"
            needs = "blocks that hold gate rows or up rows only"
            raise ValueError(refusal("ExpertWeights.arrange", "w13", got, needs, do))
        scale = scale[:, torch.div(order[::block], block, rounding_mode="floor")]
    return QTensor(data, scale, weight.format)


def _cat(ours: Weight, theirs: Weight) -> Weight:
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        return torch.cat([ours, theirs])
    data = torch.cat([ours.data.view(torch.uint8), theirs.data.view(torch.uint8)])
    scale = torch.cat([ours.compact_scale, theirs.compact_scale])
    return QTensor(data.view(ours.data.dtype), scale, ours.format)


def _cat_bias(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if ours is None or theirs is None else torch.cat([ours, theirs])


def _larger(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if ours is None or theirs is None else torch.maximum(ours, theirs)


def _describe(experts: ExpertWeights) -> str:
    """What must agree for two groups of experts to be run as one, in words."""
    w13, w2 = experts.w13, experts.w2
    formats = [w.format if isinstance(w, QTensor) else w.dtype for w in (w13, w2)]
    names = [f.name if isinstance(f, Format) else str(f) for f in formats]
    options = ("w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")
    given = [name for name in options if getattr(experts, name) is not None]
    return (
        f"w13 [E, {w13.shape[1]}, {w13.shape[2]}] {names[0]}, w2 {names[1]} on {w13.device}, "
        f"activation {experts.activation.name}, with {', '.join(given) or 'no bias'}"
    )
