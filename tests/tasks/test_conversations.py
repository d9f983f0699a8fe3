"""Conversations: what is asked has its answer in the prompt, in the model's own format, and fits the window."""

import random
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from families import TEMPLATE, talking

from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.tasks import conversations
from prosg_lib.tasks import open_wording as wording
from prosg_lib.tasks.conversations import READING, Conversation, ConversationDraw, Question, conversation_batch
from prosg_lib.tasks.open_wording import Level
from prosg_lib.tasks.open_world import OpenWorld, Shape, natural_prompts
from prosg_lib.tasks.pairs import Pair
from prosg_lib.tasks.squad import SquadPair
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

WINDOW = 150


@pytest.fixture(scope="module")
def world() -> OpenWorld:
    tokenizer = talking().tokenizer
    prose = ProseTokens.of(Prose("own", {"train": own_sentences("train")[:60]}), "train", tokenizer)
    return OpenWorld(tokenizer, prose, Level.named("known", "train"), 0)


def draw_of(world, turns=("open", "passages")) -> ConversationDraw:
    said = [Conversation(f"Number {i} is red.", (Question("Which colour?", ("Red.",)),)) for i in range(9)]
    return ConversationDraw(world, {"passages": said}, turns, (conversations.READING,), 3, (1, 4), 2, 2, WINDOW, 16, 0)


def test_an_open_world_prompt_is_what_the_user_says(world):
    """Without the format of the project's own dialogues; questions are the dialogue's."""
    shape = Shape(3, 0, 3, unknown=1, instructions=1)
    found, item = conversations.of_open_world(world, 5, shape), world.item(5, shape)
    assert item.prompt == f"User: {found.prompt}\n"
    assert [(q.text, q.answers, q.kind) for q in found.questions] == [
        (p.question, (p.answer,), p.kind) for p in item.probes
    ]


def test_pairs_about_one_context_are_one_conversation():
    squad = SquadPair("Ada is in Oslo.", "Question: Where is Ada?\nAnswer:", "Oslo", ("Oslo", "in Oslo"))
    pairs = [squad, Pair("Ada is in Oslo.", "Complete: Ada is in", "Oslo"), Pair("Bo is ill.", "Bo is", "ill")]
    first, second = conversations.of_pairs(pairs)
    assert first.questions == (
        Question("Where is Ada?", ("Oslo.", "Oslo", "in Oslo")),
        Question("Complete: Ada is in", ("Oslo.",)),
    )
    assert second == Conversation("Bo is ill.", (Question("Bo is", ("ill.",)),))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_as_people_write_them(split):
    rows, found = natural_prompts(split), conversations.of_people(split)
    assert [c.prompt for c in found] == [row["text"] for row in rows]
    assert [q.answers[0] for c in found for q in c.questions] == [q["answer"] for r in rows for q in r["questions"]]


def test_values_are_swapped_everywhere():
    """The same one for the same string in prompt, question and answer; nothing else changes, nor part of a word."""
    said = Conversation(
        "Ada, room 4, has 42 keys; Adam has 4.",
        (Question("What has Ada?", ("42 keys", "42")), Question("Adam?", ("4",))),
        {"Ada": "person", "4": "number", "42": "number"},
    )
    told = conversations.retold(said, random.Random(0))
    name, room, keys = re.fullmatch(r"(\w+), room (\d+), has (\d+) keys; Adam has \2\.", told.prompt).groups()
    assert name in wording.values()["person"]["train"]
    assert {room, keys} <= set(wording.values()["number"]["train"])
    assert told.questions == (Question(f"What has {name}?", (f"{keys} keys", keys)), Question("Adam?", (room,)))
    assert told == conversations.retold(said, random.Random(0)) != conversations.retold(said, random.Random(1))
    assert conversations.retold(told, random.Random(0)) is told


SAID = [
    Conversation("I am Ada.", (Question("Who am I?", ("Ada.",)), Question("Am I Bo?", ("No.",)))),
    Conversation("It rains and rains.", (Question("Rain?", ("Yes.",)),)),
]


@pytest.mark.parametrize(
    ("template", "reading", "prompt", "question", "answer"),
    [
        (TEMPLATE, True, "Text: I am Ada.\n", "Question: Who am I?\nAnswer:", " Ada\n"),
        (TEMPLATE, False, "[user] I am Ada.\n", "[user] Who am I?\n[assistant] ", "Ada.\n"),
        (None, False, "User: I am Ada.\n", "User: Who am I?\nBot:", " Ada.\n"),
    ],
)
def test_a_batch_holds_what_the_form_writes(template, reading, prompt, question, answer):
    """Every question has a row, and only answers are to be predicted."""
    tokenizer = talking().tokenizer
    tokenizer.template = template
    form = conversations.READING if reading else conversations.chat(tokenizer)
    batch = conversation_batch(tokenizer, form, SAID, [[1, 2], [3, 4]])
    assert tokenizer.decode(batch.prompt[0][batch.valid[0]]) == prompt
    assert batch.turns.shape[:2] == batch.answer.shape[:2] == (2, 2)
    first = batch.turns[0, 0][batch.turns[0, 0] > 0]
    assert tokenizer.decode(first) == question + answer
    said = [tokenizer.decode(turn[said]) for turn, said in zip(batch.turns[0], batch.answer[0], strict=True)]
    assert said == [answer, answer.replace("Ada", "No")]
    assert batch.answer.any(-1).tolist() == [[True, True], [True, False]]
    assert batch.opening.shape[0] == 2
    assert tokenizer.decode(batch.opening[1]).startswith("Text: My bus") == reading


