"""What may keep a peer from running: its package, the problem."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from octomoe import FP8_BLOCK128, FP8_GROUP128
from octomoe.bench.layers import Problem
from octomoe.errors import missing_package


def lacks_blocks(problem: Problem) -> str | None:
    """For those that take E4M3 in blocks of 128 x 128, and of 1 x 128, only."""
    recipe = problem.recipe
    if (recipe.weights, recipe.activations) != (FP8_BLOCK128, FP8_GROUP128):
        return "only 128 x 128 weights with 1 x 128 activations are compared"
    sizes = problem.experts.intermediate_size, problem.experts.hidden_size
    if any(size % 128 for size in sizes):
        return f"widths {sizes[0]} and {sizes[1]} are no multiples of 128"
    return None


def import_peer(module: str, package: str, floor: str, install: str) -> tuple[ModuleType, str]:
    """A peer's module and its package's version.

    Raises:
        ImportError: it is not installed, or does not import; the message says which.
    """
    name = module.split(".")[0]
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f"{package} does not import: {error}") from error
        message = missing_package("bench moe", package, floor, install)
        raise ImportError(message) from error
    try:
        return import_module(module), version(package)
    except PackageNotFoundError:
        return import_module(module), "unknown"
