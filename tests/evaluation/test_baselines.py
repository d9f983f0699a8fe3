"""What a user would try instead of ProSG: names, and what each does to the state, the weights and the text."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from prosg_lib.backbones.hub_families import new_mamba2
from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.profiles import PROFILES
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.errors import UserError
from prosg_lib.evaluation.baselines import (
    METHODS,
    Baseline,
    FineTunedLora,
    LastTokens,
    ReadAgain,
    ReadTwice,
    Reinjection,
    Reread,
    Start,
    StateOffset,
    StateUpdate,
    TunedState,
    start,
)
from prosg_lib.evaluation.reading import answering, read
from prosg_lib.gradient_steps.one_step import context_nll

NEWLINE, ANSWER = 7, 8
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


@pytest.fixture
def texts(prompts):
    """One text a prompt, all of 90 tokens."""
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 2000, (len(prompts), 90), generator=g).tolist()


def states_of(lm, begin, texts, places=(90,)):
    return [stretch.state for stretch in read(lm, begin, texts, places)]


def same(a, b, **close):
    for name, tensor in a.tensors.items():
        assert_close(tensor, b.tensors[name], **(close or CLOSE))


def memory(lm, state):
    """What a state holds, whatever its gauge, without the vectors that say which token came last."""
    t = state.tensors
    if "num" in t:
        return t["num"] * t["m"].exp(), t["den"] * t["m"].exp()
    return (t["wkv"],)


def test_a_name_has_the_numbers():
    """So that tables and claims tell two of a kind apart; no baseline is called what a method is."""
    assert ReadTwice().name == "twice"
    assert ReadAgain(64).name == "every-64"
    assert Reinjection(32, 0.5).name == "reinject-32-0.5"
    assert FineTunedLora(steps=40, lr=0.001).name == "lora-40-0.001"
    families = [kind.family for kind in Baseline.__subclasses__()]
    assert len(set(families)) == len(families) == 7
    assert not set(families) & set(METHODS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReadAgain(0), "every of 'every' is 0; it must be 1 or more"),
        (lambda: Reinjection(8, 1.5), "share of 'reinject' is 1.5; it must be 0 to 1"),
        (lambda: StateOffset(-1), "strength of 'offset'"),
        (lambda: TunedState(-1), "steps of 'tuned'"),
        (lambda: FineTunedLora(3, 0), "lr of 'lora'"),
        (lambda: LastTokens(0), "tokens of 'last' is 0; it must be 1 or more"),
        (lambda: start("nothing", None, {}, [[1]]), "unknown method 'nothing'; there are base, .*, LastTokens"),
        (lambda: start("prosg-token", None, {}, [[1]]), "needs the 'token' generator; load or train it first"),
    ],
)
def test_bad_numbers_and_names_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@FAMILIES
def test_twice_is_the_prompt_right_after_itself(lm, prompts):
    """The state is that after the same tokens twice, read by the plain model, whatever the lengths in the batch."""
    begin = start(ReadTwice(), lm, {}, prompts)
    for row, prompt in enumerate(prompts):
        same(begin.state.select([row]), lm.derive_state([[*prompt, *prompt]]))


@FAMILIES
@pytest.mark.parametrize(
    "method", [ReadAgain(91), Reinjection(91), Reinjection(8, 0), StateOffset(0), TunedState(0), FineTunedLora(0)]
)
def test_what_never_happens_leaves_the_plain_model(lm64, prompts, texts, method):
    """Longer periods than the text, no share, no strength and no steps: each is `base`."""
    lm = lm64
    begin = start(method, lm, {}, prompts)
    plain = start("base", lm, {}, prompts)
    for one, other in zip(read(lm, begin, texts, (40, 90)), read(lm, plain, texts, (40, 90)), strict=True):
        for a, b in zip(memory(lm, one.state), memory(lm, other.state), strict=True):
            assert_close(a, b)
        assert_close(one.before, other.before, **CLOSE)


@FAMILIES
def test_only_the_last_tokens_are_known(lm, prompts, texts):
    """At every place the state is that of the last N tokens of prompt and text, read alone from a blank state; with
    room for all of them it is the plain model's."""
    few, enough = start(LastTokens(50), lm, {}, prompts), start(LastTokens(500), lm, {}, prompts)
    for place, found in zip((0, 3, 90), states_of(lm, few, texts, (0, 3, 90)), strict=True):
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            same(found.select([row]), lm.derive_state([[*prompt, *text[:place]][-50:]]))
    plain = states_of(lm, start("base", lm, {}, prompts), texts)
    same(states_of(lm, enough, texts)[0], plain[0])
    (part,) = states_of(lm, few.select([1]), texts[1:2])
    same(part, states_of(lm, few, texts)[0].select([1]))


