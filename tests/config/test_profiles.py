"""Profiles: which sizes have to fit each other, and whose models each has."""

from dataclasses import asdict

import pytest

from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import memory_tests
from prosg_lib.tasks.problems import Material
from prosg_lib.tasks.suite import settings
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.text.tokenizer import load_tokenizer

ASKED = {"": {"name", "models_of", "evaluation", "forgetting"}, "pairs": {"items", "fewer"}}
ASKED["pretrained"] = {"prompts", "distances"}
"""The sizes that no training depends on; the first ones are a profile's own, the others of a part of it."""


def trained(profile: str) -> dict:
    """The sizes that trainings depend on."""
    sizes = {name: value for name, value in asdict(get_profile(profile)).items() if name not in ASKED[""]}
    for part, names in ASKED.items():
        for name in names if part else ():
            del sizes[part][name]
    return sizes


def test_gpu_asks_the_cpu_profiles_models_more_and_farther():
    """All that is trained has the same sizes and the same names; items and distances are at least as many."""
    cpu, gpu = get_profile("cpu"), get_profile("gpu")
    assert trained("gpu") == trained("cpu")
    assert trained("paper") != trained("cpu")
    assert cpu.evaluation.trainings == gpu.evaluation.trainings
    assert set(cpu.evaluation.distances) < set(gpu.evaluation.distances)
    assert gpu.evaluation.other_prompts > cpu.evaluation.other_prompts
    assert gpu.forgetting.items >= 200 > cpu.forgetting.items
    for name, cells in cpu.forgetting.cells.items():
        assert set(cells) <= set(gpu.forgetting.cells[name])


@pytest.mark.parametrize("profile", PROFILES)
def test_the_transformer_has_places_for_every_established_test(profile):
    """Of the profile, with the memory read twice; one token more than it has places for is refused. Nothing is left out
    for the shipped models' vocabulary, and except in `smoke` MQAR has the published sizes."""
    lm, tokenizer = new_llama(get_profile("smoke").pairs.transformer_size).with_kv_cache(), load_tokenizer()
    material = Material(tokenizer, ProseTokens.of(load_prose(), "test", tokenizer))
    cells, left_out = settings(get_profile(profile).forgetting, tokenizer.vocab)
    assert not left_out
    assert profile == "smoke" or get_profile(profile).forgetting.mqar == ((64, 4), (128, 8), (256, 16), (512, 64))
    problems = [cell.problem(material, "test", 0, number) for cell in cells for number in range(3)]
    memory_tests._check_room(lm, problems)
    lm.model.config.max_position_embeddings = max(2 * len(p.memory) + len(p.rest) for p in problems) - 1
    with pytest.raises(UserError, match="with the memory repeated, but this model reads"):
        memory_tests._check_room(lm, problems)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_wrong_context_is_never_one_of_the_right(profile):
    """Where starts are asked with many contexts there are twice as many items, so that others' are left."""
    sizes = get_profile(profile).pairs
    assert 2 * max(sizes.many) <= sizes.fewer <= sizes.items
