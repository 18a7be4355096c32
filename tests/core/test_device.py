"""Claims: a CPU says that it has no CUDA abilities; a caller can write abilities by hand."""

import torch

from octomoe.core.device import Target


def test_a_cpu_has_no_cuda_abilities():
    assert Target.of("cpu") == Target(name="cpu", arch=0, sms=0, smem=0, memory=0, is_hip=False)
    assert Target.of(torch.device("cpu")) == Target.of("cpu")


def test_other_devices_are_named_by_their_type():
    assert Target.of("meta") == Target(name="meta")


def test_a_target_can_be_written_by_hand():
    hopper = Target("NVIDIA H200", arch=90, sms=132, smem=232448)
    assert {hopper: "tuned"}[Target("NVIDIA H200", arch=90, sms=132, smem=232448)] == "tuned"