def test_the_prompt_is_read_again_at_line_ends():
    """At the first line end after so many tokens, counted from the last reading; not before an answer; without lines
    right after so many tokens."""
    again = Reread(3, [], NEWLINE, ANSWER)
    assert again.places([1, NEWLINE, 1, 1, NEWLINE, NEWLINE, 1, NEWLINE, 1]) == [5, 8]
    assert again.places([1, 1, NEWLINE, ANSWER, 1, NEWLINE]) == [6]
    assert again.places([1, 1, NEWLINE]) == [3]
    assert replace(again, line_end=None).places([1] * 7) == [3, 6]


@FAMILIES
def test_every_n_reads_text_and_prompts_in_this_order(lm, prompts, texts):
    """State and hidden states are those of one text with the prompts in their places, read alone, one row at a time;
    places of the text keep their numbers, and each token is predicted from what stands right before it."""
    begin = start(ReadAgain(20), lm, {}, prompts)
    newline = begin.reread.line_end
    for text, places in zip(texts, ((25, 60), (19, 20, 21), (), (30,), (89,)), strict=False):
        for place in places:
            text[place] = newline
    stretches = list(read(lm, begin, texts, (10, 33, 90)))
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        places = begin.reread.places(text)
        assert places or row == 2
        whole, own = list(prompt), []
        for number, token in enumerate(text, 1):
            own.append(len(whole))
            whole.append(token)
            if number in places:
                whole += prompt
        hidden, state = lm.step_through(torch.tensor([whole]), None, None)
        same(stretches[-1].state.select([row]), state)
        before = torch.cat([stretch.before[row] for stretch in stretches])
        assert_close(before[1:], hidden[0, [place - 1 for place in own[1:]]], **CLOSE)
        assert [stretch.before.shape[1] for stretch in stretches] == [10, 23, 57]


@FAMILIES
def test_reinjection_mixes_what_the_states_hold(lm64, prompts, texts):
    """After n tokens the sums are (1 - a) of the text's and a of the prompt's, as numbers, not as the logarithms that
    RWKV-4 keeps; the token that came last stays the text's."""
    begin = start(Reinjection(30, 0.25), lm64, {}, prompts)
    mixed, plain = (states_of(lm64, b, texts, (30,))[0] for b in (begin, replace(begin, update=None)))
    parts = (memory(lm64, s) for s in (mixed, plain, begin.state))
    for ours, text, prompt in zip(*parts, strict=True):
        assert_close(ours, 0.75 * text + 0.25 * prompt)
    for name, tensor in plain.tensors.items():
        if "shift" in name:
            assert torch.equal(mixed.tensors[name], tensor)


@FAMILIES
def test_reinjection_of_all_forgets_the_text(lm, prompts, texts):
    """With a = 1 after every token nothing of the text is left but its last token, however long it was."""
    begin = start(Reinjection(1, 1), lm, {}, prompts)
    for state in states_of(lm, begin, texts, (1, 90)):
        for ours, prompt in zip(memory(lm, state), memory(lm, begin.state), strict=True):
            assert_close(ours, prompt)


def test_a_mix_of_states_far_apart_is_finite(lm, prompts):
    """RWKV-4's sums differ by more than a float can hold: the larger one counts then, and a share of 0 is none."""
    one = lm.derive_state(prompts)
    far = RecurrentState(one.tensors | {"m": one.tensors["m"] + 500.0})
    for weights, expected in (((0.5, 0.5), far), ((1.0, 0.0), one), ((0.0, 1.0), far)):
        found = lm.combine_states([one, far], weights)
        assert all(torch.isfinite(t).all() for t in found.tensors.values())
        assert_close(found.tensors["m"], expected.tensors["m"])
        assert_close(found.tensors["num"] / found.tensors["den"], expected.tensors["num"] / expected.tensors["den"])
    blank = lm.blank_state(len(prompts))
    same(lm.combine_states([one, blank], (1.0, -1.0)), one)
    assert torch.equal(lm.combine_states([blank, blank], (1.0, 1.0)).tensors["den"], blank.tensors["den"])


class Line:
    """A linear recurrence, s <- s / 2 + x, whose tokens are numbers: what is done to its state is known by heart."""

    state_grows = False

    def parameters(self):
        return iter([torch.zeros(1)])

    def step_through(self, ids, state, valid=None):
        s = state.tensors["s"]
        seen = []
        for x in ids.T:
            s = s / 2 + x
            seen.append(s)
        return torch.stack(seen, 1)[..., None], RecurrentState({"s": s})

    def combine_states(self, states, weights):
        return RecurrentState({"s": sum(w * s.tensors["s"] for s, w in zip(states, weights, strict=True))})


def test_an_offset_that_makes_up_for_fading_does_not_fade():
    """On s <- s / 2 + x, adding half the offset after every token keeps all of it for ever, whatever the text is: the
    state is the text's own plus the offset. That is what State-offset Tuning calls its effect."""
    lm, offset = Line(), RecurrentState({"s": torch.tensor([6.0, -2.0])})
    half = RecurrentState({"s": offset.tensors["s"] / 2})
    texts = [[1, 0, 2, 5, 1], [0, 0, 1, 1, 1]]
    blank = RecurrentState({"s": torch.zeros(2)})
    from_prompt = Start(offset, None, update=StateUpdate(1, 1.0, 1.0, half))
    for place in (1, 3, 5):
        (held,) = states_of(lm, from_prompt, texts, (place,))
        (alone,) = states_of(lm, Start(blank, None), texts, (place,))
        assert_close(held.tensors["s"], alone.tensors["s"] + offset.tensors["s"])


