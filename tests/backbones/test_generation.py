"""Generation: a sample is its own whatever its batch, texts end where they should, and nothing grows with them."""

import copy
import gc

import pytest
import torch
from checks import random_delta
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prosg_lib.backbones import generation
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.text.tokenizer import load_tokenizer

DRAWN = {"stop": None, "temperature": 0.9, "top_p": 0.95}


# --- drawing ------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_own_seed_only(lm, prompts):
    """Not on the batch, nor on its place in it, with prompts of different lengths and one delta each."""
    delta, seeds = random_delta(lm, 4), [5, 6, 7, 8]
    together = lm.generate(prompts, delta=delta, max_new_tokens=40, seeds=seeds, **DRAWN)
    for row in range(4):
        alone = lm.generate([prompts[row]], delta=delta.select([row]), max_new_tokens=40, seeds=[seeds[row]], **DRAWN)
        assert alone == [together[row]]
    order = [2, 0, 3, 1]
    shuffled = lm.generate(
        [prompts[i] for i in order], None, delta.select(order), 40, seeds=[seeds[i] for i in order], **DRAWN
    )
    assert shuffled == [together[i] for i in order]
    twice = lm.generate([prompts[0]] * 2, delta=delta.select([0, 0]), max_new_tokens=40, seeds=[5, 9], **DRAWN)
    assert twice[0] == together[0] != twice[1]


def test_without_seeds_torchs_own_decide(lm, prompts):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(lm.generate(prompts, max_new_tokens=10, **DRAWN))
    assert texts[0] == texts[1] != texts[2]


@torch.no_grad()
def test_tokens_are_drawn_with_the_models_probabilities(lm):
    """Of 2,000 samples of one token: the ten likeliest as often as softmax(logits / temperature) says."""
    count, prompt, temperature = 2000, [5, 9, 17], 0.7
    steps = lm.stream([prompt] * count, stop=None, max_new_tokens=1, temperature=temperature, seeds=range(count))
    found = torch.bincount(next(steps), minlength=lm.config.vocab) / count
    chances, tokens = (lm(torch.tensor([prompt]))[0][0, -1] / temperature).softmax(-1).topk(10)
    assert chances[0] > 0.05
    assert_close(found[tokens], chances, rtol=0, atol=4 * (0.25 / count) ** 0.5)
    assert (found[tokens] > 0).all()


