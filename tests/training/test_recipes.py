"""The table of recipes: its names, what fits together in it, and settings that are changed."""

import math

import pytest
from tiny import TINY

from prosg_lib.config import PROFILES, get_profile
from prosg_lib.errors import UserError
from prosg_lib.generators.base import SCALE
from prosg_lib.training.recipes import checkpoint_name, recipe, recipes, table

CPU, SMOKE = get_profile("cpu"), get_profile("smoke")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_a_recipe_stands_behind_those_it_needs(profile):
    """Its model (unless that is to be given) and what it starts from; module and model are of one kind; each says what
    it is; and a name says what it is for."""
    seen = {}
    for name, found in recipes(profile).items():
        for needed in (found.lm, found.start):
            assert needed is None or needed in seen or profile.pairs.hub or found.window is not None
        assert (found.lm is None) == found.is_model
        assert found.about
        assert found.time
        assert found.is_model or name.startswith(f"{found.lm}-")
        if found.start in seen:
            assert seen[found.start].kind == found.kind
        assert (found.pairs is not None) == (found.data == "pairs")
        seen[name] = found


def test_names_of_checkpoints():
    """The cpu profile's have no ending, and gpu and paper have its models; a seed and changes are part of a name."""
    assert checkpoint_name("rwkv4-dialogue-token", CPU) == "rwkv4-dialogue-token"
    assert checkpoint_name("rwkv4-dialogue-token", get_profile("gpu"), 1) == "rwkv4-dialogue-token-seed1"
    assert checkpoint_name("llama-pairs-weights-characters-lc", SMOKE) == "llama-pairs-weights-characters-lc-smoke"
    changes = {"training.steps": "300", "size.layers": "0,1", "size.label": "false", "curriculum.blank": 1.0}
    expected = "rwkv4-dialogue-token-layers0+1-labelFalse-blank1.0-steps300-seed2-smoke"
    assert checkpoint_name("rwkv4-dialogue-token", SMOKE, 2, changes) == expected
    assert checkpoint_name("mamba2-dialogue-token", CPU, foreign="12ab") == "mamba2-dialogue-token-for-12ab"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("size.rank", "8", 8),
        ("size.rank", 8, 8),
        ("size.layers", "0,1", (0, 1)),
        ("size.maps", "ffn.key", ("ffn.key",)),
        ("size.label", "false", False),
        ("training.lr", "1e-3", 1e-3),
        ("training.distances", (0, 64), (0, 64)),
        ("curriculum.alone", "0", 0.0),
    ],
)
def test_a_changed_setting(key, value, expected):
    """As the command line has it or as an object; everything else is unchanged."""
    made, usual = recipe("rwkv4-dialogue-token", CPU, {key: value}), recipe("rwkv4-dialogue-token", CPU)
    part, _, field = key.partition(".")
    assert getattr(getattr(made, part), field) == expected
    for other in {"size", "training", "curriculum"} - {part}:
        assert getattr(made, other) == getattr(usual, other)


@pytest.mark.parametrize(("steps", "warmup"), [(6, 1), (60, 10), (600, 100), (6000, 150)])
def test_a_shorter_training_warms_up_in_a_sixth_of_its_steps(steps, warmup):
    """And never for longer than the profile's; unless that is changed, too."""
    assert recipe("rwkv4-dialogue-token", CPU, {"training.steps": steps}).training.warmup == warmup
    both = {"training.steps": steps, "training.warmup": 3}
    assert recipe("rwkv4-dialogue-token", CPU, both).training.warmup == 3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {}, "unknown recipe 'lora'; there are rwkv4-dialogue, rwkv4-dialogue-token"),
        ("rwkv4-dialogue-token", {"size.size": 3}, "no setting 'size.size'; there are size.rank, .*training.warmup"),
        ("rwkv4-dialogue-token", {"rank": 3}, "no setting 'rank'"),
        ("rwkv4-dialogue-token", {"size.lessons": 0.5}, "no setting 'size.lessons'"),
        ("rwkv4-dialogue", {"curriculum.alone": 0.5}, "no setting 'curriculum.alone'"),
        ("rwkv4-dialogue-token", {"size.rank": "x"}, "size.rank=x is not a value of type int"),
        ("rwkv4-dialogue-token", {"size.rank": "1,2"}, "size.rank=1,2 is not a value of type int"),
        ("rwkv4-dialogue-token", {"size.layers": ""}, "size.layers= is not a value of type int, several with commas"),
        ("rwkv4-dialogue-token", {"size.label": "no"}, "size.label=no is not a value of type bool"),
        ("rwkv4-dialogue-token", {"size.rank": 2.5}, "size.rank=2.5 is not a value of type int"),
        ("rwkv4-dialogue-token", {"size.rank": math.inf}, "size.rank=inf is not a value of type int"),
        ("rwkv4-dialogue-token", {"curriculum.blank": 1.5}, "shares from 0 to 1"),
        ("rwkv4-dialogue-supervised", {"size.lessons": 1.5}, "a share from 0 to 1"),
        ("rwkv4-dialogue-supervised", {"size.strength": "nan"}, "strength=nan is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"curriculum.locality": "nan"}, "locality=.* is refused: it takes 0 or more"),
        ("rwkv4-dialogue-token", {"training.lr": "inf"}, "lr=inf is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.lr": "0"}, "lr=0.0 is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.batch": "0"}, "batch=0 is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.steps": "0"}, "steps=0 is refused: it takes numbers above 0"),
        ("rwkv4-suite", {"training.steps": 0}, "training.steps=0 is one epoch of the pairs; this data has none"),
        ("rwkv4-dialogue-token", {"training.warmup": 0}, "warmup=0 is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.facts": "3,0"}, "facts=.* is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.facts": ()}, "facts=.* is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"training.distances": ()}, "distances=.* is refused: it takes 0 or more"),
        ("rwkv4-dialogue-token", {"training.distances": "-1"}, "distances=.* is refused: it takes 0 or more"),
        ("rwkv4-dialogue-token", {"size.rank": "0"}, "rank=0 is refused: it takes numbers above 0"),
        ("rwkv4-dialogue-token", {"size.layers": "0,-1"}, "layers=.* is refused: it takes 0 or more"),
        ("rwkv4-dialogue", {"size.width": "0"}, "width=0 is refused: it takes numbers above 0"),
        ("rwkv4-dialogue", {"size.vocab": 4096}, "no setting 'size.vocab'; there are size.width, size.layers"),
        ("llama-pairs", {"size.rest": "x"}, "no setting 'size.rest'"),
        ("rwkv4-dialogue-supervised", {"size.teacher": "x"}, "unknown teacher 'x'; there are answers and prompt"),
    ],
)
def test_unknown_names_settings_and_values(name, changes, message):
    with pytest.raises(UserError, match=message):
        recipe(name, CPU, changes)


