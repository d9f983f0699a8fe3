"""Generators in every map's own units: they do the same whatever a model's sizes are, and leave out the first token."""

import pytest
import torch
from checks import assert_same_change
from families import rows_of, talking
from torch.testing import assert_close

from prosg_lib.generators.normalised import NormalisedStatic, NormalisedTokenGenerator
from prosg_lib.generators.token_wise import TokenGenerator

ENDINGS = ("self_attn.o_proj", "mlp.down_proj")


def make(kind, lm, seed=0):
    torch.manual_seed(seed)
    generator = kind(lm, 3, 24, ENDINGS) if kind is NormalisedTokenGenerator else kind(lm, 3, ENDINGS)
    for p in generator.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    generator.fit_normaliser(lm, *lm.encode_prompts(rows_of((30, 12))))
    return generator.eval()


@pytest.mark.parametrize("kind", [NormalisedTokenGenerator, NormalisedStatic])
def test_what_it_writes_is_in_the_maps_units(kind):
    """A map that is a hundred times larger gets a change that is a hundred times larger; an input that is a hundred
    times larger is read a hundred times less."""
    lm, larger = talking(), talking()
    larger.editable()["model.layers.1.mlp.up_proj"].weight.data.mul_(100)  # the input of down_proj
    name = "model.layers.1.mlp.down_proj"
    one, other = make(kind, lm), make(kind, larger)
    assert_close(other.reads[one.names.index(name)], 100 * one.reads[one.names.index(name)])
    assert_close(other.writes[one.names.index(name)], 100 * one.writes[one.names.index(name)])
    assert_close(other.directions(name), one.directions(name) / 100)


def test_features_have_mean_zero_and_size_one():
    lm = talking()
    generator = make(NormalisedTokenGenerator, lm)
    ids, valid = lm.encode_prompts(rows_of((30, 12)))
    hidden, _ = lm.step_through(ids, None, valid)
    seen = generator._features(hidden, lm.embed(ids))[valid & torch.roll(valid, 1, 1)]
    assert seen.std(0).median() == pytest.approx(1, abs=0.1)
    assert seen.mean(0).abs().max() < 0.5


def test_a_model_in_half_precision():
    """As on a processor that has it: the generator calculates in its own precision; little changes, and it learns."""
    lm, rows = talking().bfloat16().float(), rows_of((30, 12))
    generator = make(NormalisedTokenGenerator, lm)
    whole = generator.memorize(lm, rows)
    delta, _ = generator(lm.to(torch.bfloat16), *lm.encode_prompts(rows))
    for name, (u, _) in delta.factors.items():
        assert u.dtype == torch.float32
        assert (u - whole.factors[name].U).norm() < 0.05 * whole.factors[name].U.norm()
    lm(torch.tensor(rows_of((9, 9))), delta=delta)[0].float().sum().backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_the_first_token_is_left_out_and_the_rest_streams():
    """As the plain generator's sum over all tokens but the first; whole, padded and in pieces."""
    lm = talking()
    generator = make(NormalisedTokenGenerator, lm)
    (row,) = rows_of((30,))
    whole = generator.memorize(lm, [row])
    z, keys, _, _ = TokenGenerator._terms(generator, lm, torch.tensor([row]), None, None)
    name = generator.names[1]
    head = generator.heads[name.replace(".", "_")].weight
    expected = generator.writes[1] * head @ (z[:, 1:].mT @ keys[name][:, 1:])
    assert_close(whole.factors[name].U, expected)
    padded = generator.memorize(lm, [row, rows_of((41,), 1)[0]])
    assert_close(padded.factors[name].U[:1], whole.factors[name].U, rtol=1e-3, atol=1e-4)
    memory = None
    for piece in torch.tensor([row]).split([1, 9, 20], 1):
        memory = generator.update(lm, piece, memory)
    assert_same_change(generator.delta_of(memory), whole)
