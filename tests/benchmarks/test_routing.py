"""The routing benchmark's problems: what is right passes its check, what is wrong does not.

The peer's own kernels need a GPU; what its map means is tested on a map written out by hand.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import routing as benchmark
from benchmarks.peers.transformer_engine import slots_of_row_id_map
from benchmarks.records import has_same_bits
from octomoe import MXFP8, quantize
from octomoe.core.routing import slots_of_mask


def problems():
    """Small ones of every part, on the CPU; in float32, since the interpreter rounds no bf16."""
    yield benchmark.routing_problem(5, 16, None, "cpu")
    yield benchmark.permute_problem(5, 16, 64, "cpu")
    yield from benchmark.mask_problems(5, 32, 64, "cpu", torch.float32)


def test_results_are_right_and_wrong_ones_are_noticed():
    for problem in problems():
        for name, run in problem.runs.items():
            assert problem.is_right(run()), (problem.name, name)
        result = run()
        match result:
            case tuple():
                wrong = result[0], result[1] + 1.0
            case torch.Tensor():
                wrong = result.roll(1, 0)
            case _ if hasattr(result, "data"):
                wrong = replace(result, data=result.data.roll(1, 0))
            case _:
                wrong = replace(result, choice_of_slot_S=result.choice_of_slot_S.roll(1, 0))
        assert not problem.is_right(wrong), problem.name


def test_tried_configurations_give_the_same():
    tries = [benchmark.parse_try("build_routing:choices=32,num_warps=1")]
    tries += [benchmark.parse_try("permute:columns=32,is_sparse=1")]
    tries += [benchmark.parse_try("unpermute_bwd:columns=32")]
    tried = 0
    for problem in problems():
        with_tries = benchmark.with_tries(problem, tries)
        for name in with_tries.runs.keys() - problem.runs.keys():
            assert problem.is_right(with_tries.runs[name]())
            assert with_tries.configs[name] != with_tries.configs["octomoe"]
            tried += 1
    assert tried == 3


@pytest.mark.parametrize("text", ["quantize:rows=1", "permute", "permute:"])
def test_what_cannot_be_tried_is_refused(text):
    with pytest.raises(benchmark.argparse.ArgumentTypeError, match="is not OP:FIELD=VALUE"):
        benchmark.parse_try(text)


def test_the_peers_map():
    mask_TE = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    # Rows from the last to the first, their experts, how many; 99 is memory as it was.
    theirs = torch.tensor(
        [[3, 0, 99, 2, 0, 99, 2], [99] * 6 + [0], [4, 2, 1, 2, 1, 0, 3]], dtype=torch.int32
    )
    assert torch.equal(slots_of_row_id_map(theirs), slots_of_mask(mask_TE).long())


def test_same_bits():
    x = torch.tensor([[0.0, torch.nan]])
    assert has_same_bits(x, x.clone())
    assert not has_same_bits(x, -x)
    assert not has_same_bits(x, x.T)
    q = quantize(torch.ones(2, 64), MXFP8)
    assert has_same_bits(q, quantize(torch.ones(2, 64), MXFP8))
    assert not has_same_bits(q, quantize(torch.ones(2, 64) * 2, MXFP8))
