"""What TransformerEngine's permutation calls refuse here, and in which words."""

import pytest
import torch

import octomoe.integrations.transformer_engine as te
from octomoe import FP8_BLOCK128, FP8_ROW, quantize

X_TD, MASK_TE, MAP_TE = torch.ones(2, 8), torch.ones(2, 3).int(), torch.zeros(2, 3).int()
ONE_E, INDEX = torch.ones(3).long(), {"map_type": "index"}
REFUSALS = {
    "map type": (
        ValueError,
        "moe_permute: map_type is 'sparse', but needs",
        lambda: te.moe_permute(X_TD, MASK_TE, 6, map_type="sparse"),
    ),
    "map type back": (
        ValueError,
        "moe_unpermute: map_type is 'sparse'",
        lambda: te.moe_unpermute(X_TD, MAP_TE, map_type="sparse"),
    ),
    "tokens": (
        ValueError,
        r"routing_map has shape \(2, 3\), but needs 1 rows, as inp has",
        lambda: te.moe_permute(X_TD[:1], MASK_TE, 6),
    ),
    "rank": (
        ValueError,
        r"inp has shape \(2, 1, 8\), but needs \[T, D\]",
        lambda: te.moe_permute(X_TD[:, None], MASK_TE, 6),
    ),
    "float mask": (
        TypeError,
        "routing_map has dtype torch.float32, but needs bool, int32",
        lambda: te.moe_permute(X_TD, MASK_TE.float(), 6),
    ),
    "bool ids": (
        TypeError,
        "routing_map has dtype torch.bool, but needs int32 or int64",
        lambda: te.moe_permute(X_TD, MASK_TE.bool(), 6, **INDEX),
    ),
    "device": (
        ValueError,
        "routing_map is on meta, but needs the other tensors' device cpu",
        lambda: te.moe_permute(X_TD, MASK_TE.to("meta"), 6),
    ),
    "zero rows": (
        ValueError,
        "num_out_tokens is 0, but needs a positive number; pass int",
        lambda: te.moe_permute(X_TD, MASK_TE, 0),
    ),
    "fewer rows": (
        ValueError,
        "num_out_tokens is -1, but needs a positive number",
        lambda: te.moe_permute_with_probs(X_TD, MASK_TE.float(), MASK_TE, -1),
    ),
    "fewer rows by index": (
        ValueError,
        "num_out_tokens is -1, but needs a number from 0",
        lambda: te.moe_permute(X_TD, MASK_TE, -1, **INDEX),
    ),
    "no rows": (
        TypeError,
        "num_out_tokens is None, but needs a number of rows",
        lambda: te.moe_permute(X_TD, MASK_TE, None),
    ),
    "probs": (
        ValueError,
        r"probs has shape \(2, 2\), but needs \(2, 3\)",
        lambda: te.moe_permute_with_probs(X_TD, torch.ones(2, 2), MASK_TE, 6),
    ),
    "no counts": (
        ValueError,
        "tokens_per_expert is None, but needs a tensor",
        lambda: te.moe_permute_and_pad_with_probs(X_TD, MASK_TE.float(), MASK_TE, None, 8),
    ),
    "counts": (
        ValueError,
        r"tokens_per_expert has shape \(2,\), but needs \(3,\)",
        lambda: te.moe_permute_and_pad_with_probs(X_TD, MASK_TE.float(), MASK_TE, ONE_E[:2], 8),
    ),
    "align": (
        ValueError,
        "align_size is 0, but needs a positive number",
        lambda: te.moe_permute_and_pad_with_probs(X_TD, MASK_TE.float(), MASK_TE, ONE_E, 0),
    ),
    "blocks of rows": (
        ValueError,
        "x is fp8_block128, but needs a scale per row",
        lambda: te.moe_permute(quantize(X_TD, FP8_BLOCK128), MASK_TE, 6),
    ),
    "quantised sum": (
        TypeError,
        "moe_unpermute: inp is a QTensor.*dequantize it first",
        lambda: te.moe_unpermute(quantize(X_TD, FP8_ROW), MAP_TE),
    ),
    "two probs": (
        ValueError,
        "probs is given too, but needs one of",
        lambda: te.moe_unpermute(X_TD, MAP_TE, torch.ones(2, 3), probs=torch.ones(2, 3)),
    ),
    "their map": (
        ValueError,
        r"row_id_map is torch.float32 of shape \(0,\), but needs what this",
        lambda: te.moe_unpermute(X_TD, torch.tensor([])),
    ),
    "merging probs": (
        ValueError,
        r"merging_probs has shape \(2, 2\), but needs \(2, 3\)",
        lambda: te.moe_unpermute(X_TD, MAP_TE, torch.ones(2, 2)),
    ),
    "restore shape": (
        ValueError,
        r"restore_shape has shape \(3, 8\), but needs \(2, 8\)",
        lambda: te.moe_unpermute(X_TD, MAP_TE, restore_shape=(3, 8)),
    ),
    "pad offsets": (
        ValueError,
        r"pad_offsets has shape \(2,\), but needs \(3,\)",
        lambda: te.moe_unpermute(X_TD, MAP_TE, pad_offsets=ONE_E[:2]),
    ),
    "pad offsets by index": (
        ValueError,
        "pad_offsets is given, but needs None for an index map",
        lambda: te.moe_unpermute(X_TD, MAP_TE, pad_offsets=ONE_E, **INDEX),
    ),
    "chunk sizes": (
        TypeError,
        "split_sizes has dtype torch.float32, but needs int32",
        lambda: te.moe_sort_chunks_by_index(X_TD, ONE_E.float(), ONE_E),
    ),
    "chunk order": (
        ValueError,
        r"sorted_index has shape \(2,\), but needs \(3,\)",
        lambda: te.moe_sort_chunks_by_index(X_TD, ONE_E, ONE_E[:2]),
    ),
    "chunk probs": (
        ValueError,
        r"probs has shape \(3,\), but needs \(2,\)",
        lambda: te.moe_sort_chunks_by_index_with_probs(X_TD, ONE_E, ONE_E, ONE_E),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
