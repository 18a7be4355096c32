"""TransformerEngine's Triton row-id map, without an installed TransformerEngine.

Of a checkout two files are read: ``transformer_engine/pytorch/triton/permutation.py``, the
launchers, and ``transformer_engine/common/triton/permutation.py``, their kernels. Tried with
2.20.0.dev0 (d0067d0). Three launches turn a mask ``[T, E]`` into ``[T, 2E + 1]``: rows of a token's
experts, those experts, and how many they are.
"""

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

_KERNELS: Final = "transformer_engine.common.triton.permutation"
_LAUNCHERS: Final = "transformer_engine.pytorch.triton.permutation"


@dataclass(frozen=True, eq=False)
class Peer:
    """The loaded files.

    Attributes:
        digest: of both files, which do not say their version.
        launchers: the module with `make_row_id_map`.
    """

    digest: str
    launchers: ModuleType


def load(path: Path) -> Peer:
    """Import the launchers' file and, from the same checkout, the kernels'."""
    kernels = path.resolve().parents[2] / "common" / "triton" / "permutation.py"
    for package in ("", ".common", ".common.triton"):
        # Nothing of the package itself is run.
        sys.modules.setdefault(f"transformer_engine{package}", ModuleType("transformer_engine"))
    _load(_KERNELS, kernels)
    digest = hashlib.sha256(kernels.read_bytes() + path.read_bytes()).hexdigest()[:12]
    return Peer(digest, _load(_LAUNCHERS, path))


def row_id_map(peer: Peer, mask_TE: Tensor) -> Tensor:
    """``[T, 2E + 1]`` of a mask on a GPU."""
    made: Tensor = peer.launchers.make_row_id_map(mask_TE, *mask_TE.shape)
    return made


def slots_of_row_id_map(row_id_map: Tensor) -> Tensor:
    """``[T, E]``: the row of every token at every expert, -1 where it has none."""
    num_experts = row_id_map.shape[1] // 2
    rows_TE, experts_TE = row_id_map[:, :-1].long().unflatten(1, (2, num_experts)).unbind(1)
    # Past a token's experts memory is as it was.
    is_held_TE = torch.arange(num_experts, device=row_id_map.device) < row_id_map[:, -1:]
    # The extra last column takes what is not held, and is cut off.
    experts_TE = torch.where(is_held_TE, experts_TE, num_experts)
    slots_TE = rows_TE.new_full((rows_TE.shape[0], num_experts + 1), -1)
    return slots_TE.scatter(1, experts_TE, rows_TE)[:, :num_experts]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks up a kernel's module by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
