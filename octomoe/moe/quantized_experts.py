"""Quantised experts as a torch module, to put in place of a model's own."""

import torch
from torch import Tensor, nn

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.ops.fused_moe import fused_moe


class QuantizedExperts(nn.Module):
    """The experts of a layer as a module: what `octomoe.quantize_model` puts into a model.

    Weights lie in uint8 buffers, so that moving the model moves them and casting it to another
    dtype leaves them alone.

    Args:
        experts: quantised experts, with biases and static input scales if they have them.
        activation_format: format of hidden states and intermediate; None for weight-only.
        backend: passed to `octomoe.fused_moe`.
    """

    w13_bias: Tensor | None
    w2_bias: Tensor | None

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
        self._activation = experts.activation
        self._formats: dict[str, tuple[Format, ScaleLayout]] = {}
        for name in ("w13", "w2"):
            weight = getattr(experts, name)
            if not isinstance(weight, QTensor):
                do = "use octomoe.quantize_experts"
                raise TypeError(
                    refusal("QuantizedExperts", name, "is not quantised", "a QTensor", do)
                )
            self._formats[name] = (weight.format, weight.layout)
            self.register_buffer(f"{name}_data", weight.data.view(torch.uint8))
            self.register_buffer(f"{name}_scale", _as_bytes(weight.scale))
            self.register_buffer(f"{name}_bias", getattr(experts, f"{name}_bias"))
            input_scale = getattr(experts, f"{name}_input_scale")
            input_bytes = None if input_scale is None else _as_bytes(input_scale.reshape(1))
            self.register_buffer(f"{name}_input_scale", input_bytes)

    @property
    def experts(self) -> ExpertWeights:
        """The weights as a value, sharing the buffers' memory."""
        return ExpertWeights(
            self._weight("w13"),
            self._weight("w2"),
            self._activation,
            self.w13_bias,
            self.w2_bias,
            self._input_scale("w13"),
            self._input_scale("w2"),
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
        data, scale = self.get_buffer(f"{name}_data"), self.get_buffer(f"{name}_scale")
        return QTensor(
            data.view(format.element.dtype), scale.view(format.scale_dtype), format, layout
        )

    def _input_scale(self, name: str) -> Tensor | None:
        scale: Tensor | None = getattr(self, f"{name}_input_scale")
        return None if scale is None else scale.view(torch.float32)


def _as_bytes(scale: Tensor) -> Tensor:
    """A copy as uint8; a copy, since bytes can be viewed only where the last stride is 1."""
    return scale.clone(memory_format=torch.contiguous_format).view(torch.uint8)
