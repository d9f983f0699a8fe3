"""One delta for several prompts: each method computes what its equation says."""

from dataclasses import replace

import pytest
import torch
from checks import assert_same_change, full_change, token_generator
from families import talking
from torch.testing import assert_close

from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.normalised import NormalisedTokenGenerator
from prosg_lib.generators.several_prompts import (
    METHODS,
    RIDGE,
    append_prompt,
    common_part,
    delta_of_prompts,
    joint_delta,
    ridge_delta,
)

TEXTS = ["My home town is Oslo. My pet is a parrot.", "I play the flute.", "My favourite colour is blue."]


@pytest.fixture
def generator(lm):
    return token_generator(lm)


def deltas_of(lm, generator, texts):
    return [generator.memorize(lm, [f"User: {text}\n"]) for text in texts]


def test_adding_and_concatenating_give_the_same_change(lm, generator):
    """The sum of the prompts' own deltas, with the rank of one of them or of all."""
    added, beside = (joint_delta(method, lm, generator, TEXTS) for method in ("add", "concatenate"))
    expected = sum(deltas_of(lm, generator, TEXTS))
    assert_same_change(added, expected)
    assert_same_change(beside, expected)
    assert (added.rank, beside.rank) == (3, 9)
    assert (added.batch, beside.batch) == (1, 1)
    assert added.nbytes() == generator.memorize(lm, [TEXTS[0]]).nbytes() == beside.nbytes() / 3


def test_the_common_part_is_counted_once(lm, generator):
    """It is the mean of the given prompts' deltas; a sum of three contains two copies fewer."""
    few = ["My pet is a dog.", "My sport is rowing."]
    common = common_part(lm, generator, few)
    first, second = deltas_of(lm, generator, few)
    assert_same_change(common, (first + second).scaled(0.5))
    for method, rank in (("add", 3), ("concatenate", 12)):
        found = joint_delta(method, lm, generator, TEXTS, common)
        assert_same_change(found, sum(deltas_of(lm, generator, TEXTS)) + common.scaled(-2.0))
        assert found.rank == rank
        assert_same_change(joint_delta(method, lm, generator, TEXTS[:1], common), *deltas_of(lm, generator, TEXTS[:1]))


