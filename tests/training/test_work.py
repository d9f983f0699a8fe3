"""What a recipe's training consists of: turns, practice, contexts, repeated tokens, and how many steps."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import PAIRS, TINY

from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.config import PROFILES
from prosg_lib.config.sizes import TASKS
from prosg_lib.errors import UserError
from prosg_lib.tasks.dialogue import Shape, dialogue_batch, load_dialogues
from prosg_lib.tasks.pair_sources import PEOPLE, available, pairs_of
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.training import work
from prosg_lib.training.checkpoints import new_module
from prosg_lib.training.objectives import lm_objective
from prosg_lib.training.recipes import recipe
from prosg_lib.training.work import steps_of


@pytest.fixture(autouse=True)
def no_more_data(small_world, tmp_path, monkeypatch):
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    with small_world(TINY, tmp_path / "runs"):
        yield


def llama():
    torch.manual_seed(0)
    lm = new_llama(TINY.pairs.transformer_size).eval().requires_grad_(False)
    lm.tokenizer = load_tokenizer()
    return lm


def work_of(name, profile=TINY):
    """The module of a recipe that is for a transformer, and its work."""
    made, lm = recipe(name, profile), llama()
    module = new_module(made.kind, made.size, None if made.is_model else lm)
    return module, work.work(made, profile, module, None if made.is_model else lm, 0)


@pytest.mark.parametrize(("tasks", "name"), [(PEOPLE, "llama-pairs-weights-characters-after-characters-lc-2")])
def test_all_contexts_are_seen(tasks, name, monkeypatch):
    """As many for every query, however long they are; and one step on all of them at once."""
    module, (batch_of, loss_of) = work_of(name)
    batches = [batch_of(step) for step in range(20)]
    assert {batch.context.ids.shape[1] for batch in batches} == {2}
    assert all(batch.context.valid.any(-1).all() for batch in batches)
    seen = []

    def no_step(weights):
        return sum(w.sum() for w in weights.values()) * 0

    monkeypatch.setattr(type(module), "_loss_of", lambda self, lm, contexts: seen.append(contexts) or no_step)
    loss_of(0, batches[0])
    assert [contexts.ids.shape[1] for contexts in seen] == [2]


def prose(folder, monkeypatch):
    """Texts whose last sentence breaks off before a name, as WikiText and as books; and the profile that reads them."""
    for name in ("wikitext-2", "books"):
        (folder / name).mkdir()
        for i in range(10):
            text = "".join(f"It was not far from there to Town{10 * i + j}. Nobody had come.\n\n" for j in range(10))
            (folder / name / f"{i}.txt").write_text(text)
    monkeypatch.setenv("PROSG_TEST_DATA", str(folder))
    return replace(TINY, pairs=replace(TINY.pairs, tasks=TASKS))


def test_the_reader_learns_from_sentences_that_break_off_before_a_name(tmp_path, monkeypatch):
    """And from nothing else."""
    _, (batch_of, _) = work_of("llama-reader-pairs", prose(tmp_path, monkeypatch))
    queries = [
        load_tokenizer().decode(ids[valid].tolist())
        for step in (0, 1)
        for ids, valid in zip(*batch_of(step).query, strict=True)
    ]
    assert all(re.fullmatch(r"Complete from the passage:\nIt was not far from there to Town\d+\n", q) for q in queries)


def test_a_model_that_others_trained_has_no_practice(tmp_path, monkeypatch):
    """Its tokenizer is another one, and the practice is in ours."""
    profile, seen = prose(tmp_path, monkeypatch), []
    monkeypatch.setattr(work, "PairDraw", lambda tasks, *rest: seen.append(sorted(tasks)))
    monkeypatch.setattr(work, "pairs_of", lambda *given: pairs_of("characters", "train", profile))
    made, lm = recipe("llama-reader-pairs-maps-wikitext-lc", profile), llama()
    for tokenizer in (lm.tokenizer, Tokenizer.train(["User: My pet is a parrot."], 300)):
        lm.tokenizer = tokenizer
        work.work(made, profile, new_module(made.kind, made.size, lm), lm, 0)
    assert seen == [["copied from books", "copied from wikitext-2", "wikitext"], ["wikitext"]]


def test_a_step_on_maps_learns_to_store_first(monkeypatch):
    """Repeated random tokens, more and more of them, come before the task."""
    profile = replace(TINY, pairs=replace(TINY.pairs, maps=replace(PAIRS, steps=8), repeats=6))
    made = recipe("llama-reader-pairs-maps-squad-lc", profile)
    made = replace(made, pairs=replace(made.pairs, tasks=("characters",)))
    lm = llama()
    batch_of, _ = work.work(made, profile, new_module(made.kind, made.size, lm), lm, 0)
    lengths = [batch_of(step).context.ids.shape[-1] for step in range(6)]
    assert lengths[:2] == [8, 8]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 40
    decoded = [load_tokenizer().decode(batch_of(step).query.ids[0].tolist()) for step in (5, 6)]
    assert ["Question" in text for text in decoded] == [False, True]


def test_turns():
    """A step on maps: each source of practice twice for one of a task, however many pairs it has; without practice,
    tasks alone. A model: of five turns two are the people's, two the practice's, one a task with few pairs."""
    a, b, c = (tuple(Pair(f"{name} {i}", "?", "!") for i in range(3)) for name in "abc")
    turns = work._practice_turns({"wikitext": a, "copied from one": b * 9, "copied from two": c})
    assert turns == ("wikitext", *["copied from one", "copied from two"] * 2)
    assert work._practice_turns({"reversal": a, "characters": b}) == ("characters", "reversal")
    people = ("characters", "reversal")
    assert list(work._model_turns(people)) == [(*people, *people)]
    assert list(work._model_turns((*people, "squad", "x from y"))) == [(*people, "x from y", "squad")]


def test_without_steps_there_are_those_of_an_epoch():
    """As many as there are batches in the tasks' pairs, rounded up: 10,000 pairs, 16 a step."""
    profile = replace(TINY, pairs=replace(TINY.pairs, weights=replace(PAIRS, steps=0, batch=16)))
    made = recipe("llama-pairs-weights-characters-reversal-lc", profile)
    assert steps_of(made, profile, load_tokenizer()) == 625