def test_gpu_and_paper_have_the_cpu_profiles_models():
    """All of gpu's recipes are the same; paper's differ only on pairs, for a pretrained transformer."""
    assert recipes(get_profile("gpu")) == recipes(CPU)
    paper = recipes(get_profile("paper"))
    differ = {name for name, found in recipes(CPU).items() if paper.get(name) != found}
    assert differ == {name for name in recipes(CPU) if name.startswith(("llama-pairs", "llama-reader"))}
    assert recipes(CPU).keys() - paper.keys() == {"llama-pairs", "llama-reader-pairs"}


def test_the_papers_profile_has_the_papers_numbers():
    """Batch 16, one epoch, inner learning rate 1e-3, through the adapter's own scale as well."""
    found = [r for r in recipes(get_profile("paper")).values() if (r.lm or "").startswith("llama")]
    steps = [r for r in found if r.training.contexts == (1,)]
    assert {(r.training.batch, r.training.steps, r.pairs.repeats) for r in steps} == {(16, 0, 0)}
    for made in found:
        if made.kind == "weights":
            assert made.size.lr == pytest.approx(1e-3)
        if made.kind == "adapter":
            assert made.size.lr * SCALE**2 == pytest.approx(1e-3)


def test_what_a_step_on_maps_practises():
    """LC at every word of the query after repeated random tokens; what goes on from it has neither."""
    first = recipes(CPU)["llama-reader-pairs-maps-wikitext-lc"]
    assert (first.pairs.practice, first.pairs.repeats, first.pairs.everywhere) == ("copied", CPU.pairs.repeats, True)
    for objective in ("lc", "lg"):
        after = recipes(CPU)[f"llama-reader-pairs-maps-wikitext-after-wikitext-{objective}"]
        assert after.start == first.name
        assert (after.pairs.practice, after.pairs.repeats, after.pairs.everywhere) == ("named", 0, False)
        assert after.training == CPU.pairs.maps_after


def test_many_contexts_and_low_ranks():
    """As many contexts a step as where each query has one, but at least two queries; factors of rank r move 1/sqrt(r)
    as far."""
    found = recipes(CPU)
    sixteen = found["llama-pairs-weights-characters-after-characters-lc-16"].training
    assert (sixteen.contexts, sixteen.batch) == ((16,), 2)
    assert found["llama-pairs-weights-16-characters-lc"].training.lr == CPU.pairs.low_rank.lr / 4
    assert found["llama-pairs-weights-1-characters-lc"].training == CPU.pairs.rank_one


def test_the_table_that_is_shown():
    """One line a recipe; of the cpu profile it says how long and what is shipped, of others it cannot."""
    lines = table(CPU).splitlines()
    assert len(lines) == 1 + len(recipes(CPU))
    (line,) = [line for line in lines if line.startswith("rwkv4-dialogue-final ")]
    assert "final-state generator" in line
    assert "rank 8, 500 steps of 48" in line
    assert "21 min, CPU" in line
    assert line.endswith("yes")
    assert "min, CPU" not in table(TINY)
