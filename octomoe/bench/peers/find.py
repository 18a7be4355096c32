"""Which peers there are: those that are installed, and those whose files are given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from octomoe.bench.contender import Peer
from octomoe.bench.peers.alpha_moe import AlphaMoE
from octomoe.bench.peers.deep_gemm import DeepGEMM
from octomoe.bench.peers.flashinfer import FlashInfer
from octomoe.bench.peers.sglang import SGLang
from octomoe.bench.peers.vllm import VLLM
from octomoe.errors import refusal

_INSTALLED: Final[dict[str, Callable[[], Peer]]] = {
    AlphaMoE.name: AlphaMoE.load,
    DeepGEMM.name: DeepGEMM.load,
    VLLM.name: VLLM.load,
    FlashInfer.name: FlashInfer.load,
}
PEERS: Final = (SGLang.name, *_INSTALLED)


@dataclass(frozen=True)
class Found:
    """The peers that are here, and by name why the others are not."""

    peers: list[Peer] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def find_peers(names: Sequence[str] = (), *, sglang: Path | None = None) -> Found:
    """Look for peers.

    Args:
        names: those wanted; all if empty.
        sglang: a folder that `octomoe.bench.peers.sglang_wheel` made.

    Raises:
        ValueError: there is no peer of a name.
        FileNotFoundError: the folder holds no files of SGLang.
        ImportError: a peer that was asked for by name is not here.
    """
    for name in names:
        if name not in PEERS:
            needs = f"one of: {', '.join(PEERS)}"
            raise ValueError(refusal("bench moe", "--peer", f"is {name!r}", needs))
    found = Found()
    for name in names or PEERS:
        try:
            found.peers.append(_load(name, sglang))
        except ImportError as error:
            if names:
                raise
            found.missing[name] = str(error).removeprefix("bench moe: ")
    return found


def _load(name: str, sglang: Path | None) -> Peer:
    if name != SGLang.name:
        return _INSTALLED[name]()
    if sglang is None:
        do = "give --sglang FOLDER, made by: python -m octomoe.bench.peers.sglang_wheel"
        raise ImportError(f"bench moe: needs the kernels of sglang's wheel; {do} WHEEL FOLDER")
    return SGLang.load(sglang)