def test_top_k_and_top_p_leave_out_what_is_unlikely():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]).log()
    for top_k, top_p, kept in (
        (None, 1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (9, 1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (3, 1.0, [[1, 2, 3], [0, 1, 2]]),
        (1, 1.0, [[1], [0]]),
        (None, 0.65, [[1, 3], [0, 1]]),
        (None, 0.75, [[1, 2, 3], [0, 1, 2]]),
        (None, 1e-6, [[1], [0]]),
        (2, 0.5, [[1], [0]]),  # of the two that top_k leaves, the likelier has 4/7
        (2, 0.6, [[1, 3], [0, 1]]),
    ):
        chances = generation._probabilities(logits, top_k, top_p)
        assert [row.nonzero()[:, 0].tolist() for row in chances] == kept
        for row, whole, places in zip(chances, logits.softmax(-1), kept, strict=True):
            assert_close(row[places] / row.sum(), whole[places] / whole[places].sum())


def test_what_is_left_out_is_never_drawn(lm, prompts):
    """top_k = 1, and a top_p below the likeliest token's probability, are greedy at any temperature."""
    greedy = lm.generate(prompts, max_new_tokens=20, stop=None)
    assert lm.generate(prompts, max_new_tokens=20, stop=None, temperature=3.0, top_k=1) == greedy
    assert lm.generate(prompts, max_new_tokens=20, stop=None, temperature=3.0, top_p=1e-4) == greedy
    assert lm.generate(prompts, max_new_tokens=20, stop=None, top_k=5, top_p=0.5, seeds=range(4)) == greedy
    for temperature in (1e-6, 1e-300):
        assert lm.generate(prompts, max_new_tokens=20, stop=None, temperature=temperature) == greedy
    assert lm.generate(prompts, max_new_tokens=20, stop=None, temperature=3.0) != greedy


# --- stop strings and pieces --------------------------------------------------------------------------------------


def cut(text, stops):
    """The text up to the stop string that is complete first, letter by letter; of two at once the longer."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@settings(deadline=None, max_examples=300)
@given(st.text("ab\n€", max_size=14), st.lists(st.text("ab\n€", min_size=1, max_size=4), max_size=3), st.data())
def test_texts_end_before_a_stop_string_however_they_are_cut_into_tokens(text, stops, data):
    """Whatever the tokens; and what was given out on the way is always the beginning of what comes out in the end."""
    tokenizer = load_tokenizer()
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    expected, found = cut(text, stops), ""
    one = generation._Text(tokenizer, tuple(stops))
    for part in parts:
        for token in tokenizer.encode(part):
            found += one.push(token)
            assert expected.startswith(found)
    assert one.ended == (expected != text)
    found += one.rest()
    assert found == expected


def test_a_stop_may_span_tokens_and_end_inside_of_one(lm, prompts):
    """Every pair of neighbouring letters of a free text stops it where it first stands, whatever the tokens."""
    (free,) = lm.generate(prompts[:1], max_new_tokens=15, stop=None)
    for i in range(len(free) - 1):
        stop = free[i : i + 2]
        for stops in (stop, [stop], ("no such text", stop)):
            assert lm.generate(prompts[:1], max_new_tokens=15, stop=stops) == [free[: free.index(stop)]]


def test_never_to_stop(lm, prompts):
    """None, alone or among others, and no stop string at all."""
    free = lm.generate(prompts, max_new_tokens=15, stop=None)
    letter = free[0][3]
    assert lm.generate(prompts, max_new_tokens=15, stop=[letter]) != free
    for stop in ([None], [letter, None], []):
        assert lm.generate(prompts, max_new_tokens=15, stop=stop) == free


def test_streamed_pieces_are_the_text(lm, prompts):
    """With stops or without: joined they are what `generate` returns, and no piece comes late by more than it must."""
    (first, *_) = lm.generate(prompts, max_new_tokens=25, stop=None)
    for stop in (None, "\n", [first[9:12], "zz"]):
        steps = list(lm.stream_text(prompts, max_new_tokens=25, stop=stop))
        assert ["".join(row) for row in zip(*steps, strict=True)] == lm.generate(prompts, max_new_tokens=25, stop=stop)
        assert len(steps) <= 26
        assert len({row for step in steps for row in step}) > 20
    one_by_one = list(lm.stream_text(prompts[:1], max_new_tokens=25, stop=None))
    tokens = [int(t) for t in lm.stream(prompts[:1], max_new_tokens=25, stop=None)]
    for n in range(1, 26):
        so_far, whole = "".join(piece for (piece,) in one_by_one[:n]), lm.tokenizer.decode(tokens[:n])
        assert so_far in (whole, whole.removesuffix("\ufffd"))


def test_a_finished_sample_costs_no_more_tokens(make_lm, prompts):
    """Its tokens are -1, its text stays, the others go on; and when all have ended, the model is not run again."""
    lm = make_lm(seed=1)
    free = torch.stack(list(lm.stream(prompts, max_new_tokens=20, stop=None)), 1)
    firsts = [lm.tokenizer.decode(row[:2].tolist()) for row in free]
    calls = []
    handle = lm.head.register_forward_hook(lambda *a: calls.append(1))
    steps = torch.stack(list(lm.stream(prompts, max_new_tokens=20, stop=firsts[0])), 1)
    assert len(calls) == 20
    assert steps[0].tolist() == [free[0, 0], *[-1] * 19]
    assert torch.equal(steps[1:], free[1:])
    calls.clear()
    assert lm.generate(prompts, max_new_tokens=20, stop=firsts) == [""] * 4
    handle.remove()
    assert len(calls) == 2


# --- the end of a text --------------------------------------------------------------------------------------------


@pytest.fixture
def ending(lm, prompts):
    """A model, and what it would write behind the prompts: four texts that it ends at different places, one never."""
    free = torch.stack(list(lm.stream(prompts, None, random_delta(lm, 4), 30, None)), 1).tolist()
    lm.ends = tuple(next(t for t in row[n:] if t not in free[3]) for row, n in zip(free[:3], (4, 11, 12), strict=True))
    cut = [next((n for n, token in enumerate(row) if token in lm.ends), 30) for row in free]
    assert sorted(cut)[-1] == 30 > sorted(cut)[-2] > sorted(cut)[0]
    return lm, [row[:n] for row, n in zip(free, cut, strict=True)], free


def test_a_text_ends_at_the_models_end(ending, prompts):
    """Before the token; as text, as tokens (-1 from there), and as token ids of a model without a tokenizer; unless
    one wants to go past it. A tokenizer that knows an end ends texts, too."""
    lm, expected, free = ending
    delta, texts = random_delta(lm, 4), [lm.tokenizer.decode(row) for row in expected]
    assert lm.generate(prompts, None, delta, 30, None) == texts
    steps = list(lm.stream_text(prompts, None, delta, 30, None))
    assert ["".join(row) for row in zip(*steps, strict=True)] == texts
    steps = torch.stack(list(lm.stream(prompts, None, delta, 30, None)), 1).tolist()
    assert steps == [row + [-1] * (30 - len(row)) for row in expected]
    assert lm.generate(prompts, None, delta, 30, None, ignore_eos=True) == [lm.tokenizer.decode(row) for row in free]
    tokenizer, lm.tokenizer = lm.tokenizer, None
    assert lm.generate(prompts, None, delta, 30, None) == expected
    lm.tokenizer, ends, lm.ends = copy.copy(tokenizer), lm.ends, ()
    assert lm.generate(prompts, None, delta, 30, None) != texts
    lm.tokenizer.ends = ends
    assert lm.generate(prompts, None, delta, 30, None) == texts


def test_a_text_may_end_at_once(ending, prompts):
    lm, _, free = ending
    lm.ends = tuple(row[0] for row in free)
    assert lm.generate(prompts, None, random_delta(lm, 4), 30, None) == [""] * 4
    assert list(lm.stream(prompts, None, random_delta(lm, 4), 30, None)) == []
    lm.tokenizer = None
    assert lm.generate(prompts, None, random_delta(lm, 4), 30, None) == [[]] * 4


def test_a_stop_string_that_only_began_is_text(ending, prompts):
    """It was held back, and comes out where the text ends."""
    lm, expected, _ = ending
    texts = [lm.tokenizer.decode(row) for row in expected]
    stops = [text[-2:] + "no such text" for text in texts]
    assert lm.generate(prompts, None, random_delta(lm, 4), 30, stops) == texts


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9, "seeds": [5, 6, 7, 8]}])
@pytest.mark.parametrize("shared", [False, True])
def test_what_has_ended_is_computed_no_more(lm, prompts, shared, drawn, monkeypatch):
    """When half of a batch has ended, the rest goes on alone: every text is the one that it is by itself, drawn or
    not, with a change and a state of its own, or with the change of all."""
    delta = random_delta(lm, 1 if shared else 4)
    state = lm.derive_state([row[::-1] for row in prompts])
    free = torch.stack(list(lm.stream(prompts, state, delta, 30, None, **drawn)), 1).tolist()
    lm.ends = (free[2][2], free[0][5], free[3][9])
    alone = [
        lm.generate(
            [prompt],
            state.select([row]),
            delta if shared else delta.select([row]),
            30,
            None,
            **{name: [value[row]] if name == "seeds" else value for name, value in drawn.items()},
        )[0]
        for row, prompt in enumerate(prompts)
    ]
    sizes, step_through = [], lm.step_through
    monkeypatch.setattr(lm, "step_through", lambda ids, *rest: sizes.append(len(ids)) or step_through(ids, *rest))
    assert lm.generate(prompts, state, delta, 30, None, **drawn) == alone
    lengths = [next((n for n, token in enumerate(row) if token in lm.ends), 30) for row in free]
    assert len(sizes) == min(30, max(lengths) + 1)
    assert sizes == sorted(sizes, reverse=True)
    for step, size in enumerate(sizes):
        assert size < 2 * max(1, sum(length >= step for length in lengths))


# --- memory -------------------------------------------------------------------------------------------------------


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seeds": [1, 2, 3, 4]}])
def test_memory_does_not_grow_with_the_text(lm, prompts, drawn, monkeypatch):
    """As many live tensors and bytes after 300 tokens as after 5, and a state of as many bytes at every step."""
    states = set()
    step_through = lm.step_through

    def spied(ids, state, valid):
        hidden, state = step_through(ids, state, valid)
        states.add(state.nbytes())
        return hidden, state

    monkeypatch.setattr(lm, "step_through", spied)
    seen = []
    steps = lm.stream_text(prompts, None, random_delta(lm, 4), 300, None, **drawn)
    for n, _ in enumerate(steps, 1):
        if n in (5, 300):
            seen.append(live_bytes())
    assert seen[0] == seen[1]
    assert states == {5 * 3 * 16 * 4}


# --- without a tokenizer, and mistakes ----------------------------------------------------------------------------


def test_token_ids_in_and_out_without_a_tokenizer(lm, prompts):
    tokens = torch.stack(list(lm.stream(prompts, max_new_tokens=6, stop=None)), 1).tolist()
    lm.tokenizer = None
    assert lm.generate(prompts, max_new_tokens=6, stop=None) == tokens
    assert len(tokens) == 4
    with pytest.raises(UserError, match="no tokenizer"):
        lm.generate(prompts)
    with pytest.raises(UserError, match="no tokenizer"):
        lm.generate(["a"], stop=None)
    with pytest.raises(UserError, match="no tokenizer"):
        lm.stream_text(prompts, stop=None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"max_new_tokens": "9"}, "max_new_tokens is '9'"),
        ({"stop": ""}, "stop is ''; give a text that is not empty"),
        ({"stop": ["\n", ""]}, "stop is .*; give a text that is not empty"),
        ({"stop": 7}, "stop is 7"),
        ({"seeds": [1, 2**64], "temperature": 1.0}, "a seed is a whole number from"),
        ({"seeds": [1, 1.5], "temperature": 1.0}, "a seed is a whole number from"),
        ({"seeds": [1, 2, 3]}, r"seeds is \[1, 2, 3\], but there are 2 prompts"),
        ({"seeds": 7}, "seeds is 7, but there are 2 prompts"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream", "stream_text"])
def test_values_that_cannot_be_meant_are_refused(lm, wrong, said, call):
    """At the call, before anything is generated; as one error that names the value."""
    with pytest.raises(UserError, match=said) as refused:
        getattr(lm, call)([[1], [2]], **wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "top_k": 3}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_text_from_what_is_no_number(lm, prompts, drawn, value):
    """NaN counts as the largest logit, which made texts of "!" alone."""
    delta = random_delta(lm, 2)
    factors = {name: Factors(u.clone(), v) for name, (u, v) in delta.factors.items()}
    for u, _ in factors.values():
        u[1] = value
    with pytest.raises(NotFinite, match="the logits after prompt 1 are not finite"):
        lm.generate(prompts[:2], delta=LowRankDelta(factors, delta.fingerprint), **drawn)
    with torch.no_grad():
        lm.head.weight[7] = value
    with pytest.raises(NotFinite, match="the logits after prompt 0 are not finite"):
        lm.generate(prompts, **drawn)


def test_states_and_changes_of_other_numbers_are_refused(lm):
    with pytest.raises(UserError, match="1 sequences but a delta of batch 2"):
        lm.generate([[1]], delta=random_delta(lm, 2))
    with pytest.raises(UserError, match="1 sequences but a state of batch 2"):
        lm.generate([[1]], lm.blank_state(2))
