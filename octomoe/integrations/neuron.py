"""AWS Neuron: a state dict in NxD Inference's names and layout, with its experts in 8 bits.

NxD Inference hands every state dict it loads to `convert_hf_to_neuron_state_dict`. To override it
is all that is needed, for unquantised sources, OctoMoE's targets and Neuron's own layout alike:

    class OctoQwen3Moe(NeuronQwen3MoeForCausalLM):
        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict, config):
            return convert_state_dict(state_dict, config)

Sources: neuronx-distributed-inference, models/application_base.py and models/qwen3_moe;
neuronx-distributed, quantization/quantize.py and modules/moe/expert_mlps_v2.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from octomoe.checkpoint.families import load_families, text_configs
from octomoe.checkpoint.header import DTYPE_NAMES, TORCH_DTYPES, Entry
from octomoe.checkpoint.names import Family, find_family, matches
from octomoe.checkpoint.neuron import neuron_config, neuron_family
from octomoe.checkpoint.options import Options, with_expert_scale
from octomoe.checkpoint.plan import make_plan
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.schemes import NEURON_TYPES
from octomoe.checkpoint.source import Checkpoint
from octomoe.errors import refusal

StateTensors = Mapping[str, Tensor]


def convert_state_dict(
    state_dict: StateTensors,
    config: Any,
    *,
    expert_wise_scale: bool | None = None,
    ep_degree: int = 1,
    tp_degree: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Turn a model's state dict into Neuron's names and layout, with its experts in 8 bits.

    ``gate_up_proj [E, D, 2F]`` and ``down_proj [E, F, D]`` hold ``w / scale``, scales are float32
    ``[E, 1, 2F]`` and ``[E, 1, D]``, or ``[1, 1, ...]`` and common to all experts. Same bytes as
    `octomoe.convert_checkpoint` with target ``neuron``.

    Args:
        state_dict: name -> tensor as in Hugging Face's checkpoint, with or without ``model.`` in
            front: unquantised, or quantised as `config` says.
        config: dict, Transformers' config or NxD Inference's. Its ``moe_intermediate_pad_size`` is
            NxD's: how much of its ``moe_intermediate_size`` is padding.
        expert_wise_scale: whether every expert has its own scales. None: as this model's own config
            says (``expert_wise_scale``, there or in its ``neuron_config``; else
            ``neuron_config.quantization_type``), or true.
        ep_degree: ranks that share the experts. The result holds all experts, NxD deals them out.
        tp_degree: adds the ``rank_util.rank`` tensors that NxD Inference's models read. None: that
            of ``neuron_config``, if there is one.
        options: of `octomoe.checkpoint.options.Options`: ``weights_scale``, ``all_linears``, ...

    Returns:
        Neuron's state dict. `state_dict` itself if the model has no experts.

    Raises:
        ValueError: the experts cannot be dealt out so, Neuron has no model of the family, or the
            state dict does not fit `config`.
    """
    stated = _as_dict(config)
    family = _moe_family(state_dict, stated)
    if family is None:
        return state_dict if isinstance(state_dict, dict) else dict(state_dict)
    is_wise = _is_expert_wise(stated) if expert_wise_scale is None else expert_wise_scale
    if ep_degree > 1 and not is_wise:
        # NxD deals out the first axis of every tensor of an experts module, the scale's too.
        needs = "expert-wise scales, which go with their experts"
        do = "turn expert_wise_scale on, or use expert parallel degree 1"
        raise ValueError(refusal("convert_state_dict", "ep_degree", f"is {ep_degree}", needs, do))
    module = neuron_family(family).experts[0]
    made = {n.rpartition(".")[2]: t for n, t in state_dict.items() if matches(n, [f"{module}.*"])}
    if made:
        check_expert_parallel(ep_degree, 1, 1, made["weight"].shape[0], is_decode=False)
        if "scale" in made and is_wise != (made["scale"].shape[0] == made["weight"].shape[0]):
            got = f"holds scales of shape {tuple(made['scale'].shape)}"
            needs = "one per expert" if is_wise else "scales common to all experts"
            do = f"set expert_wise_scale to {not is_wise}, or convert the source again"
            raise ValueError(refusal("convert_state_dict", "state_dict", got, needs, do))
        return {**state_dict, **_ranks(stated, tp_degree)}
    if padding := stated.get("moe_intermediate_pad_size"):
        options["pad_intermediate"] = stated["moe_intermediate_size"]
        stated["moe_intermediate_size"] -= padding
    stated.pop("expert_wise_scale", None)
    reader = Reader(StateDict(state_dict, stated))
    check_expert_parallel(ep_degree, 1, 1, reader.layers[0].num_experts, is_decode=False)
    made = _convert(reader, with_expert_scale(Options(target="neuron", **options), is_wise))
    return made | _ranks(stated, tp_degree)


def quantization_passes(config: Any) -> list[dict[str, Any]]:
    """The calls of NxD's `convert` that prepare a model for such a state dict, in order.

    NxD quantises a whole model one way, and knows expert-wise scales in experts only. So all but
    the experts goes first, per channel, and then the experts. Without expert-wise scales one pass
    does both.

    Args:
        config: as `convert_state_dict` takes it; ``modules_to_not_convert`` is looked up there and
            in its ``neuron_config``.

    Returns:
        Of each ``quantization_type``, and ``modules_to_not_convert`` or ``include``, never both.
    """
    stated = _as_dict(config)
    kept = list(_setting(stated, "modules_to_not_convert") or ())
    is_wise = _is_expert_wise(stated)
    written = neuron_config(is_wise=is_wise, kept=kept, linears_beside=["*expert_mlps.mlp_op*"])
    if is_wise:
        return list(written["quantization_passes"])
    return [{key: written[key] for key in ("quantization_type", "modules_to_not_convert")}]


