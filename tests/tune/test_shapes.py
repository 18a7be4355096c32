"""Claims: the models' layers are in order, those taken from Transformers are what it says, and each
is shared by up to eight GPUs.
"""

import pytest

from octomoe.checkpoint.families import find_family
from octomoe.tune.candidates import KNOWN_TARGETS, candidates
from octomoe.tune.kinds import SCALES
from octomoe.tune.shapes import NUM_GPUS, Owner, layers_of, model_shapes

MODELS = model_shapes()
NAMES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_choices": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"),
    "width": ("moe_intermediate_size", "intermediate_size"),
    "depth": ("hidden_size",),
}


def test_every_model_is_named_once_and_its_sizes_make_sense():
    assert len({model.name for model in MODELS}) == len(MODELS)
    for model in MODELS:
        assert 0 < model.num_choices <= model.num_experts
        assert model.width % 32 == model.depth % 32 == 0
        assert model.source in ("config.json", "transformers")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_library_knows_the_models_family(model):
    assert find_family({"model_type": model.model_type}) is not None


@pytest.mark.parametrize(
    "model", [model for model in MODELS if model.source == "transformers"], ids=lambda m: m.name
)
def test_sizes_from_transformers_are_what_it_says(model):
    transformers = pytest.importorskip("transformers")
    if model.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version has no {model.model_type}")
    config = transformers.CONFIG_MAPPING[model.model_type]().get_text_config().to_dict()
    for size, names in NAMES.items():
        known = [config[name] for name in names if config.get(name) is not None]
        assert getattr(model, size) == known[0], size


@pytest.mark.parametrize("scales", SCALES)
def test_a_layer_for_every_number_of_gpus(scales):
    layers = layers_of(MODELS, scales)
    whose = "; ".join(owner.whose for owner in layers.values())
    for model in MODELS:
        for count in NUM_GPUS:
            assert f"{model.name}, {count} GPU" in whose
    for key in layers:
        assert candidates(key, 8192, KNOWN_TARGETS[0])


def test_shares_are_padded_to_whole_scales():
    (model,) = [model for model in MODELS if model.name == "gpt-oss-20b"]
    assert [key.width for key in layers_of([model], "block")] == [2880, 1536, 768, 384]
    assert [key.width for key in layers_of([model], "late")] == [2880, 1440, 720, 368]


def test_layers_of_several_models_are_listed_once():
    (owner,) = layers_of([MODELS[0], MODELS[0]], "block", [1]).values()
    assert owner == Owner("Qwen3-30B-A3B, 1 GPU; Qwen3-30B-A3B, 1 GPU", has_shared=False)


def test_every_token_chooses_a_shared_expert():
    owners = layers_of(MODELS, "block").values()
    assert all(owner.has_shared == ("shared" in owner.whose) for owner in owners)
