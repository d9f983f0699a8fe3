"""Recall in the open world: hand-made answers have known scores, and a method's answers are those of one whole pass."""

import math

import pandas as pd
import pytest
from checks import token_generator

from prosg_lib.evaluation.open_recall import KINDS, LONGEST, answers, judged
from prosg_lib.tasks import open_wording as wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.open_wording import UNKNOWN, Level
from prosg_lib.tasks.open_world import OpenWorld, Shape, natural_prompts
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data() -> OpenWorld:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"test": own_sentences("test")[:60]}), "test", tokenizer)
    return OpenWorld(tokenizer, prose, Level.named("all", "test"), 0)


def scores(*questions: tuple, **row) -> dict:
    """Of one prompt, whose questions are (kind, right answers, generated answer)."""
    kinds, gold, predicted = map(list, zip(*questions, strict=True))
    known = {"method": "base", "distance": 0, "seed": 0, "prompt": 3, "facts": 6, "instructions": {}}
    known |= {"questions": [""] * len(kinds), "competing_total": 0, "competing_right": 0}
    (found,) = judged(pd.DataFrame([known | {"kinds": kinds, "gold": gold, "predicted": predicted} | row])).to_dict(
        "records"
    )
    return found


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("Fadin.", True),
        (" fadin\n", True),
        ("FADIN!", True),
        ("The Fadin.", True),
        ("a Fadin.", True),
        ('"Fadin".', True),
        ("Doctor Fadin", True),  # accepted
        ("an doctor fadin", True),
        ("Fadin Fadin.", False),
        ("the the Fadin.", False),
        ("Fad.", False),
        ("It is Fadin.", False),
        ("Fadin, Jilan.", False),
        ("The.", False),
        ("", False),
        (UNKNOWN, False),
    ],
)
def test_a_value_is_right_whatever_its_case_article_and_punctuation(generated, right):
    """And so is what may be said instead; nothing else."""
    assert scores(("fact", ["Fadin", "Doctor Fadin"], generated))["fact"] == right


def test_an_article_alone_is_a_value():
    assert scores(("fact", ["a"], "A."))["fact"] == 1
    assert scores(("fact", ["the Swan"], "Swan."))["fact"] == 1


def test_recall_is_about_what_the_prompt_states():
    """Later questions and those about what was never said count by themselves, and each kind by itself."""
    found = scores(
        ("fact", ["red drum"], "red drum."),
        ("fact", ["K27"], "K28."),
        ("other", ["Jilan"], "Jilan."),
        ("update", ["9:30"], f"{UNKNOWN}."),
        ("query", ["Fadin"], "nothing."),
        ("unknown", [UNKNOWN], "You did not tell me."),
        ("unknown", [UNKNOWN], "Fadin."),
    )
    assert {kind: found[kind] for kind in KINDS} == {"fact": 0.5, "other": 1, "update": 0, "query": 0, "unknown": 0.5}
    assert found["recall"] == 2 / 4
    assert found["abstained"] == 1 / 4
    assert scores(("fact", ["K27"], "You did not tell me!"))["abstained"] == 1


def test_where_there_is_nothing_to_count_there_is_no_number():
    """NaN, not zero: neither for kinds of question nor for instructions nor for other people."""
    found = scores(("unknown", [UNKNOWN], "Fadin."))
    assert found.pop("unknown") == 0
    empty = {name for name, value in found.items() if isinstance(value, float) and math.isnan(value)}
    assert empty == {"recall", "fact", "other", "update", "query", "abstained", "followed", "competing"}
    assert {"method": "base", "prompt": 3, "competing_total": 0}.items() <= found.items()


def test_instructions_and_competing_answers():
    """An instruction that a right answer breaks costs no recall; what else names a row stays with it."""
    told = {"opener": "Of course", "closer": "over"}
    found = scores(
        ("fact", ["Fadin"], "Of course, Fadin, over."),
        ("fact", ["K27"], "K27, over."),
        instructions=told,
        competing_total=8,
        competing_right=2,
        memory="both",
    )
    assert (found["recall"], found["followed"], found["competing"], found["memory"]) == (1, 0.75, 0.25, "both")
    assert not found.keys() & {"instructions", "questions", "kinds", "gold", "predicted", "competing_right"}


def test_every_right_answer_is_short_enough():
    """The longest value with the longest word of each instruction; and those of the natural prompts."""
    encode, words = load_tokenizer().encode_long, wording.words()["instructions"]
    longest = {
        kind: max((w for split in SPLITS for w in spec["words"][split]), key=lambda w: len(encode(" " + w)))
        for kind, spec in words.items()
    }
    values = [v for by_split in wording.values().values() for split in SPLITS for v in by_split[split]]
    rights = [full_answer(v, longest) for v in (UNKNOWN, max(values, key=lambda v: len(encode(" " + v))))]
    rights += [
        q["answer"] + "." for split in ("validation", "test") for r in natural_prompts(split) for q in r["questions"]
    ]
    assert max(len(encode(" " + text)) for text in rights) <= LONGEST


METHODS = ("base", "prosg-token", "alone", "final-alone", "none")


def test_answers_are_those_of_one_whole_pass(lm, data):
    """At every distance, from prompt, body and question in one; with a delta that the prompt made, or without."""
    items = data.items(2, Shape(2, 60, 1, instructions=1, query=True))
    generator = token_generator(lm, std=1.0)
    rows = answers(lm, {"token": generator, "final": generator}, METHODS, data, items, (60, 20))
    assert rows[["method", "distance", "prompt"]].values.tolist() == [
        [method, distance, prompt] for method in METHODS for distance in (20, 60) for prompt in (0, 1)
    ]
    newline = data.tokenizer.encode("\n")
    for row in rows.to_dict("records"):
        item = items[row["prompt"]]
        prompt, text = data.encode_prompt(item), list(item.body[: row["distance"]])
        text += [] if text[-1] == newline[-1] else newline
        delta = None if row["method"] in ("base", "none") else generator.memorize(lm, [prompt])
        # What the prompt says is read by the model as it is; the change holds for all that follows.
        state = None if row["method"] in ("none", "alone", "final-alone") else lm.derive_state([prompt])
        for probe, found in zip(item.probes, row["predicted"], strict=True):
            question = text + data.encode_probe(probe)[0]
            assert [found] == lm.generate([question], state, delta, max_new_tokens=LONGEST)
        assert row["kinds"] == [probe.kind for probe in item.probes]
        assert row["gold"] == [[probe.value] for probe in item.probes]
    texts = rows.set_index(["method", "distance", "prompt"]).predicted
    assert texts["base", 60, 0] != texts["prosg-token", 60, 0]
    assert len(judged(rows)) == len(rows)
