"""TransformerEngine's MoE permutation calls, by their names and signatures, on OctoMoE's ops.

Import them from here instead of from ``transformer_engine.pytorch``; that package is not needed.
Plain tensors have gradients. A `QTensor` (one scale per tensor, per row or per part of a row, in
any layout and for any number of tokens) is moved byte for byte and keeps format and layout. torch
gives gradients to plain tensors only, so FP8 gradients go through `moe_permute_bwd` and
`moe_unpermute_bwd`, which a `torch.autograd.Function` of yours calls.

A ``row_id_map`` is one int32 tensor, ``[T, E]`` for mask maps and ``[T, topK]`` for index maps: the
row of the permuted tensor that holds this token's choice, -1 where there is none. Padding is not
counted in it; ``pad_offsets`` adds it. Like TransformerEngine's it is made to be passed on.

Where TransformerEngine leaves memory undefined there is an answer here: rows of no token are zero,
rows past ``num_out_tokens`` are dropped, and ``moe_unpermute`` returns all T tokens even where
``restore_shape`` is not given or no row was permuted.
"""

import warnings

import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor
from octomoe.core.routing import (
    Routing,
    padding_before,
    routing_of_slots,
    slots_of_ids,
    slots_of_mask,
    slots_of_sorted_chunks,
    weights_of_slots,
)
from octomoe.errors import refusal
from octomoe.moe.autograd import Permute, Unpermute
from octomoe.ops.check import check_int, check_rank, check_same_device, check_shape
from octomoe.ops.dequantize import dequantize
from octomoe.ops.permute import permute
from octomoe.ops.quantize import quantize
from octomoe.ops.unpermute import unpermute

_MAP_TYPES = ("mask", "index")


def moe_permute(
    inp: Tensor | QTensor,
    routing_map: Tensor,
    num_out_tokens: int,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor | QTensor, Tensor]:
    """Bring tokens into the order of their experts.

    Args:
        inp: ``[T, D]``.
        routing_map: for ``"mask"``, ``[T, E]`` bool or 0 and 1: whether a token goes to an expert;
            for ``"index"``, ``[T, topK]`` int32 or int64: its experts, a negative one for none.
        num_out_tokens: rows of the result. A mask map needs a positive number; of an index map, 0
            means ``T * topK``. Without tokens the result has no rows, whatever it is.
        max_token_num: a hint for TransformerEngine's workspace. There is none here.
        map_type: ``"mask"`` or ``"index"``.

    Returns:
        The permuted tokens ``[num_out_tokens, D]`` and the row_id_map.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or on another device.
    """
    _check_map("moe_permute", inp, routing_map, map_type)
    num_rows = _num_rows("moe_permute", num_out_tokens, routing_map, map_type)
    slots = slots_of_mask(routing_map) if map_type == "mask" else slots_of_ids(routing_map)
    routing = routing_of_slots(slots, num_rows)
    return _permute(inp, routing), routing.slot_of_choice_TA


def moe_permute_with_probs(
    inp: Tensor | QTensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor | QTensor, Tensor, Tensor]:
    """Bring tokens and their probabilities into the order of the experts.

    A choice of probability zero gets a row of zeros (a mask padded by its maker has such choices),
    and that row no gradient.

    Args:
        inp: ``[T, D]``.
        probs: ``[T, E]`` float.
        routing_map: ``[T, E]``, a mask as `moe_permute` takes it.
        num_out_tokens: rows of the result, a positive number.

    Returns:
        The permuted tokens ``[num_out_tokens, D]``, the permuted probs ``[num_out_tokens]`` and the
        row_id_map.

    Raises:
        TypeError, ValueError: as `moe_permute`.
    """
    _check_map("moe_permute_with_probs", inp, routing_map, "mask", probs)
    num_rows = _num_rows("moe_permute_with_probs", num_out_tokens, routing_map, "mask")
    routing = routing_of_slots(slots_of_mask(routing_map), num_rows)
    return *_permute_with_probs(inp, probs, routing), routing.slot_of_choice_TA


