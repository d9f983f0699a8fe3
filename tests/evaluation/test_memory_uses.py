"""Uses of a memory in the weights: what is read, what is written and what is asked, with a small random model."""

import itertools

import pytest
import torch
from checks import assert_same_change, token_generator
from torch.testing import assert_close

from prosg_lib.errors import UserError
from prosg_lib.evaluation import memory_uses, open_recall
from prosg_lib.evaluation.memory_uses import instructions_by_turn, removal, rolling
from prosg_lib.tasks.open_wording import Level
from prosg_lib.tasks.open_world import OpenWorld, Shape
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data() -> OpenWorld:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"test": own_sentences("test")[:60]}), "test", tokenizer)
    return OpenWorld(tokenizer, prose, Level.named("all", "test"), 0)


@pytest.fixture
def generator(lm):
    return token_generator(lm, std=1.0)


@pytest.fixture
def raw(monkeypatch):
    """Answers instead of their scores."""
    monkeypatch.setattr(open_recall, "judged", lambda rows: rows)


def common(lm, generator):
    """Something that a memory of two prompts is to have once less."""
    return generator.memorize(lm, ["User: My hat is red.\n"])


def test_what_is_removed_was_never_there(lm, generator, data, raw):
    """Answers are those of the first prompt's change alone, exactly; with both changes they are not."""
    rows = removal(lm, generator, data, 3, 2, common(lm, generator))
    assert len(rows) == 3 * 3 * 2
    texts = rows.set_index(["memory", "about", "prompt"]).predicted
    assert texts["removed"].to_dict() == texts["never"].to_dict()
    assert texts["both"].to_dict() != texts["never"].to_dict()


def test_removal_asks_about_both_prompts(lm, generator, data, raw):
    """Each about its own; no slot is in both, so that no answer could come from the other."""
    rows = removal(lm, generator, data, 2, 6, common(lm, generator))
    gold = rows.set_index(["memory", "about", "prompt"]).gold
    items = data.items(60, Shape(6, 0, 6))
    found = [[p.value for p in item.probes] for item in items]
    for prompt in (0, 1):
        pair = []
        for about in ("kept", "second"):
            values = [right[0] for right in gold["both", about, prompt]]
            assert values == [right[0] for right in gold["never", about, prompt]]
            pair.append(items[found.index(values)])
        first, second = pair
        assert not {f.key for f in first.facts} & {f.key for f in second.facts}
    with pytest.raises(UserError, match="two prompts of 15 facts would share a slot of this level; choose 1 to 14"):
        removal(lm, generator, data, 1, 15, common(lm, generator))


class Asked:
    """In the place of `_asked`: keeps what a question would be asked with."""

    def __init__(self):
        self.given = []

    def __call__(self, lm, data, item, state, delta):
        self.given.append((item, state, delta))
        return [probe.value for probe in item.probes]


def test_a_rolling_memory_knows_all_but_the_last_turns(lm, generator, data, raw, monkeypatch):
    """Each fact is in the change or in the text since, and an age is the number of turns since it was stated. The
    controls differ in one thing each."""
    monkeypatch.setattr(memory_uses, "_asked", asked := Asked())
    rows = rolling(lm, generator, data, dialogues=2, turns=8, every=3)
    items = data.items(2, Shape(4, 0, 4))
    assert rows.groupby(["prompt", "method"]).age.apply(lambda ages: sorted(ages) == [1, 3, 5, 7]).all()
    told = [memory_uses._turns(data, item, 8) for item in items]
    for row in rows.to_dict("records"):
        said = told[row["prompt"]][0]
        ((value,),) = row["gold"]
        assert [turn for turn in range(8) if value in said[turn]] == [7 - row["age"]]

    def change(said):
        return generator.memorize(lm, [f"User: {' '.join(filter(None, said[:6]))}\n"])

    def state(lines, delta):
        return lm.derive_state([list(itertools.chain.from_iterable(lines))], delta=delta)

    assert [item for item, *_ in asked.given] == [item for item in items for _ in range(4)]
    for number, (said, lines) in enumerate(told):
        methods = dict(zip(("rolling", "carried", "cut", "wrong"), asked.given[4 * number :], strict=False))
        assert_same_change(methods["rolling"][2], change(said))
        assert_same_change(methods["wrong"][2], change(told[1 - number][0]))
        assert methods["carried"][2] is methods["cut"][2] is None
        for method, expected in {"rolling": lines[6:], "cut": lines[6:], "wrong": lines[6:], "carried": lines}.items():
            assert_close(lm.state_features(methods[method][1]), lm.state_features(state(expected, methods[method][2])))


@torch.no_grad()
def test_instructions_are_asked_turn_by_turn(lm, generator, data, raw):
    """Each answer is that of a whole pass over all that came before it, its own answers among it."""
    rows = instructions_by_turn(lm, generator, data, dialogues=1, turns=3)
    item = data.item(0, Shape(3, 3 * 40, 3, instructions=2))
    assert (rows.instructions == [item.instructions] * len(rows)).all()
    texts = rows.set_index(["method", "turn"]).predicted
    prompt, newline = data.encode_prompt(item), data.tokenizer.encode_long("\n")
    delta = generator.memorize(lm, [prompt])
    read = lm.derive_state([prompt])
    for method, (state, change) in {
        "base": (read, None),
        "repeated": (read, None),
        "prosg": (read, delta),
        "alone": (None, delta),
        "none": (None, None),
    }.items():
        text = []
        for turn, probe in enumerate(item.probes):
            text += [*item.body[40 * turn : 40 * turn + 40], *newline]
            text += prompt if method == "repeated" else []
            text += data.encode_probe(probe)[0]
            (found,) = lm.generate([text], state, change, max_new_tokens=open_recall.LONGEST)
            assert texts[method, turn + 1] == [found]
            text += data.tokenizer.encode_long(found) + newline
    assert len(texts) == 5 * 3
    assert len({str(texts[method].tolist()) for method in ("base", "repeated", "prosg", "alone", "none")}) == 5


def test_each_use_has_scores(lm, generator, data):
    """As of recall: numbers by what names a row, for every method."""
    found = removal(lm, generator, data, 1, 2, common(lm, generator))
    assert found[["memory", "about"]].drop_duplicates().shape == (6, 2)
    assert found.recall.between(0, 1).all()
    found = instructions_by_turn(lm, generator, data, dialogues=1, turns=2)
    assert found.followed.between(0, 1).all()
    assert set(found.turn) == {1, 2}
