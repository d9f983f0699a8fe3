"""The probe: it sees the state after the prompt and a slot's words; what it names is compared token by token."""

import pytest
import torch
from tiny import assert_parts_add_up
from torch.testing import assert_close

from prosg_lib.config.sizes import Training
from prosg_lib.errors import UserError
from prosg_lib.tasks.open_wording import Level
from prosg_lib.tasks.open_world import OpenWorld, Shape
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training.state_probe import LONGEST, StateProbe, fact_batch, held, probe_draw, probe_objective

SHAPE = Shape(3, 0, 1, others=2)


@pytest.fixture(scope="module")
def data() -> OpenWorld:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"train": own_sentences("train")[:60]}), "train", tokenizer)
    return OpenWorld(tokenizer, prose, Level.named("known", "train"), 0)


@pytest.fixture
def probe(lm) -> StateProbe:
    torch.manual_seed(0)
    return StateProbe(lm.requires_grad_(False), 24).to(lm.emb.weight.dtype)


def words(ids: torch.Tensor) -> str:
    return load_tokenizer().decode(ids[ids >= 0].tolist())


def test_a_batch_has_the_facts_of_the_user(data):
    """Slots and values as tokens, each value with its full stop; nobody else's."""
    items = data.items(4, SHAPE)
    batch = fact_batch(data, items)
    for row, item in enumerate(items):
        mine = [fact for fact in item.facts if fact.who is None]
        assert [words(slot) for slot in batch.slots[row]] == [f" {fact.slot}" for fact in mine]
        assert [words(value) for value in batch.values[row]] == [f" {fact.value}." for fact in mine]
    assert batch.values.shape == (4, 3, LONGEST)


def test_only_the_state_and_the_slot_are_seen(lm, data, probe, monkeypatch):
    """With another prompt's state it answers as for that prompt; the slot's words count."""
    batch = fact_batch(data, data.items(2, SHAPE))
    probe.fit_normaliser(lm, batch.prompt, batch.prompt_valid)
    features = lm.state_features(lm.step_through(batch.prompt, None, batch.prompt_valid)[1])
    assert_close(probe.mean, features.mean(0))
    slot = lm.embed(batch.slots[:, 0, :1])[:, 0]
    assert_close(probe(features, slot)[:1], probe(features[:1], slot[:1]))
    assert not torch.allclose(probe(features, slot), probe(features.flip(0), slot))
    assert not torch.allclose(probe(features, slot), probe(features, slot.flip(0)))


def test_parts_of_a_batch_add_up(lm64, data):
    """To the loss of the whole and its gradient, though a value has two to six tokens."""
    probe = StateProbe(lm64.requires_grad_(False), 24).double()
    batch = fact_batch(data, data.items(5, SHAPE))
    assert_parts_add_up(probe_objective(lm64, probe), 0, batch, 2, probe.parameters())


def test_it_learns_what_the_state_holds(lm, data, probe):
    """By heart, of two prompts: then every fact of theirs is read off, and next to none of two others."""
    items = data.items(2, SHAPE)
    batch, loss_of = fact_batch(data, items), probe_objective(lm, probe)
    probe.fit_normaliser(lm, batch.prompt, batch.prompt_valid)
    assert held(lm, probe, data, items) == [0.0, 0.0]
    optimiser = torch.optim.Adam(probe.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss_of(0, batch).total.backward()
        optimiser.step()
    assert held(lm, probe, data, items) == [1.0, 1.0]
    assert sum(held(lm, probe, data, data.items(2, SHAPE, start=9))) < 0.5


def test_draws_have_the_sizes(data):
    """Prompts of all numbers of facts, six of which are asked for at most; the same step has the same prompts."""
    draw = probe_draw(data, Training(20, 2, 1e-3, (3, 12), (0,)))
    batches = [draw(step) for step in range(8)]
    assert {batch.slots.shape[1] for batch in batches} == {3, 6}
    assert torch.equal(draw(3).prompt, batches[3].prompt)


def test_it_is_no_generator(lm, tmp_path):
    """A checkpoint of one is refused where a generator is asked for."""
    from prosg_lib import files
    from prosg_lib.training.checkpoints import load_generator

    record = {"recipe": "rwkv4-open-probe", "version": 1, "seed": 0, "data": "", "training": {}, "course": {}}
    record |= {"module": {"kind": "probe", "width": 8}, "lm": lm.fingerprint(), "start": None}
    meta = {"kind": "generator", "record": record, "provenance": {}}
    files.save_tensors(path := tmp_path / "probe.safetensors", StateProbe(lm, 8).state_dict(), meta)
    with pytest.raises(UserError, match="reads facts off a state"):
        load_generator(str(path), lm)