@pytest.mark.parametrize("name", ["llama-dialogue", "llama-suite"])
def test_a_transformer_begins_with_repeated_tokens(name):
    """The same number of examples; afterwards the recipe's own data."""
    made, model = recipe(name, TINY), llama().requires_grad_(True)
    made = replace(made, repeats=1)
    batch_of, loss_of = work.work(made, TINY, model, None, 0)
    first, second = batch_of(0), batch_of(1)
    assert (type(first).__name__, len(first)) == ("PairBatch", made.training.batch)
    assert type(second).__name__ != "PairBatch"
    for step, batch in enumerate((first, second)):
        assert torch.isfinite(loss_of(step, batch).total)


def test_fused_attention_trains_to_the_same():
    """The loss and its gradient are those of eager attention, padding included."""
    data = load_dialogues("train", 0)
    batch = dialogue_batch(data, data.items(3, Shape(2, 0, 2, instructions=1)))
    found = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        lm = new_llama(PROFILES["smoke"].pairs.transformer_size)
        lm.model.set_attn_implementation(attention)
        loss = lm_objective(lm)(0, batch).total
        loss.backward()
        found.append((loss, [p.grad for p in lm.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_training_looks_as_far_back_as_results_are_quoted():
    """Of every profile but smoke some texts have 1,024 tokens between prompt and question; the transformer's width and
    layers are those of the recurrent model."""
    for name in ("smoke", "cpu", "gpu", "paper"):
        profile = PROFILES[name]
        size = profile.pairs.transformer_size
        assert (size.width, size.layers) == (profile.model.width, profile.model.layers)
        assert name == "smoke" or max(profile.transformer_training.distances) >= 1024


def test_dialogues_are_in_the_models_own_tokens():
    """With a tokenizer of fewer merges a prompt takes more tokens, and says the same."""
    tokenizer = Tokenizer.train(["User: My pet is a parrot."], 300)
    data = load_dialogues("train", 0, tokenizer=tokenizer)
    item = data.item(0, Shape(1, 0, 1))
    assert tokenizer.decode(data.encode_prompt(item)) == item.prompt
    assert len(data.encode_prompt(item)) > len(load_dialogues("train", 0).encode_prompt(item))


def test_tasks_that_a_profile_or_machine_lacks():
    assert available("characters", TINY)
    assert not available("wikitext", TINY)
    for task, profile, message in (
        ("wikitext", TINY, "wikitext is not a task of tiny"),
        ("riddles", TINY, "unknown task 'riddles'; there are characters, reversal"),
        ("squad", PROFILES["cpu"], "the data of squad are not here; set PROSG_TEST_DATA"),
    ):
        with pytest.raises(UserError, match=message):
            pairs_of(task, "test", profile)
