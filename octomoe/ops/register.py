"""Register an op with torch, so that torch.compile, fake tensors and the profiler know it.

`torch.library.custom_op` would do, but it imports torch's compiler when an op first runs: 1.7 s on
the machine of the CPU benchmarks, a third of a conversion.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from octomoe.errors import refusal

_LIBRARY: Final = torch.library.Library("octomoe", "FRAGMENT")  # type: ignore[no-untyped-call]


class RegisteredOp:
    """``torch.ops.octomoe.<name>``, to be called.

    Args:
        name: of the op.
        run: what it does on any device: it changes no argument and returns none. Its annotations
            make the schema.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name = name
        schema = torch.library.infer_schema(run, mutates_args=())
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        self._op = getattr(torch.ops.octomoe, name).default

        def refuse_backward(context: object, *gradients: Tensor) -> None:
            needs = "a forward pass alone: it has no gradient"
            raise NotImplementedError(refusal(name, "backward", "reached this op", needs))

        torch.library.register_autograd(self._op, refuse_backward, lib=_LIBRARY)

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        return self._op(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register what gives empty outputs of the shapes, dtypes and strides of `run`'s."""
        torch.library.register_fake(self._op, fake, lib=_LIBRARY)
        return fake


def register(name: str) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Make a function the op ``octomoe::<name>``."""
    return lambda run: RegisteredOp(name, run)