def test_rwkv4_loses_what_its_decay_takes(lm64, prompts, texts):
    """What `offset` adds is exactly what one token takes from the prompt's sums, whichever token it is: with it, the
    first layer's sums after any text are the text's own plus the prompt's, to the end."""
    begin = start(StateOffset(1), lm64, {}, prompts)
    ours = memory(lm64, states_of(lm64, begin, texts)[0])
    # The first layer reads embeddings and the last token alone, so its sums do not depend on what other layers say.
    shifts = {n: t for n, t in begin.state.tensors.items() if "shift" in n}
    alone = RecurrentState(lm64.blank_state(len(prompts)).tensors | shifts)
    text = memory(lm64, states_of(lm64, replace(begin, state=alone, update=None), texts)[0])
    for a, b, c in zip(ours, text, memory(lm64, begin.state), strict=True):
        assert_close(a[:, 0], b[:, 0] + c[:, 0])


def test_an_offset_goes_on_in_the_question(lm, prompts):
    """Questions of different lengths in one batch are read as each alone, with the change after every token of them,
    and none for the padding."""
    begin = start(StateOffset(0.5), lm, {}, prompts)
    held = answering(lm, begin)
    questions = [[5, 6], [1, 2, 3, 4], [9], [8, 8, 8]]
    ids, valid = lm.encode_prompts(questions)
    _, together = held.step_through(ids, begin.state, valid)
    for row, question in enumerate(questions):
        one = begin.select([row])
        (alone,) = states_of(lm, one, [question], (len(question),))
        same(together.select([row]), alone)
    texts = held.generate(questions, begin.state, max_new_tokens=3)
    alone = answering(lm, begin.select([1])).generate(questions[1:2], begin.state.select([1]), max_new_tokens=3)
    assert texts[1:2] == alone
    assert answering(lm, start(Reinjection(8), lm, {}, prompts)) is lm


def test_an_offset_follows_the_texts_that_go_on(lm, prompts, monkeypatch):
    """Where most texts of a batch have ended and are not computed any more, the others keep each its own offset."""
    begin = start(StateOffset(0.5), lm, {}, prompts)
    held, questions = answering(lm, begin), [[5, 6], [1, 2, 3, 4], [9], [8, 8, 8]]
    monkeypatch.setattr(lm, "tokenizer", None)  # tokens come out
    whole = held.generate(questions, begin.state, max_new_tokens=6, stop=None)
    last = next(row for row in range(4) if all(whole[row][0] != other[0] for other in whole[:row] + whole[row + 1 :]))
    firsts = tuple({text[0] for number, text in enumerate(whole) if number != last} - set(whole[last]))
    monkeypatch.setattr(type(lm), "ends", firsts)
    found = held.generate(questions, begin.state, max_new_tokens=6, stop=None)
    assert found[last] == whole[last]
    assert sum(map(len, found)) < sum(map(len, whole))


def test_a_model_that_looks_back_has_no_state_to_mix(prompts):
    """Re-injection, offset and tuning need a state of a fixed size, and say so; re-reading works."""
    slow = new_llama(TransformerConfig("llama", 2048, width=16, layers=1, ffn=32, heads=2)).eval()
    for lm in (slow, slow.with_kv_cache()):
        for method in (Reinjection(), StateOffset(), TunedState()):
            with pytest.raises(UserError, match="grows with the text"):
                start(method, lm, {}, prompts)
        assert start(ReadAgain(4), lm, {}, prompts).reread.line_end is None


def test_other_families_states_are_mixed_and_tuned(prompts, texts):
    """A Mamba-2 of `transformers`: its matrices are mixed as they are, its convolution goes on with the text's last
    tokens; and from a tuned state every prompt is likelier."""
    torch.manual_seed(0)
    lm = new_mamba2(PROFILES["smoke"].pretrained.model.settings).eval()
    prompts = [prompts[0], prompts[3]]
    begin = start(Reinjection(6, 0.25), lm, {}, prompts)
    with torch.no_grad():
        mixed, plain = (states_of(lm, b, texts[:2], (6,))[0] for b in (begin, replace(begin, update=None)))
    for name, tensor in mixed.tensors.items():
        text, prompt = plain.tensors[name], begin.state.tensors[name]
        assert_close(tensor, text if "conv" in name else 0.75 * text + 0.25 * prompt)
    tuned = start(TunedState(5, 0.01), lm, {}, prompts)
    ids, valid = lm.encode_prompts(prompts)
    with torch.no_grad():
        assert (context_nll(lm, ids, valid, tuned.state) < context_nll(lm, ids, valid, begin.state)).all()