def test_what_a_step_draws(world):
    """The same at every call; kinds in turn, easy prompts first; no more questions than wanted, and all of it fits."""
    draw, tokenizer = draw_of(world), world.tokenizer
    for step in range(6):
        one, again = draw(step), draw(step)
        assert one.turns.equal(again.turns)
        assert one.prompt.equal(again.prompt)
        assert one.turns.shape[1] <= 2
        assert one.answer.any(-1).any(-1).all()
        assert (one.valid.sum(1) + (one.turns != 0).sum(-1).max(1).values <= WINDOW).all()
        assert one.prose.shape == (3, 16)
        passages = "Number" in tokenizer.decode(one.prompt[0])
        assert passages == (step in (2, 3))
    assert not draw(4).prompt.equal(draw(5).prompt)


def test_every_second_passage_is_conversation(world):
    """Where there is some; prompts and questions are the same without it."""
    lines = Prose("talk", {"train": ["A: Hello", "B: Hi, how are you?\n"] * 20})
    alone, draw = draw_of(world), replace(draw_of(world), talk=ProseTokens.of(lines, "train", world.tokenizer))
    for step in range(4):
        kinds = [": H" in world.tokenizer.decode(passage) for passage in draw(step).prose]
        assert kinds == [False, True, False]
        assert draw(step).turns.equal(alone(step).turns)
        assert draw(step).prompt.equal(alone(step).prompt)


def test_prompts_of_about_the_same_length_are_drawn_together(world):
    """So that little of a batch is padding."""
    said = [Conversation("rain " * n, (Question("Rain?", ("Yes.",)),)) for n in range(1, 60)]
    draw = replace(draw_of(world, ("passages",)), sources={"passages": said})
    lengths = torch.stack([draw(step).valid.sum(1) for step in range(2, 42)])  # (steps, 3)
    spread, whole = lengths.amax(1) - lengths.amin(1), int(lengths.max() - lengths.min())
    assert spread.float().mean() < 0.25 * whole  # any three would be half of the whole range apart
    assert len(lengths.float().mean(1).unique()) > 30  # short, middling and long ones have their turns


def test_some_prompts_are_asked_what_they_do_not_say(world):
    draw = draw_of(world, ("open",))
    unknown = [wording.UNKNOWN in world.tokenizer.decode(draw(step).turns.flatten()) for step in range(2, 102)]
    assert 0.02 < sum(unknown) / len(unknown) < 0.3


def test_a_prompt_that_does_not_fit_is_not_drawn(world):
    long = Conversation("rain " * 200, (Question("Rain?", ("Yes.",)),))
    short = Conversation("It rains.", (Question("Rain?", ("Yes.",)),))
    draw = draw_of(world, ("passages",))
    assert replace(draw, sources={"passages": [long, short]})(3).prompt.shape[1] < 20
    with pytest.raises(UserError, match=r"hardly any prompt of kind 'passages' fits into 150 tokens .* larger window"):
        replace(draw, sources={"passages": [long]})(3)


@pytest.mark.parametrize("source", ["values", "slots", "natural"])
def test_what_is_asked_about_by_name(source):
    """Of the split that is named, the same at every call; a prompt of the open world states five facts, all asked."""
    tokenizer, cpu = talking().tokenizer, get_profile("cpu")
    first, again = (list(islice(conversations.load(source, "validation", tokenizer, cpu), 3)) for _ in range(2))
    assert first == again
    assert len({c.prompt for c in first}) == 3
    assert first != list(islice(conversations.load(source, "test", tokenizer, cpu), 3))
    if source != "natural":
        assert all(len(c.questions) == 5 for c in first)
    for conversation in first:
        used = [
            len(tokenizer.encode(READING.question(q.text) + READING.answer(q.answers[0])))
            for q in conversation.questions
        ]
        needed = len(tokenizer.encode(READING.prompt(conversation.prompt))) + max(used)
        assert conversations.fits(conversation, tokenizer, READING, needed + 2)  # a token more, where two texts meet
        assert not conversations.fits(conversation, tokenizer, READING, needed - 3)


def test_passages_are_there_where_their_data_are(monkeypatch):
    given = talking().tokenizer, get_profile("cpu")
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    with pytest.raises(UserError, match="data of squad are not here"):
        conversations.load("passages", "validation", *given)
    with pytest.raises(UserError, match="unknown source 'poems'; there are natural, known"):
        conversations.load("poems", "validation", *given)


def test_the_projects_tokenizer_is_untouched():
    assert load_tokenizer().template is None