def random_changes(rows, rank=4, out=6, width=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    u = torch.randn(rows, out, rank, generator=g, dtype=dtype)
    v = torch.randn(1, width, rank, generator=g, dtype=dtype)
    return LowRankDelta({"a": Factors(u, v)}, "model", 0.1)


def test_a_ridge_solves_the_normal_equations_of_the_weights():
    """MALMEN's S = (sum_i S_i K_i K_i^T) (sum_i K_i K_i^T + e^lambda I)^-1, in x in, for an orthonormal V and
    keys in its span: the factored form, r x r, gives the same change with the same ridge."""
    each = random_changes(3)
    u, v = each.factors["a"]
    v = torch.linalg.qr(v)[0]
    each = replace(each, factors={"a": Factors(u, v)})
    x = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = x @ v
    x = keys @ v.mT  # in the span of V
    squares = (x.mT @ x).sum(0)
    weight = 0.2 * torch.trace(squares) / 4  # the mean eigenvalue of the r that are not 0
    changes = u @ v.mT
    wanted = (changes @ (x.mT @ x)).sum(0) @ torch.linalg.inv(squares + weight * torch.eye(9, dtype=torch.float64))
    found = ridge_delta(each, {"a": keys}, 0.2)
    assert_close(full_change(found, "a")[0], 0.1 * wanted, rtol=1e-9, atol=1e-12)
    assert (found.batch, found.rank) == (1, 4)


def test_a_ridge_is_the_least_squares_minimum():
    """The gradient of sum ||U k - U_i k||^2 + e^lambda ||U||^2 is zero there."""
    each, keys = random_changes(3), torch.randn(3, 5, 4, dtype=torch.float64)
    u = ridge_delta(each, {"a": keys}, 0.3).factors["a"].U.requires_grad_()
    weight = 0.3 * (keys.mT @ keys).sum(0).diagonal().mean()
    errors = keys @ u.mT - keys @ each.factors["a"].U.mT
    gradient = torch.autograd.grad(errors.square().sum() + weight * u.square().sum(), u)[0]
    assert gradient.abs().max() < 1e-10


def test_limits_of_the_ridge():
    """One prompt keeps its change; the same prompt twice gives it once; as lambda goes to infinity, U vanishes as
    sum_i U_i A_i / e^lambda."""
    each = random_changes(2)
    twice = each.select([0, 0])
    keys = torch.randn(2, 7, 4, dtype=torch.float64)
    assert_close(ridge_delta(each.select([0]), {"a": keys[:1]}, 1e-12).factors["a"].U, each.factors["a"].U[:1])
    same = {"a": keys[:1].expand(2, -1, -1)}
    assert_close(ridge_delta(twice, same, 1e-12).factors["a"].U, each.factors["a"].U[:1])
    squares = keys.mT @ keys
    weight = 1e9 * squares.sum(0).diagonal().mean()
    found = ridge_delta(each, {"a": keys}, 1e9).factors["a"].U[0]
    assert_close(found * weight, (each.factors["a"].U @ squares).sum(0), rtol=1e-7, atol=1e-9)
    assert found.abs().max() < 1e-6


def test_keys_are_the_ones_written_under(lm, generator, prompts):
    """A token-wise generator's include K z_t; every other's are the inputs read along V. They are zero at padding."""
    ids, valid = lm.encode_prompts(prompts)
    found = generator.prompt_keys(lm, ids, valid)
    plain = Generator.prompt_keys(generator, lm, ids, valid)
    final = FinalStateGenerator(lm, 3, 8, ("att.output", "ffn.key")).eval()
    final.V = generator.V
    for name in generator.names:
        assert_close(final.prompt_keys(lm, ids, valid)[name], plain[name])
        assert (found[name] - plain[name][:, :-1]).abs().max() > 1e-3
        assert not found[name][~valid[:, :-1]].any()
        assert not plain[name][~valid].any()
    for row, prompt in enumerate(prompts):
        alone = generator.prompt_keys(lm, torch.tensor([prompt]))
        for name in generator.names:
            assert_close(found[name][row][valid[row, :-1]], alone[name][0], rtol=1e-4, atol=1e-5)


def test_ridge_with_a_generator(lm, generator):
    """As small as one prompt's delta, and what the equations say of all prompts' own keys."""
    found, lines = joint_delta("ridge", lm, generator, TEXTS), [f"User: {text}\n" for text in TEXTS]
    each = generator.memorize(lm, lines)
    assert_same_change(found, ridge_delta(each, generator.prompt_keys(lm, *lm.encode_prompts(lines)), RIDGE))
    assert found.nbytes() == each.nbytes()


def test_rederiving_is_reading_one_line(lm, generator):
    """Prompt after prompt gives the delta of one prompt that says it all, however long (some of it is read in pieces).
    A memory that was continued is unchanged."""
    for texts in (TEXTS, 12 * TEXTS):
        (whole,) = deltas_of(lm, generator, [" ".join(texts)])
        assert_same_change(joint_delta("rederive", lm, generator, texts), whole)
        line = f"User: {' '.join(texts)}\n"
        assert_same_change(generator.delta_of(generator.read_text(lm, line)), whole)
    assert len(lm.tokenizer.encode(line)) > 256
    first = append_prompt(lm, generator, TEXTS[0])
    before = delta_of_prompts(lm, generator, first)
    more = append_prompt(lm, generator, f"  {TEXTS[1]}\n", first)
    assert_same_change(delta_of_prompts(lm, generator, first), before)
    assert_same_change(delta_of_prompts(lm, generator, more), *deltas_of(lm, generator, [" ".join(TEXTS[:2])]))


def test_what_is_remembered_is_a_message_where_a_model_has_a_template():
    """Each text one of its own, as the template writes it in mid-conversation; the same read as one, and added."""
    lm = talking()
    torch.manual_seed(0)
    generator = NormalisedTokenGenerator(lm, 3, 24, ("o_proj",))
    torch.nn.init.normal_(generator.heads["model_layers_1_self_attn_o_proj"].weight)
    one = append_prompt(lm, generator, TEXTS[0])
    both = append_prompt(lm, generator, TEXTS[1], one)
    written = [f"[user] {text}\n" for text in TEXTS[:2]]
    assert_same_change(delta_of_prompts(lm, generator, one), generator.memorize(lm, written[:1]))
    assert_same_change(delta_of_prompts(lm, generator, both), generator.memorize(lm, ["".join(written)]))
    each = generator.memorize(lm, written)
    assert_same_change(joint_delta("add", lm, generator, TEXTS[:2]), sum(each.select([i]) for i in range(2)))


def own_directions(lm, generator):
    ridge_delta(LowRankDelta({"a": Factors(torch.ones(2, 3, 1), torch.ones(2, 3, 1))}, ""), {})


def another_kind(lm, generator):
    joint_delta("rederive", lm, FinalStateGenerator(lm, 2, 8, ("att.output",)), TEXTS)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda lm, g: joint_delta("sum", lm, g, TEXTS), "unknown method 'sum'"),
        *((lambda lm, g, method=method: joint_delta(method, lm, g, []), r"texts is \[\]") for method in METHODS),
        (lambda lm, g: joint_delta("add", lm, g, "My pet is a dog."), "give a list of at least one text"),
        (lambda lm, g: joint_delta("ridge", lm, g, ["My pet is a dog.", " "]), "none of them empty"),
        (lambda lm, g: common_part(lm, g, []), r"texts is \[\]"),
        (lambda lm, g: append_prompt(lm, g, " \n"), "nothing to remember"),
        (own_directions, "do not share their reading directions"),
        (another_kind, "a FinalStateGenerator cannot continue"),
    ],
)
def test_mistakes_are_explained(lm, generator, mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(lm, generator)
