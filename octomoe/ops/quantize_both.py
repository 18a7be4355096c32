"""The counter for `quantize_both`."""

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.ops.check import check_float, check_format, check_rank
from octomoe.ops.dispatch import implementation
from octomoe.ops.quantize import empty_quantized, seed_tensor
from octomoe.ops.register import register


def quantize_both(
    x: Tensor,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[QTensor, QTensor]:
    """``quantize(x, row_format), quantize(x, column_format)``, x being read once if that can be.

    A gradient is multiplied along its rows by one GEMM and along its columns by the other; each
    wants scales along its own depth. A kernel writes both where scale blocks of both formats fit
    into one tile (as those of `FP8_GROUP128` and `FP8_COLUMN128` do, or of `MXFP8` and blocks of
    32 x 1; with a seed only the latter); other formats take two passes.

    Args:
        x: ``[rows, columns]`` or ``[experts, rows, columns]``, float32, bf16 or fp16.
        row_format: of the first result.
        column_format: of the second.
        row_layout: where to lay the first one's scales.
        column_layout: where to lay the second one's.
        seed: rounds both stochastically, by the same random bits; see `octomoe.quantize`.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        Two QTensors of x's shape.

    Raises:
        TypeError: x is not float32, bf16 or fp16, or an argument has another type than said.
        ValueError: a shape or device does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> x = torch.ones(128, 256)
    >>> rows, columns = quantize_both(x, octomoe.FP8_GROUP128, octomoe.FP8_COLUMN128)
    >>> tuple(rows.scale.shape), tuple(columns.scale.shape)
    ((128, 2), (1, 256))
    """
    op = "quantize_both"
    check_float(op, "x", x)
    check_rank(op, "x", x, (2, 3), "[rows, columns] or [experts, rows, columns]")
    check_format(op, "row_format", row_format)
    check_format(op, "column_format", column_format)
    seed = seed_tensor(op, seed, x.device)
    row_data, row_scale, column_data, column_scale = _quantize_both_op(
        x, row_format.name, column_format.name, row_layout, column_layout, seed, backend
    )
    return (
        QTensor(row_data, row_scale, row_format, row_layout),
        QTensor(column_data, column_scale, column_format, column_layout),
    )


@register("quantize_both")
def _quantize_both_op(
    x: Tensor,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("quantize_both", backend, x.device)
    rows, columns = run(
        x,
        Format.parse(row_format),
        Format.parse(column_format),
        row_layout=ScaleLayout(row_layout),
        column_layout=ScaleLayout(column_layout),
        seed=seed,
    )
    return rows.data, rows.scale, columns.data, columns.scale


@_quantize_both_op.register_fake
def _(
    x: Tensor,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = tuple(x.shape)
    return (
        *empty_quantized(x, shape, row_format, row_layout),
        *empty_quantized(x, shape, column_format, column_layout),
    )