def moe_permute_and_pad_with_probs(
    inp: Tensor | QTensor,
    probs: Tensor,
    routing_map: Tensor,
    tokens_per_expert: Tensor,
    align_size: int,
) -> tuple[Tensor | QTensor, Tensor, Tensor, Tensor, Tensor]:
    """As `moe_permute_with_probs`, with every expert's rows filled up with zeros to `align_size`.

    How many rows the result has is for `tokens_per_expert` to say: where it lies on a GPU, the host
    waits for it once; where it lies on the CPU, never.

    Args:
        inp: ``[T, D]``.
        probs: ``[T, E]`` float.
        routing_map: ``[T, E]``, a mask as `moe_permute` takes it.
        tokens_per_expert: ``[E]`` int, the tokens of every expert in the mask; on any device.
        align_size: what every expert's number of rows becomes a multiple of.

    Returns:
        The permuted tokens, the permuted probs, the row_id_map, ``pad_offsets [E]`` (how much
        padding lies before each expert; never None, zeros if there is none) and
        ``target_tokens_per_expert [E]`` (rows of each expert, padding included).

    Raises:
        TypeError, ValueError: as `moe_permute`.
    """
    function = "moe_permute_and_pad_with_probs"
    _check_map(function, inp, routing_map, "mask", probs)
    if tokens_per_expert is None:
        raise ValueError(refusal(function, "tokens_per_expert", "is None", "a tensor"))
    if align_size <= 0:
        raise ValueError(refusal(function, "align_size", f"is {align_size}", "a positive number"))
    check_int(function, "tokens_per_expert", tokens_per_expert)
    num_experts = routing_map.shape[1]
    check_shape(function, "tokens_per_expert", tuple(tokens_per_expert.shape), (num_experts,))
    target_E = -(-tokens_per_expert.long() // align_size) * align_size
    num_rows = int(target_E.sum()) if routing_map.shape[0] else 0
    pad_offsets = padding_before(tokens_per_expert, align_size)
    pad_offsets = pad_offsets.to(inp.device, non_blocking=True)
    row_id_map = slots_of_mask(routing_map)
    routing = routing_of_slots(_padded(row_id_map, pad_offsets), num_rows)
    permuted, permuted_probs = _permute_with_probs(inp, probs, routing)
    target_E = target_E.to(inp.device, non_blocking=True)
    return permuted, permuted_probs, row_id_map, pad_offsets, target_E


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Bring rows back to their tokens and sum the rows of each, in float32.

    Args:
        inp: ``[rows, D]`` float32, bf16 or fp16, in the order that `moe_permute` made.
        row_id_map: what `moe_permute` returned.
        merging_probs: ``[T, E]`` or ``[T, topK]`` float, a factor for each row.
        restore_shape: shape of the result, ``(T, D)``.
        map_type: what `moe_permute` was given.
        probs: the old name of `merging_probs`.
        pad_offsets: what `moe_permute_and_pad_with_probs` returned, if that made the rows.

    Returns:
        ``[T, D]``. Of an index map without `merging_probs` nothing is summed: ``[topK * T, D]``,
        first every token's first choice, then every second.

    Raises:
        TypeError: inp is quantised (sums are not), or an argument of another type.
        ValueError: an argument is of another shape, on another device, or given twice.
    """
    if probs is not None:
        if merging_probs is not None:
            do = "leave probs out, its old name"
            needs = "one of probs and merging_probs"
            raise ValueError(refusal("moe_unpermute", "probs", "is given too", needs, do))
        message = "moe_unpermute: probs is now called merging_probs"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        merging_probs = probs
    if isinstance(inp, QTensor):
        do = "dequantize it first"
        raise TypeError(refusal("moe_unpermute", "inp", "is a QTensor", "a plain tensor", do))
    check_rank("moe_unpermute", "inp", inp, (2,), "[rows, D]")
    is_summed = merging_probs is not None or map_type == "mask"
    slots = _slots("moe_unpermute", row_id_map, map_type, pad_offsets, is_summed)
    check_same_device("moe_unpermute", inp.device, row_id_map=slots, merging_probs=merging_probs)
    if merging_probs is not None:
        shape = tuple(merging_probs.shape)
        check_shape("moe_unpermute", "merging_probs", shape, tuple(row_id_map.shape))
    if restore_shape is not None:
        needs_shape = (slots.shape[0], inp.shape[1])
        check_shape("moe_unpermute", "restore_shape", tuple(restore_shape), needs_shape)
    routing = routing_of_slots(slots, inp.shape[0])
    return Unpermute.apply(inp, routing, merging_probs)  # type: ignore[no-untyped-call]


def moe_permute_bwd(
    grad: Tensor | QTensor, row_id_map: Tensor, pad_offsets: Tensor | None = None
) -> Tensor | QTensor:
    """Gradient of `moe_permute`'s tokens: each token's rows of `grad` are summed in float32.

    Args:
        grad: ``[rows, D]``, gradient of the permuted tokens.
        row_id_map: what `moe_permute` returned, for either map type.
        pad_offsets: what `moe_permute_and_pad_with_probs` returned, if that made the rows.

    Returns:
        ``[T, D]`` in the dtype of `grad`; of a QTensor, the sum quantised to its format and layout.
        (`moe_permute_with_probs` writes zeros for choices of probability zero; their rows of `grad`
        are summed all the same.)
    """
    slots = _slots("moe_permute_bwd", row_id_map, "mask", pad_offsets)
    routing = routing_of_slots(slots, grad.shape[0])
    if not isinstance(grad, QTensor):
        return unpermute(grad, routing)
    return quantize(unpermute(dequantize(grad), routing), grad.format, layout=grad.layout)


def moe_unpermute_bwd(
    grad: Tensor | QTensor,
    row_id_map: Tensor,
    num_permuted_tokens: int,
    map_type: str = "mask",
    pad_offsets: Tensor | None = None,
) -> Tensor | QTensor:
    """Gradient of the rows that `moe_unpermute` was given, if it had no merging probs.

    Args:
        grad: ``[T, D]``, gradient of the result of `moe_unpermute`.
        row_id_map: what `moe_unpermute` was given.
        num_permuted_tokens: rows that it was given.
        map_type: what it was given.
        pad_offsets: what it was given.

    Returns:
        ``[num_permuted_tokens, D]``; of a QTensor, its bytes in the same format and layout. Rows of
        no token are zero.
    """
    slots = _slots("moe_unpermute_bwd", row_id_map, map_type, pad_offsets, map_type == "mask")
    return permute(grad, routing_of_slots(slots, num_permuted_tokens))


def moe_sort_chunks_by_index(
    inp: Tensor | QTensor, split_sizes: Tensor, sorted_index: Tensor
) -> Tensor | QTensor:
    """Cut rows into chunks and put the chunks in another order.

    Sorting the result by ``split_sizes[sorted_index]`` and ``sorted_index.argsort()`` undoes it,
    also for gradients that are QTensors.

    Args:
        inp: ``[T, D]``.
        split_sizes: ``[chunks]`` int, rows of each chunk. Rows past the last chunk stay.
        sorted_index: ``[chunks]`` int, which chunk comes first, second, ...

    Returns:
        ``[T, D]``.

    Raises:
        TypeError, ValueError: as `moe_permute`.
    """
    return _permute(inp, _chunks("moe_sort_chunks_by_index", inp, split_sizes, sorted_index))


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor | QTensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor | QTensor, Tensor]:
    """As `moe_sort_chunks_by_index`, for rows and their probabilities ``[T]``."""
    function = "moe_sort_chunks_by_index_with_probs"
    routing = _chunks(function, inp, split_sizes, sorted_index)
    check_shape(function, "probs", tuple(probs.shape), (inp.shape[0],))
    check_same_device(function, inp.device, probs=probs)
    return _permute(inp, routing), weights_of_slots(probs.unsqueeze(1), routing)


def _permute(x: Tensor | QTensor, routing: Routing) -> Tensor | QTensor:
    if isinstance(x, QTensor):
        return permute(x, routing)
    return Permute.apply(x, routing)  # type: ignore[no-untyped-call]


def _permute_with_probs(
    x: Tensor | QTensor, probs_TE: Tensor, routing: Routing
) -> tuple[Tensor | QTensor, Tensor]:
    """Rows and probs; rows of probability zero are left to no token, hence zero."""
    slots = torch.where(probs_TE == 0, -1, routing.slot_of_choice_TA)
    permuted = _permute(x, routing_of_slots(slots, routing.num_slots))
    return permuted, weights_of_slots(probs_TE, routing)


def _padded(slots_TE: Tensor, pad_offsets_E: Tensor) -> Tensor:
    return torch.where(slots_TE < 0, -1, slots_TE + pad_offsets_E)


def _slots(
    function: str,
    row_id_map: Tensor,
    map_type: str,
    pad_offsets: Tensor | None,
    is_summed: bool = True,
) -> Tensor:
    """Where the choices' rows lie, padding included, as tokens with one choice if not summed."""
    _check_map_type(function, map_type)
    if row_id_map.dtype != torch.int32 or row_id_map.dim() != 2:
        got = f"is {row_id_map.dtype} of shape {tuple(row_id_map.shape)}"
        needs = "what this module's moe_permute returned, int32 [T, E] or [T, topK]"
        raise ValueError(refusal(function, "row_id_map", got, needs))
    if pad_offsets is not None:
        if map_type != "mask":
            needs = "None for an index map, whose choices have no column per expert"
            raise ValueError(refusal(function, "pad_offsets", "is given", needs))
        check_shape(function, "pad_offsets", tuple(pad_offsets.shape), (row_id_map.shape[1],))
        check_same_device(function, row_id_map.device, pad_offsets=pad_offsets)
        return _padded(row_id_map, pad_offsets)
    return row_id_map if is_summed else row_id_map.T.reshape(-1, 1)


def _chunks(
    function: str, inp: Tensor | QTensor, split_sizes: Tensor, sorted_index: Tensor
) -> Routing:
    check_rank(function, "inp", inp, (2,), "[T, D]")
    check_int(function, "split_sizes", split_sizes)
    check_int(function, "sorted_index", sorted_index)
    check_rank(function, "split_sizes", split_sizes, (1,), "[chunks]")
    check_shape(function, "sorted_index", tuple(sorted_index.shape), tuple(split_sizes.shape))
    check_same_device(function, inp.device, split_sizes=split_sizes, sorted_index=sorted_index)
    num_rows = inp.shape[0]
    return routing_of_slots(slots_of_sorted_chunks(split_sizes, sorted_index, num_rows), num_rows)


def _check_map(
    function: str,
    inp: Tensor | QTensor,
    routing_map: Tensor,
    map_type: str,
    probs: Tensor | None = None,
) -> None:
    _check_map_type(function, map_type)
    check_rank(function, "inp", inp, (2,), "[T, D]")
    check_rank(function, "routing_map", routing_map, (2,), "[T, E] or [T, topK]")
    if map_type == "index":
        check_int(function, "routing_map", routing_map)
    elif routing_map.is_floating_point():
        got = f"has dtype {routing_map.dtype}"
        raise TypeError(refusal(function, "routing_map", got, "bool, int32 or int64"))
    if routing_map.shape[0] != inp.shape[0]:
        got = f"has shape {tuple(routing_map.shape)}"
        raise ValueError(refusal(function, "routing_map", got, f"{inp.shape[0]} rows, as inp has"))
    if probs is not None:
        check_shape(function, "probs", tuple(probs.shape), tuple(routing_map.shape))
    check_same_device(function, inp.device, routing_map=routing_map, probs=probs)


def _check_map_type(function: str, map_type: str) -> None:
    if map_type not in _MAP_TYPES:
        raise ValueError(refusal(function, "map_type", f"is {map_type!r}", '"mask" or "index"'))


def _num_rows(
    function: str, num_out_tokens: int | Tensor, routing_map: Tensor, map_type: str
) -> int:
    if num_out_tokens is None:
        do = "pass int(routing_map.sum()) or num_tokens * top_k"
        raise TypeError(refusal(function, "num_out_tokens", "is None", "a number of rows", do))
    if routing_map.shape[0] == 0:
        return 0
    # torch.library, and so TransformerEngine, takes a tensor of one element for an int.
    num_rows = int(num_out_tokens) if isinstance(num_out_tokens, Tensor) else num_out_tokens
    if num_rows < 0 or (num_rows == 0 and map_type == "mask"):
        needs = "a positive number" if map_type == "mask" else "a number from 0"
        do = "pass int(routing_map.sum()) or num_tokens * top_k"
        raise ValueError(refusal(function, "num_out_tokens", f"is {num_rows}", needs, do))
    return num_rows or routing_map.numel()
