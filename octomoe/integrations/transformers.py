"""Hugging Face Transformers 5.x: run any model's experts through OctoMoE, quantised or not.

    register()                            makes experts_implementation="octomoe" a valid choice
    quantize_model(model, weights=...)    swaps expert weights for FP8 ones, in place

A model's experts module is recognised by the attributes that Transformers' experts interface gives
it (`has_gate`, `is_transposed`, `is_concatenated`, `has_bias`), never by its name or a shape.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octomoe.core.activations import Activation, ActivationKind, LimitOn
from octomoe.core.experts import GATE_UP, ExpertWeights, interleaved
from octomoe.core.formats import FP8_EXPERT, FP8_GROUP128, FP8_TOKEN, MXFP8, Format, is_gemm_pair
from octomoe.core.qtensor import QTensor
from octomoe.errors import missing_package, refusal
from octomoe.moe.quantized_experts import QuantizedExperts
from octomoe.ops.fused_moe import fused_moe
from octomoe.ops.quantize_experts import quantize_experts
from octomoe.reference.activation_quantize import activate

logger = logging.getLogger(__name__)

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")


def register() -> None:
    """Make ``experts_implementation="octomoe"`` known to Transformers; harmless to repeat.

    Both of its registries are told, that of plain experts and that of its own FP8 experts, since a
    name that only one of them knows passes `from_pretrained` and fails in the forward pass.

    Raises:
        ImportError: Transformers is not installed or older than 5.
    """
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        install = "pip install 'octomoe[transformers]'"
        raise ImportError(missing_package("register", "transformers", "5.16", install)) from error
    ALL_EXPERTS_FUNCTIONS.register("octomoe", experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register("octomoe", fp8_experts_forward)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts function: unquantised experts of the standard interface.

    Args:
        module: the experts module.
        hidden_states: ``[T, D]``.
        top_k_index: ``[T, A]``; under expert parallelism ids past the last expert are dropped.
        top_k_weights: ``[T, A]``.

    Returns:
        ``[T, D]``. Not differentiable: a backward pass through it raises RuntimeError.
    """
    experts = _cached(module, experts_of)
    ids = _drop_sentinels(module, top_k_index)
    return fused_moe(hidden_states, experts, top_k_weights, ids)


def fp8_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts function for its own FP8 experts (`FP8Experts`).

    Activations are quantised as that module does: per 1x128 group under 128x128 weights, MXFP8
    under 1x32 weights, per token under per-tensor weights, or per tensor where its scales are
    static; of several experts' static scales the largest is used, as vLLM and SGLang do.
    """
    experts = _cached(module, fp8_experts_of)
    assert isinstance(experts.w2, QTensor)
    ids = _drop_sentinels(module, top_k_index)
    activation_format = _activation_format_of(experts)
    return fused_moe(
        hidden_states, experts, top_k_weights, ids, activation_format=activation_format
    )


def quantize_model(
    model: nn.Module,
    weights: Format | str,
    activations: Format | str | None = None,
    *,
    allow_nonfinite: bool = False,
    backend: str = "auto",
) -> nn.Module:
    """Swap the experts of a Transformers model for quantised ones, in place, layer by layer.

    Everything else (attention, routers, shared experts, embeddings) is left alone.

    Args:
        model: a loaded model, bf16, fp16 or float32.
        weights: format of the expert weights, or its name, e.g. ``"block128"``.
        activations: format of hidden states and intermediate, or its name; None for weight-only.
        allow_nonfinite: take weights that hold NaN or Inf, which then read back as NaN.
        backend: of every op.

    Returns:
        The model.

    Raises:
        ValueError: no experts are found, they hold NaN or Inf, or the two formats do not go
            together.
        NotImplementedError: the experts compute something that OctoMoE does not.
    """
    weight_format = Format.parse(weights) if isinstance(weights, str) else weights
    activation_format = Format.parse(activations) if isinstance(activations, str) else activations
    if not is_gemm_pair(weight_format, activation_format):
        assert activation_format is not None
        got = f"are {weight_format.name} x {activation_format.name}"
        needs = "scales that change at the same places along the contracted axis"
        raise ValueError(refusal("quantize_model", "weights and activations", got, needs))
    # All are looked at before any is swapped, so that a refusal leaves the model as it was.
    names = [name for name, _ in find_experts(model)]
    if not names:
        needs = "modules of Transformers' experts interface (has_gate, is_transposed, ...)"
        do = "load it with transformers 5 or newer"
        raise ValueError(
            refusal("quantize_model", "model", f"{type(model).__name__} has none", needs, do)
        )
    for name in names:
        experts = experts_of(model.get_submodule(name))
        if not allow_nonfinite:
            _check_finite(name, experts)
    for name in names:
        quantized = quantize_experts(
            experts_of(model.get_submodule(name)), weight_format, backend=backend
        )
        model.set_submodule(name, QuantizedExperts(quantized, activation_format, backend))
    return model


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to be measured.

    Attributes:
        model: the model in float32, in eval mode, its experts run by OctoMoE.
        encode: text -> token ids.
        vocab_size: entries of a prediction.
        max_sequence: the longest context, None where the configuration does not say.
        stored_bytes: bytes per weight in the checkpoint.
    """

    model: nn.Module
    encode: Callable[[str], list[int]]
    vocab_size: int
    max_sequence: int | None
    stored_bytes: int


