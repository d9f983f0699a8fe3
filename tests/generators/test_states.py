"""The state generator: its delta follows from states alone, row by row, with far fewer numbers than a direct head's."""

import pytest
import torch
from checks import assert_same_change, full_change, ids_of
from torch import nn
from torch.testing import assert_close

from prosg_lib.backbones.state import Normaliser
from prosg_lib.config.sizes import StateSize
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.states import StateGenerator
from prosg_lib.training import checkpoints

MAPS = ("att.output", "ffn.key")
END = 7  # the token that ends a sentence here
ENDS = {"last": (), "sentences": (END, 11)}

each_family = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
each_kind = pytest.mark.parametrize("kind", ENDS)


def make(kind: str, lm) -> StateGenerator:
    """Small, with last layers that are not zero."""
    torch.manual_seed(0)
    generator = StateGenerator(lm, 3, 24, MAPS, terms=5, size=6, ends=ENDS[kind])
    for head in generator.heads.values():
        nn.init.normal_(head.weight)
    return generator.to(lm.emb.weight.dtype).eval()


def sentences() -> list[list[int]]:
    """Prompts of one to four sentences; one ends in the middle of a sentence, one has two ends in a row."""
    words = [ids_of(1, n, vocab=5, seed=n)[0].tolist() for n in range(12)]
    return [
        [*words[4], END, *words[6], END],
        [*words[3]],
        [*words[5], END, *words[1], 11, *words[7], END, *words[2]],
        [END, END, *words[11], 11],
    ]


def shifted(rows: list[list[int]], by: int) -> list[list[int]]:
    return [[token if token in ENDS["sentences"] else token + by for token in row] for row in rows]


@each_family
@each_kind
def test_a_row_in_a_batch_is_the_row_alone(lm64, kind):
    """Whatever the number of sentences of the others, and the padding; and so is the state."""
    generator, rows = make(kind, lm64), shifted(sentences(), 20)
    ids, valid = lm64.encode_prompts(rows)
    generator.fit_normaliser(lm64, ids, valid)
    together, state = generator(lm64, ids, valid)
    for row, prompt in enumerate(rows):
        alone, after = generator(lm64, torch.tensor([prompt]))
        assert_same_change(together.select([row]), alone, rtol=1e-8, atol=1e-10)
        assert_close(lm64.state_features(state)[row], lm64.state_features(after)[0], rtol=1e-8, atol=1e-10)
    assert_close(lm64.state_features(state), lm64.state_features(lm64.derive_state(rows)), rtol=1e-8, atol=1e-10)


def test_states_are_taken_at_the_ends_of_sentences(lm64):
    """After each sentence and after the last token: as many as there are, each that of a plain pass up to there."""
    generator, rows = make("sentences", lm64), shifted(sentences(), 20)
    features, there, _ = generator.states(lm64, *lm64.encode_prompts(rows))
    assert there.sum(1).tolist() == [2, 1, 4, 3]
    for row, prompt in enumerate(rows):
        places = [n for n, token in enumerate(prompt, 1) if token in ENDS["sentences"] or n == len(prompt)]
        expected = [lm64.state_features(lm64.derive_state([prompt[:n]]))[0] for n in places]
        assert_close(features[row, there[row]], torch.stack(expected), rtol=1e-8, atol=1e-10)


def test_the_delta_is_the_sum_of_its_terms(lm64):
    """scale U V^T with U = W sum_s sum_j z_j (K z_j)^T, state by state and term by term."""
    generator = make("sentences", lm64)
    prompt = shifted(sentences(), 20)[2]
    features, _, _ = generator.states(lm64, torch.tensor([prompt]), None)
    name, key = "blocks.1.ffn.key", "blocks_1_ffn_key"
    total = 0
    for state in features[0]:
        h = generator.inner(Normaliser(generator.mean, generator.std)(state))
        for layer in generator.trunk:
            h = h + layer(h)
        for z in generator.outer(generator.norm(h)).split(6):
            total = total + torch.outer(generator.heads[key].weight @ z, generator.keys[key].weight @ z)
    delta = generator.memorize(lm64, [prompt])
    assert len(features[0]) == 4
    assert total.norm() > 0.1
    assert_close(full_change(delta, name)[0], delta.scale * total @ generator.V[key].mT, rtol=1e-8, atol=1e-10)


@each_kind
def test_it_sees_states_and_nothing_else(lm, monkeypatch, kind):
    """Where a model that forgot its tokens gives every prompt the same states, every prompt has the same delta."""
    generator, rows = make(kind, lm), sentences()
    others = shifted(rows, 300)
    plain, other = generator.memorize(lm, rows), generator.memorize(lm, others)
    assert (full_change(plain, generator.names[0]) - full_change(other, generator.names[0])).abs().max() > 1e-3
    real = lm.step_through
    monkeypatch.setattr(lm, "step_through", lambda ids, state, valid=None: real(torch.zeros_like(ids), state, valid))
    blind = [generator.memorize(lm, found) for found in (rows, others)]
    for name in generator.names:
        assert torch.equal(full_change(blind[0], name), full_change(blind[1], name))


@each_kind
def test_the_normaliser_is_that_of_all_states_it_sees(lm, kind):
    """Padding is none of them."""
    generator, rows = make(kind, lm), shifted(sentences(), 20)
    generator.fit_normaliser(lm, *lm.encode_prompts(rows))
    ends = ENDS[kind]
    seen = [row[:n] for row in rows for n in range(1, len(row) + 1) if n == len(row) or row[n - 1] in ends]
    assert len(seen) == {"last": 4, "sentences": 10}[kind]
    features = torch.cat([lm.state_features(lm.derive_state([prompt])) for prompt in seen])
    assert_close(generator.mean, features.mean(0), rtol=1e-4, atol=1e-5)
    std = features.std(0)
    assert_close(generator.std, torch.where(std > 1e-6, std, 1.0), rtol=1e-4, atol=1e-5)


def test_factored_heads_are_far_smaller_than_direct_ones(make_lm):
    """At the width of the open world's model: less than a hundredth, for the same change."""
    lm = make_lm(width=192, layers=1)
    size = StateSize(32, 384, MAPS)
    factored = checkpoints.MODULES["states"][1](size, lm)
    direct = FinalStateGenerator(lm, 32, 384, MAPS)

    def numbers(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    assert numbers(factored.heads, factored.keys) * 100 < numbers(direct.heads)
    assert factored.out_sizes == direct.out_sizes
    assert numbers(factored) * 2 < numbers(direct)


def test_sentences_end_with_a_full_stop(lm):
    """Of the model's tokenizer, where the size asks for sentences."""
    made = {s: checkpoints.MODULES["states"][1](StateSize(2, 8, MAPS, sentences=s), lm) for s in (False, True)}
    ids, valid = lm.encode_prompts(["User: My hat is red drum. My pet is K27.\n"])
    assert made[False].states(lm, ids, valid)[0].shape[1] == 1
    assert made[True].states(lm, ids, valid)[0].shape[1] == 3
