"""Read the weights of active experts, and do nothing with them: what memory allows in practice.

    out[p] = sum of the 32-bit words that program p read, modulo 2^32

Bound by bytes. The sum is stored so that no compiler leaves the reading out, and so that it can be
compared. Programs take turns over blocks of words, in the order of the active experts.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.bench.contender import Contender
from octomoe.bench.layers import Problem, active_experts
from octomoe.core.device import num_sms


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """How the words are shared out.

    Attributes:
        words: that a program reads at once; a power of two.
        num_warps: of a program.
        programs: per multiprocessor.
    """

    words: int
    num_warps: int
    programs: int


# Few bytes want many small programs, many bytes few large ones: the fastest is reported.
READS: Final = (ReadConfig(2048, 4, 16), ReadConfig(4096, 8, 4), ReadConfig(8192, 8, 2))


# Triton takes no types but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _sum_words(  # type: ignore[no-untyped-def]
    w_ptr, active_ptr, num_active, num_words, WORDS: tl.constexpr
):
    """This program's share of the active experts' words, a sum per lane."""
    num_blocks = tl.cdiv(num_words, WORDS)
    lane = tl.arange(0, WORDS)
    total = tl.zeros([WORDS], tl.int32)
    for block in range(tl.program_id(0), num_active * num_blocks, tl.num_programs(0)):
        expert = tl.load(active_ptr + block // num_blocks).to(tl.int64)
        word = block % num_blocks * WORDS + lane
        total += tl.load(w_ptr + expert * num_words + word, mask=word < num_words, other=0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(  # type: ignore[no-untyped-def]
    w13_ptr,
    w2_ptr,
    active_ptr,
    out_ptr,
    num_active,
    num_words_13,
    num_words_2,
    WORDS: tl.constexpr,
):
    """Both weights, one after the other."""
    total = _sum_words(w13_ptr, active_ptr, num_active, num_words_13, WORDS)
    total += _sum_words(w2_ptr, active_ptr, num_active, num_words_2, WORDS)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total.to(tl.int64), axis=0))


def read(weights: tuple[Tensor, Tensor], active: Tensor, config: ReadConfig) -> Tensor:
    """``[programs]`` int64, whose sum modulo 2^32 is that of the words of the `active` experts.

    Args:
        weights: ``[E, words]`` int32 each.
        active: ``[n]`` int32, numbers of experts.
        config: how they are shared out.
    """
    w13, w2 = weights
    num_programs = max(num_sms(w13.device), 1) * config.programs
    out = torch.empty(num_programs, dtype=torch.int64, device=w13.device)
    _read_kernel[(num_programs,)](
        w13,
        w2,
        active,
        out,
        active.shape[0],
        w13.shape[1],
        w2.shape[1],
        WORDS=config.words,
        num_warps=config.num_warps,
    )
    return out


def words_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """``[E, words]`` int32 of both weights. Bytes past an expert's last whole word are left out."""
    w13, w2 = (_words(w.data) for w in problem.weights)
    return w13, w2


def _words(data: Tensor) -> Tensor:
    rows = data.view(torch.uint8).flatten(1)
    if rows.shape[1] % 4:
        # Words of the next expert would start within one of this.
        rows = rows[:, : rows.shape[1] // 4 * 4].contiguous()
    return rows.view(torch.int32)


def read_contenders(problem: Problem) -> dict[str, Contender]:
    """The kernel under each configuration.

    Raises:
        AssertionError: one did not read everything once.
    """
    weights = words_of(problem)
    active = active_experts(problem)
    expected = sum(int(w.sum(1)[active].sum()) for w in weights)
    found = {}
    for config in READS:
        run = partial(read, weights, active, config)
        assert (int(run().sum()) - expected) % 2**32 == 0, f"{config}: not every word was read"
        found[f"read {config.words}"] = Contender(run, asdict(config))
    return found
