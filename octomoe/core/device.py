"""What the machine can do, as a value: asked once, passed along, overridable by argument."""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """A device's abilities.

    Attributes:
        name: what the device calls itself, e.g. ``"NVIDIA H200"``; ``"cpu"`` for a CPU.
        arch: CUDA compute capability times ten (90 for Hopper); 0 where there is none.
        sms: streaming multiprocessors; 0 where there are none.
        smem: shared memory that one block may use, in bytes.
        memory: device memory in bytes; 0 for a CPU.
        is_hip: whether the device is AMD's; `arch` is then 0 and `name` tells the chip.
    """

    name: str
    arch: int = 0
    sms: int = 0
    smem: int = 0
    memory: int = 0
    is_hip: bool = False

    @classmethod
    def of(cls, device: torch.device | str) -> Self:
        """The abilities of a device of this machine."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(name=device.type)
        properties = torch.cuda.get_device_properties(device)
        is_hip = torch.version.hip is not None
        return cls(
            name=properties.gcnArchName if is_hip else properties.name,
            arch=0 if is_hip else properties.major * 10 + properties.minor,
            sms=properties.multi_processor_count,
            smem=getattr(properties, "shared_memory_per_block_optin", 0),
            memory=properties.total_memory,
            is_hip=is_hip,
        )


@cache
def target_of(device: torch.device) -> Target:
    """The abilities of a device, asked once."""
    return Target.of(device)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device, 0 where there are none."""
    return target_of(device).sms
