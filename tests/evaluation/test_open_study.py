"""What the study of the open world asks: every part runs, on the right level and distances, with the right methods."""

import pandas as pd
import pytest
from checks import token_generator

from prosg_lib.config import get_profile
from prosg_lib.evaluation import open_recall, open_study
from prosg_lib.tasks.open_wording import LEVELS
from prosg_lib.tasks.open_world import Shape, load_open_world
from prosg_lib.training.state_probe import StateProbe, held

SIZES = get_profile("smoke").open.study


@pytest.fixture
def token(lm):
    return {"token": token_generator(lm, std=1.0)}


def test_levels_side_by_side(lm, token):
    """Every level, distance and possible method, and every kind of question."""
    rows = open_study.levels(lm, token, "validation", SIZES)
    methods = {"base", "repeated", "prosg-token", "alone", "wrong", "none"}  # no final-state generator, no static delta
    assert set(rows.method) == methods
    assert set(rows.level) == set(LEVELS)
    assert len(rows) == len(LEVELS) * len(methods) * len(SIZES.distances) * SIZES.prompts
    assert {kind for row in rows.kinds for kind in row} == {"fact", "other", "update", "unknown"}


def test_without_a_generator_only_the_model_is_asked(lm):
    """Far away, and prompts by hand."""
    assert set(open_study.far(lm, {}, "validation", SIZES).method) == {"base", "none"}
    rows = open_study.natural(lm, {}, "validation", SIZES)
    assert set(rows.method) == {"base", "repeated", "none"}
    assert rows.prompt.nunique() == SIZES.natural


def test_a_change_of_size_nought_is_the_plain_model(lm, token):
    """The same answers; of size one they are the generator's."""
    rows = open_study.scale(lm, token, "validation", SIZES)
    assert list(rows.scale.unique()) == list(SIZES.scales) == [0.0, 1.0]
    data, distance = load_open_world("values", "validation", 4), SIZES.distances[-2]
    items = data.items(SIZES.prompts, Shape(SIZES.facts, distance, SIZES.facts))
    again = open_recall.answers(lm, token, ["base", "prosg-token"], data, items, [distance])
    for scale, method in [(0.0, "base"), (1.0, "prosg-token")]:
        said = rows[rows.scale == scale].predicted.tolist()
        assert said == again[again.method == method].predicted.tolist()


def test_a_question_in_the_prompt(lm, token):
    """One a prompt is answered from the text behind it."""
    rows = open_study.query(lm, token, "validation", SIZES)
    assert all(kinds.count("query") == 1 for kinds in rows.kinds)


def test_what_the_state_holds(lm):
    """Beside what the model itself answers; level by level, of the same prompts."""
    probe = StateProbe(lm, 8)
    rows = open_study.held(lm, {"probe": probe}, "validation", SIZES)
    assert rows.groupby(["level", "method"]).prompt.nunique().to_dict() == {
        (level, method): SIZES.prompts for level in LEVELS for method in ("base", "probe")
    }
    data = load_open_world("all", "validation", 9)
    items = data.items(SIZES.prompts, Shape(SIZES.facts, 0, SIZES.facts))
    mine = rows[(rows.level == "all") & (rows.method == "probe")].recall
    assert mine.tolist() == held(lm, probe, data, items)


def test_facts_are_counted(lm, token):
    """So many in the prompt as the sizes say."""
    rows = open_study.facts(lm, token, "validation", SIZES)
    assert sorted(rows.facts.unique()) == list(SIZES.many)


@pytest.mark.parametrize(
    ("part", "columns"),
    [
        ("prose", {"prompt", "method", "loss"}),
        ("removal", {"memory", "about", "recall"}),
        ("rolling", {"method", "age", "recall"}),
        ("turns", {"method", "turn", "followed"}),
    ],
)
def test_the_other_parts(lm, token, part, columns):
    """Scores, with a number in each row."""
    rows: pd.DataFrame = open_study.PARTS[part](lm, token, "validation", SIZES)
    assert columns <= set(rows)
    assert rows[sorted(columns)].notna().all(axis=None)