def check_expert_parallel(
    ep_degree: int, batch_size: int, top_k: int, num_experts: int, is_decode: bool
) -> None:
    """Refuse a batch that NxD cannot decode with its experts spread over ranks.

    Where ``batch_size * top_k < num_experts``, NxD reads the chosen experts only, and it does not
    know how to across ranks: the first token would end in NotImplementedError.

    Args:
        ep_degree: ranks that share the experts.
        batch_size: tokens of a decoding step.
        top_k: experts per token.
        num_experts: experts of a layer.
        is_decode: whether this is token generation; a prompt may have any length.

    Raises:
        ValueError: NxD would refuse.
    """
    function = "check_expert_parallel"
    if num_experts % ep_degree:
        needs = f"a divisor of {num_experts}"
        raise ValueError(refusal(function, "ep_degree", f"is {ep_degree}", needs))
    if ep_degree > 1 and is_decode and batch_size * top_k < num_experts:
        least = -(-num_experts // top_k)
        got = f"is {batch_size} with {top_k} of {num_experts} experts per token"
        needs = f"{least} or more in token generation under expert parallel degree {ep_degree}"
        do = f"raise the batch to {least}, or decode with expert parallel degree 1 (tensor parallel"
        do += " experts) and keep the higher degree for prompts"
        raise ValueError(refusal(function, "batch_size", got, needs, do))


class StateDict(Checkpoint):
    """A state dict that reads like a checkpoint.

    Args:
        tensors: name -> tensor.
        config: config.json.
    """

    def __init__(self, tensors: StateTensors, config: dict[str, Any]) -> None:
        self.path, self.config, self.files = "state_dict", config, []
        self._tensors = tensors
        self.tensors = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                got = f"holds {name!r} of dtype {tensor.dtype}"
                raise ValueError(refusal("convert_state_dict", "state_dict", got, "another dtype"))
            dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            self.tensors[name] = Entry(name, dtype, shape, "", 0, tensor.nbytes)

    def json(self, name: str) -> Any:
        """None: there is no file."""
        return None

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one entry of its first axis."""
        tensor = self._tensors[name].detach().cpu()
        if index is None:
            return tensor.contiguous()
        return tensor[index].contiguous()

    def read_rows(self, name: str, index: int, parts: int) -> Tensor:
        """One of `parts` equal runs of entries of the first axis."""
        return self.read(name).chunk(parts)[index].contiguous()

    def chunks(self, name: str, size: int = 16 << 20) -> Iterator[tuple[int, Tensor]]:
        """A tensor's bytes, in one piece."""
        yield 0, self.read(name).reshape(-1).view(torch.uint8)


def _convert(reader: Reader, options: Options) -> dict[str, Tensor]:
    plan = make_plan(reader, options)
    groups = [group for shard in plan.shards for group in shard.groups]
    planned = [tensor for group in groups for tensor in group.outputs]
    made = {tensor.name: torch.empty(tensor.num_bytes, dtype=torch.uint8) for tensor in planned}

    def write(name: str, data: Tensor, offset: int = 0) -> None:
        raw = data.contiguous().reshape(-1).view(torch.uint8)
        made[name][offset : offset + raw.numel()] = raw

    for experts in plan.experts:
        for job in experts.gather_jobs:
            job.run(write)
        experts.settle()
    for group in groups:
        for job in group.jobs:
            job.run(write)
    return {t.name: made[t.name].view(TORCH_DTYPES[t.dtype]).view(t.shape) for t in planned}


def _moe_family(state_dict: StateTensors, config: Mapping[str, Any]) -> Family | None:
    """The record of the model, None if it has no experts."""
    types = {part.get("model_type") for part in (config, *text_configs(config))}
    known = [family for family in load_families() if types.intersection(family.model_types)]
    modules = [module for family in known for module in family.experts]
    modules += [family.neuron["experts"] for family in known if family.neuron]
    patterns = [f"{module}.*" for module in modules or ["*.experts"]]
    return find_family(config) if any(matches(name, patterns) for name in state_dict) else None


def _is_expert_wise(config: Mapping[str, Any]) -> Any:
    own = _setting(config, "expert_wise_scale")
    return _setting(config, "quantization_type") != NEURON_TYPES[False] if own is None else own


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """An entry of the config, or of the ``neuron_config`` in it."""
    own = config.get(key)
    return _as_dict(config.get("neuron_config")).get(key) if own is None else own


def _as_dict(config: Any) -> dict[str, Any]:
    """A config of whatever class as a new dict, and so the configs in it; {} for None."""
    inner = ("neuron_config", "quantization_config", "text_config")
    if not isinstance(config, Mapping):
        config = config.to_dict() if hasattr(config, "to_dict") else vars(config) if config else {}
    return {k: _as_dict(v) if k in inner else v for k, v in config.items()}


def _ranks(config: Mapping[str, Any], tp_degree: int | None) -> dict[str, Tensor]:
    """What NxD Inference's models look up to know their rank."""
    degree = _setting(config, "tp_degree") if tp_degree is None else tp_degree
    if not degree:
        return {}
    modules = ["", *(f"layers.{n}.self_attn." for n in range(config["num_hidden_layers"]))]
    return {f"{m}rank_util.rank": torch.arange(degree, dtype=torch.int32) for m in modules}
