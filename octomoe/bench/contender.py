"""What stands beside what: a way to compute a layer, and who brings such ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from torch import Tensor

from octomoe.bench.layers import Mode, Problem

# Of all runs, those that are no peer's. `router` is what all contenders have of the router.
OURS: Final = ("octomoe", "portable", "octomoe op", "read", "router")


@dataclass(frozen=True, eq=False)
class Contender:
    """A way to compute a layer.

    Attributes:
        run: computes it; waits for nothing, so that a CUDA graph can hold it.
        config: what it runs with, as it is recorded.
        borrowed: in words, which parts are not its owner's.
    """

    run: Callable[[], Tensor]
    config: Any = None
    borrowed: str = ""


class Peer(Protocol):
    """Someone else's kernels.

    Attributes:
        name: as it is asked for and recorded.
        version: of the package or its files.
    """

    name: str
    version: str

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """From quantised rows and sorted choices to the sum over experts, by name."""

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores to the same, by name."""
