"""How long something takes on a GPU: replays of a CUDA graph, the L2 cache flushed before each."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

# More than any L2 cache holds.
_FLUSH_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one run: the median, and the fastest and slowest of all."""

    us: float
    fastest: float
    slowest: float


def time_graphs(
    runs: dict[str, Callable[[], object]], *, repeats: int = 20, num_warmups: int = 3
) -> dict[str, Timing]:
    """Time contenders, taking turns, so that a machine that slows down does so for all.

    An empty kernel measures 3.5 us on an H200.

    Args:
        runs: name -> what to capture and replay. It allocates nothing that outlives it and waits
            for nothing.
        repeats: timed replays of each.
        num_warmups: replays before.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    graphs = {name: _capture(run) for name, run in runs.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for repeat in range(num_warmups + repeats):
        for name, graph in graphs.items():
            flush.zero_()
            # The GPU waits, so that it finds all work of this round queued.
            torch.cuda._sleep(20_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            if repeat >= num_warmups:
                events[name].append((start, end))
    torch.cuda.synchronize()
    timings = {}
    for name, pairs in events.items():
        us = [round(1e3 * start.elapsed_time(end), 2) for start, end in pairs]
        timings[name] = Timing(median(us), min(us), max(us))
    return timings


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first run compiles and fills caches.
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