def load_model(path: Path) -> LoadedModel:
    """Load a local checkpoint and its tokenizer on the CPU. Nothing is downloaded.

    Args:
        path: folder with config.json, safetensors and a tokenizer.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ImportError: Transformers is not installed or older than 5.
    """
    if not (path / "config.json").is_file():
        got = f"is {path}, which holds no config.json"
        needs = "a folder with a Hugging Face checkpoint"
        raise FileNotFoundError(refusal("load_model", "path", got, needs))
    register()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    stored_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="octomoe", local_files_only=True
    )
    text_config = config.get_text_config()
    return LoadedModel(
        model.eval(),
        # Not verbose: a text longer than the model's context is cut into sequences afterwards.
        lambda text: tokenizer(text, verbose=False)["input_ids"],
        text_config.vocab_size,
        getattr(text_config, "max_position_embeddings", None),
        stored_dtype.itemsize,
    )


def find_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every unquantised experts module of the standard interface."""
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in _INTERFACE):
            yield name, module


def experts_of(module: Any) -> ExpertWeights:
    """The weights of a standard experts module, arranged; shares memory where nothing moves.

    Raises:
        NotImplementedError: the module has a norm behind each expert, or an activation that
            `octomoe.Activation` cannot express.
    """
    if getattr(module, "has_post_expert_norm", False):
        got = f"{type(module).__name__} normalises each expert's output"
        needs = "experts of up-projection, activation and down-projection"
        raise NotImplementedError(refusal("octomoe experts", "module", got, needs))
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    return ExpertWeights.arrange(
        getattr(module, up_name).detach(),
        module.down_proj.detach(),
        row_order=GATE_UP if module.is_concatenated or not module.has_gate else interleaved(1),
        is_transposed=module.is_transposed,
        activation=activation_of(module),
        w13_bias=getattr(module, f"{up_name}_bias").detach() if module.has_bias else None,
        w2_bias=module.down_proj_bias.detach() if module.has_bias else None,
    )


def fp8_experts_of(module: Any) -> ExpertWeights:
    """The weights of Transformers' `FP8Experts`, as they are: nothing is requantised.

    Raises:
        NotImplementedError: weights of 4 bits, or an activation that cannot be expressed.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    w13 = _fp8_weight(module, up_name, is_fused=module.has_gate)
    w2 = _fp8_weight(module, "down_proj", is_fused=False)
    scales = [getattr(module, f"{name}_activation_scale", None) for name in (up_name, "down_proj")]
    largest = [None if s is None else s.detach().max().float().reshape(1) for s in scales]
    return ExpertWeights(
        w13, w2, activation_of(module), w13_input_scale=largest[0], w2_input_scale=largest[1]
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def activation_of(module: Any) -> Activation:
    """Recognise what an experts module computes between its GEMMs, by trying it out.

    Every candidate that the module's own constants allow is compared with the module on a grid of
    gates and ups reaching past its clamp limit.

    Raises:
        NotImplementedError: no candidate computes the same.
    """
    limits = {None} | {getattr(module, name, None) for name in ("limit", "swiglu_limit")}
    alphas = {1.0} | {getattr(module, name, None) or 1.0 for name in ("alpha", "swiglu_alpha")}
    reach = 2.0 * max((limit for limit in limits if limit), default=5.0)
    grid = torch.linspace(-reach, reach, 41, dtype=torch.float32)
    gate, up = (axis.reshape(1, -1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    h = torch.cat([gate, up], dim=1) if module.has_gate else gate
    for candidate in _candidates(module.has_gate, limits, alphas):
        if torch.allclose(activate(h, candidate), _try_out(module, gate, up), 1e-5, 1e-6):
            return candidate
    got = f"of {type(module).__name__} is none that octomoe.Activation expresses"
    needs = "silu, gelu, gelu_tanh or relu2, gated or not, with a clamp limit at most"
    do = 'keep this model on experts_implementation="grouped_mm"'
    raise NotImplementedError(refusal("octomoe experts", "activation", got, needs, do))


def _candidates(gated: bool, limits: set[float | None], alphas: set[float]) -> Iterator[Activation]:
    if not gated:
        yield from (Activation(kind, gated=False) for kind in ActivationKind)
        return
    for kind, limit, limit_on, alpha, up_offset in product(
        ActivationKind, limits, LimitOn, alphas, (0.0, 1.0)
    ):
        has_alpha = alpha == 1.0 or kind == ActivationKind.SILU
        if has_alpha and (limit is not None or limit_on == LimitOn.INPUT):
            yield Activation(kind, True, alpha, limit, limit_on, up_offset)


def _try_out(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    if not module.has_gate:
        return module.act_fn(gate)
    if getattr(module, "is_concatenated", True):
        return module._apply_gate(torch.cat([gate, up], dim=1))
    return module._apply_gate(torch.stack([gate, up], dim=2).flatten(1))


def _fp8_weight(module: Any, name: str, *, is_fused: bool) -> QTensor:
    data = getattr(module, name).detach()
    scale = getattr(module, f"{name}_scale_inv").detach()
    if data.dtype != torch.float8_e4m3fn:
        got = f"has dtype {data.dtype}"
        raise NotImplementedError(refusal("octomoe experts", name, got, "float8_e4m3fn weights"))
    if module.block_size is None:
        # One scale per expert and projection; gate and up are the two halves of the rows.
        rows = data.shape[1] // 2 if is_fused else data.shape[1]
        format = Format((1, rows, FP8_EXPERT.block[2]))
    else:
        rows, columns = module.block_size
        is_mx = scale.dtype in (torch.float8_e8m0fnu, torch.uint8)
        format = Format.parse(f"{'mxfp8' if is_mx else 'fp8'}[1,{rows},{columns}]")
    return QTensor.from_parts(data, scale, format)


def _activation_format_of(experts: ExpertWeights) -> Format:
    assert isinstance(experts.w2, QTensor)
    if experts.w13_input_scale is not None:
        return Format.parse("fp8_tensor")
    by_depth = {format.block[2]: format for format in (FP8_TOKEN, FP8_GROUP128, MXFP8)}
    depth = experts.w2.format.block[2]
    if depth not in by_depth:
        got = f"is {experts.w2.format.name}"
        raise NotImplementedError(
            refusal("octomoe experts", "down_proj", got, "scale blocks of 32, 128 or all columns")
        )
    return by_depth[depth]


def _cached(module: Any, build: Callable[[Any], ExpertWeights]) -> ExpertWeights:
    """`build(module)`, kept on the module until one of its parameters changes or moves.

    torch.compile cannot compare addresses: in a compiled graph the arrangement is traced, and
    costs nothing where the weights lie as they are needed.
    """
    if torch.compiler.is_compiling():
        return build(module)
    key = [(parameter.data_ptr(), _version(parameter)) for parameter in module.parameters()]
    kept = getattr(module, "_octomoe_experts", None)
    if kept is None or kept[0] != key:
        kept = (key, build(module))
        module._octomoe_experts = kept
    return kept[1]


def _version(parameter: Tensor) -> int:
    """How often a tensor was changed in place; 0 if it was made in inference mode."""
    return 0 if parameter.is_inference() else parameter._version


def _drop_sentinels(module: Any, top_k_index: Tensor) -> Tensor:
    if not module._is_expert_parallel:
        return top_k_index
    return torch.where(top_k_index < module.num_experts, top_k_index, -1)


def _check_finite(name: str, experts: ExpertWeights) -> None:
    for which, weight in (("w13", experts.w13), ("w2", experts.w2)):
        assert isinstance(weight, Tensor)
        is_bad_E = ~weight.isfinite().flatten(1).all(dim=1)
        if is_bad_E.any():
            bad = is_bad_E.nonzero().flatten().tolist()
            got = f"{which} of {name} holds NaN or Inf in experts {bad}"
            do = "repair the checkpoint, or pass allow_nonfinite=True"
            raise ValueError(refusal("quantize_model", "model", got, "finite weights", do))
