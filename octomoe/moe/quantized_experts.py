"""Quantised experts as a torch module, to put in place of a model's own."""

import torch
from torch import Tensor, nn

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.ops.fused_moe import fused_moe


class QuantizedExperts(nn.Module):
    """The experts of a layer as a module: what `octomoe.quantize_model` puts into a model.

    Weights lie in uint8 buffers, so that moving the model moves them and casting it to another
    dtype leaves them alone.

    Args:
        experts: quantised experts.
        activation_format: format of hidden states and intermediate; None for weight-only.
        backend: passed to `octomoe.fused_moe`.
    """

    def __init__(
        self,
        experts: ExpertWeights,
        activation_format: Format | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.activation_format = activation_format
        self.backend = backend
        self.num_experts = experts.num_experts
        self.set_experts(experts)

    def set_experts(self, experts: ExpertWeights) -> None:
        """Replace the weights."""
        for name, weight in (("w13", experts.w13), ("w2", experts.w2)):
            assert isinstance(weight, QTensor)
            self.register_buffer(f"{name}_data", weight.data.view(torch.uint8))
            # Cloned: bytes can be viewed only where the last stride is 1.
            scale = weight.scale.clone(memory_format=torch.contiguous_format)
            self.register_buffer(f"{name}_scale", scale.view(torch.uint8))
        self.w13_bias: Tensor | None
        self.w2_bias: Tensor | None
        self.register_buffer("w13_bias", experts.w13_bias)
        self.register_buffer("w2_bias", experts.w2_bias)
        self._formats = {
            name: (weight.format, weight.layout)
            for name, weight in (("w13", experts.w13), ("w2", experts.w2))
            if isinstance(weight, QTensor)
        }
        self._activation = experts.activation

    @property
    def experts(self) -> ExpertWeights:
        """The weights as a value, sharing the buffers' memory."""
        return ExpertWeights(
            self._weight("w13"),
            self._weight("w2"),
            self._activation,
            self.w13_bias,
            self.w2_bias,
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, D]``, ids and weights ``[T, A]`` -> ``[T, D]``."""
        return fused_moe(
            hidden_states,
            self.experts,
            top_k_weights,
            torch.where(top_k_index < self.num_experts, top_k_index, -1),
            activation_format=self.activation_format,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes and formats, for printing the model."""
        experts = self.experts
        activations = "none" if self.activation_format is None else self.activation_format.name
        return (
            f"experts={experts.num_experts}, hidden={experts.hidden_size}, "
            f"intermediate={experts.intermediate_size}, weights={self._formats['w13'][0].name}, "
            f"activations={activations}"
        )

    def _weight(self, name: str) -> QTensor:
        format, layout = self._formats[name]
        data: Tensor = getattr(self, f"{name}_data")
        scale: Tensor = getattr(self, f"{name}_scale")
        return QTensor(
            data.view(format.element.dtype), scale.view(format.scale_dtype), format, layout
        )
