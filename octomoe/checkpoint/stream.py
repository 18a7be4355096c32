"""Run jobs on a few threads, in order of their shards, one piece in memory per thread."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from octomoe.checkpoint.destination import Destination
from octomoe.checkpoint.jobs import Job, Outcome
from octomoe.checkpoint.plan import Shard
from octomoe.checkpoint.writer import ShardWriter

OnBytes = Callable[[int], None]


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(tasks: Iterable[Callable[[], None]], workers: int) -> None:
    """Run tasks on `workers` threads, taking each from the iterator when a thread is free.

    The first error stops the rest and is raised.
    """
    lock, stop = threading.Lock(), threading.Event()
    iterator = iter(tasks)

    def work() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            with lock:
                task = next(iterator, None)
            if task is None:
                return
            task()

    with _one_thread_per_op(), ThreadPoolExecutor(workers, "octomoe") as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            # Also on Ctrl-C: what runs ends, nothing new begins.
            stop.set()


def gather(jobs: Sequence[Job], workers: int, on_bytes: OnBytes) -> None:
    """Run jobs that write nothing."""

    def refuse(name: str, data: Tensor, offset: int = 0) -> None:
        raise AssertionError("a gathering job writes nothing")

    def tasks() -> Iterator[Callable[[], None]]:
        for job in jobs:

            def task(job: Job = job) -> None:
                job.run(refuse)
                on_bytes(job.num_bytes)

            yield task

    run_all(tasks(), workers)


def write_shards(
    shards: Sequence[Shard], destination: Destination, workers: int, on_bytes: OnBytes
) -> None:
    """Write shards; each gets its name when its last job is done."""
    open_shards: list[_OpenShard] = []

    def tasks() -> Iterator[Callable[[], None]]:
        for shard in shards:
            opened = _OpenShard(shard, destination)
            open_shards.append(opened)
            if not opened.num_left:
                opened.finish()
            for group in shard.groups:
                for job in group.jobs:

                    def task(job: Job = job, opened: _OpenShard = opened) -> None:
                        opened.run(job)
                        on_bytes(job.num_bytes)

                    yield task

    try:
        run_all(tasks(), workers)
    finally:
        for opened in open_shards:
            opened.close()


class _OpenShard:
    """A shard in work, and how many of its jobs are left."""

    def __init__(self, shard: Shard, destination: Destination) -> None:
        self._shard, self._destination = shard, destination
        self._writer = ShardWriter(destination.path / shard.name, shard.tensors)
        self._lock = threading.Lock()
        self._outcome = Outcome()
        self._is_open = True
        self.num_left = sum(len(group.jobs) for group in shard.groups)

    def run(self, job: Job) -> None:
        outcome = job.run(self._writer.write)
        with self._lock:
            self._outcome.merge(outcome)
            self.num_left -= 1
            is_last = self.num_left == 0
        if is_last:
            self.finish()

    def finish(self) -> None:
        self._destination.record(self._shard, self._outcome)
        self._is_open = False
        self._writer.finish()

    def close(self) -> None:
        if self._is_open:
            self._writer.abandon()


@contextmanager
def _one_thread_per_op() -> Iterator[None]:
    """Threads work side by side on tensors; inside one, a second thread would only disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
