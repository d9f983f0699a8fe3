"""Recall in a model's own format: every method is asked the same, from its own state and change."""

import pandas as pd
import pytest
import torch
from families import talking

from prosg_lib.evaluation import conversation_recall
from prosg_lib.evaluation.conversation_recall import METHODS, answers, judged, prose_losses, table
from prosg_lib.generators.normalised import NormalisedStatic, NormalisedTokenGenerator
from prosg_lib.tasks.conversations import READING, Conversation, Question, chat
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences

SAID = [
    Conversation("My pet is a parrot.", (Question("What is my pet?", ("parrot", "a parrot")),)),
    Conversation("I live in Oslo. I am Ada.", (Question("Town?", ("Oslo",)), Question("Name?", ("Ada",)))),
    Conversation("It rains.", (Question("Weather?", ("rain",)),)),
]
MAPS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def lm():
    return talking(64)


@pytest.fixture(scope="module")
def generators(lm):
    torch.manual_seed(0)
    made = {"token": NormalisedTokenGenerator(lm, 3, 24, MAPS), "static": NormalisedStatic(lm, 3, MAPS)}
    for generator in made.values():
        for p in generator.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.3)
        generator.eval()
    return made


@pytest.fixture(scope="module")
def prose(lm):
    return ProseTokens.of(Prose("own", {"test": own_sentences("test")[:40]}), "test", lm.tokenizer)


@pytest.mark.parametrize("reading", [True, False])
def test_every_method_is_asked_from_where_it_stands(lm, generators, prose, reading):
    """As one question at a time says; the text is the same for all; two prompts are read at a time."""
    form, encode = READING if reading else chat(lm.tokenizer), lm.tokenizer.encode
    rows = answers(lm, generators, METHODS, SAID, prose, (0, 80), form, at_once=2)
    assert len(rows) == len(METHODS) * 2 * len(SAID)
    found = rows.set_index(["method", "distance", "prompt"]).predicted
    opening = list(encode(form.opening))
    read = list(encode(form.prompt(SAID[1].prompt)))
    delta = generators["token"].memorize(lm, [read])
    state = lm.derive_state([read])
    plain = lm.derive_state([opening + read])
    for number, question in enumerate(SAID[1].questions):
        asked = list(encode(form.question(question.text)))
        for method, begin, change, before in (
            ("none", None, None, opening),
            ("base", plain, None, []),
            ("repeated", plain, None, opening + read),
            ("prosg-token", state, delta, []),
            ("alone", None, delta, []),
            ("static", None, generators["static"].memorize(lm, [read]), []),
        ):
            (expected,) = lm.generate([before + asked], begin, change, max_new_tokens=conversation_recall._TOKENS)
            assert found[method, 0, 1][number] == expected, method
    assert found["none", 80, 1] != found["base", 0, 1]
    other = generators["token"].memorize(lm, [list(encode(form.prompt(SAID[0].prompt)))])
    asked = list(encode(form.question(SAID[1].questions[0].text)))
    (expected,) = lm.generate([asked], None, other, max_new_tokens=conversation_recall._TOKENS)
    assert found["wrong-alone", 0, 1][0] == expected


def test_how_answers_are_judged():
    rows = pd.DataFrame(
        [
            {
                "method": "base",
                "distance": 0,
                "prompt": 0,
                "gold": [["Mrs. Oduya", "Oduya"], ["8:55"], ["sesame"], ["2.65"]],
                "predicted": ["mrs. oduya.", "At 8:55 the gate is locked.", "I don't know", "12.65"],
            },
            {"method": "base", "distance": 0, "prompt": 1, "gold": [["a coat", "coat"]], "predicted": ["The coat!"]},
        ]
    )
    found = judged(rows)
    assert found.exact.tolist() == [0.25, 1.0]
    assert found.contained.tolist() == [0.5, 1.0]
    (row,) = table(found).to_dict("records")
    assert row == {"method": "base", "distance": 0, "exact": 0.4, "contained": 0.6, "questions": 5}


def test_prose_is_the_same_for_every_method(lm, generators, prose):
    """And its loss is the model's own where nothing is changed."""
    plain = prose_losses(lm, generators, "none", SAID, prose, 24, at_once=2)
    changed = prose_losses(lm, generators, "alone", SAID, prose, 24, at_once=2)
    assert plain.shape == changed.shape == (3,)
    assert (plain != changed).all()
    again = prose_losses(lm, generators, "none", SAID, prose, 24, at_once=2)
    assert (plain == again).all()
