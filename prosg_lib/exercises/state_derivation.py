"""Exercises of notebook 01: the recurrence of RWKV-4, made safe in floating point, and its state."""

import torch

from prosg_lib.backbones.rwkv import interpolate
from prosg_lib.backbones.rwkv import token_shift as previous_tokens
from prosg_lib.backbones.rwkv4 import STATE_NAMES
from prosg_lib.backbones.wkv import WKVState, wkv_recurrent
from prosg_lib.exercises.checking import Exercise, Mistake


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _decay(width):
    return torch.linspace(0.05, 1.5, width, dtype=torch.float64)


def _step_inputs(batch, width, seed):
    """num, den, w, u, k, v of one step, after a text of which den is known to be positive."""
    num, u, k, v = (_normal(*s, seed=seed + i) for i, s in enumerate([(batch, width), (width,), *[(batch, width)] * 2]))
    return num, _normal(batch, width, seed=seed + 9).exp(), _decay(width), u, k, v


# 1.1


def wkv_step(num, den, w, u, k, v):
    """One token of the WKV recurrence, with plain sums.

    Args:
        num, den: the sums over the past, (B, D) each.
        w: decay a token, (D).
        u: bonus of the current token, (D).
        k, v: the current token's key and value, (B, D) each.
    Returns:
        wkv of this token (B, D), and num and den for the next token (B, D) each.
    """
    now = torch.exp(u + k)
    wkv = (num + now * v) / (den + now)
    return wkv, torch.exp(-w) * num + torch.exp(k) * v, torch.exp(-w) * den + torch.exp(k)


def _by_library(num, den, w, u, k, v):
    out, state = wkv_recurrent(w, u, k[:, None], v[:, None], WKVState(num, den, torch.zeros_like(num)))
    return out[:, 0], state.num * state.m.exp(), state.den * state.m.exp()


def step_with_bonus_kept(num, den, w, u, k, v):
    now = torch.exp(u + k)
    wkv = (num + now * v) / (den + now)
    return wkv, torch.exp(-w) * num + now * v, torch.exp(-w) * den + now


def step_without_the_current_token(num, den, w, u, k, v):
    return num / den, torch.exp(-w) * num + torch.exp(k) * v, torch.exp(-w) * den + torch.exp(k)


def step_without_decay(num, den, w, u, k, v):
    now = torch.exp(u + k)
    return (num + now * v) / (den + now), num + torch.exp(k) * v, den + torch.exp(k)


def step_that_grows(num, den, w, u, k, v):
    now = torch.exp(u + k)
    wkv = (num + now * v) / (den + now)
    return wkv, torch.exp(w) * num + torch.exp(k) * v, torch.exp(w) * den + torch.exp(k)


def step_that_decays_the_new(num, den, w, u, k, v):
    now = torch.exp(u + k)
    wkv = (num + now * v) / (den + now)
    return wkv, torch.exp(-w) * (num + torch.exp(k) * v), torch.exp(-w) * (den + torch.exp(k))


# 1.2


def stable_step(num, den, m, w, u, k, v):
    """One token of the WKV recurrence, with sums relative to a common factor e^m.

    Args:
        num, den, m: the sums over the past are num e^m and den e^m, (B, D) each; m = -1e38 before the first token.
        w: decay a token, (D).
        u: bonus of the current token, (D).
        k, v: the current token's key and value, (B, D) each; keys may be -1,000 or 1,000.
    Returns:
        wkv of this token, and num, den and m for the next token, (B, D) each.
    """
    top = torch.maximum(m, u + k)
    past, now = torch.exp(m - top), torch.exp(u + k - top)
    wkv = (past * num + now * v) / (past * den + now)
    top = torch.maximum(m - w, k)
    past, now = torch.exp(m - w - top), torch.exp(k - top)
    return wkv, past * num + now * v, past * den + now, top


def _stable_by_library(num, den, m, w, u, k, v):
    out, state = wkv_recurrent(w, u, k[:, None], v[:, None], WKVState(num, den, m))
    return out[:, 0], *state


def _stable_cases():
    num, den, w, u, k, v = _step_inputs(2, 6, seed=20)
    blank = torch.zeros_like(num)
    return [
        (num, den, _normal(2, 6, seed=40), w, u, k, v),  # nothing is large
        (num, den, 790 + _normal(2, 6, seed=41), w, u, k + 800, v),  # loud: e^800 is no number in float64
        (num, den, _normal(2, 6, seed=42), w + 800, u, k - 900, v),  # all is quiet: the past fades, the new is small
        (blank, blank, torch.full_like(num, -1e38), w, u, k, v),  # nothing was read yet
    ]


def stable_step_in_name(num, den, m, w, u, k, v):
    now = torch.exp(u + k)
    wkv = (torch.exp(m) * num + now * v) / (torch.exp(m) * den + now)
    top = torch.maximum(m - w, k)
    past, new = torch.exp(m - w - top), torch.exp(k - top)
    return wkv, past * num + new * v, past * den + new, top


def gauge_without_decay(num, den, m, w, u, k, v):
    top = torch.maximum(m, u + k)
    past, now = torch.exp(m - top), torch.exp(u + k - top)
    wkv = (past * num + now * v) / (past * den + now)
    top = torch.maximum(m, k)
    past, now = torch.exp(m - w - top), torch.exp(k - top)
    return wkv, past * num + now * v, past * den + now, top


def old_sums_not_rescaled(num, den, m, w, u, k, v):
    top = torch.maximum(m, u + k)
    past, now = torch.exp(m - top), torch.exp(u + k - top)
    wkv = (past * num + now * v) / (past * den + now)
    top = torch.maximum(m - w, k)
    now = torch.exp(k - top)
    return wkv, torch.exp(-w) * num + now * v, torch.exp(-w) * den + now, top


def old_gauge_returned(num, den, m, w, u, k, v):
    top = torch.maximum(m, u + k)
    past, now = torch.exp(m - top), torch.exp(u + k - top)
    wkv = (past * num + now * v) / (past * den + now)
    top = torch.maximum(m - w, k)
    past, now = torch.exp(m - w - top), torch.exp(k - top)
    return wkv, past * num + now * v, past * den + now, m


# 1.3


def merge(first, second, w, length):
    """The sums over two pieces of text, from the sums over each, both read from a blank state (all gauges are 0).

    Args:
        first, second: num and den of either piece, pairs of (B, D).
        w: decay a token, (D).
        length: number of tokens in the second piece.
    Returns:
        num and den over both, (B, D) each.
    """
    faded = torch.exp(-w * length)
    return faded * first[0] + second[0], faded * first[1] + second[1]


def _read_on(first, second, w, length):
    num, den = first
    for _ in range(length):
        num, den = torch.exp(-w) * num, torch.exp(-w) * den
    return num + second[0], den + second[1]


def merge_one_decay(first, second, w, length):
    return torch.exp(-w) * first[0] + second[0], torch.exp(-w) * first[1] + second[1]


def merge_decays_the_second(first, second, w, length):
    faded = torch.exp(-w * length)
    return first[0] + faded * second[0], first[1] + faded * second[1]


def merge_of_means(first, second, w, length):
    faded = torch.exp(-w * length)
    return faded * first[0] / first[1] + second[0] / second[1], faded * first[1] + second[1]


# 1.4


def token_shift(x, last, mix):
    """Mixes every token's vector with that of the token before.

    Args:
        x: the tokens' vectors, (B, T, D).
        last: the vector of the token before the first, from the state, (B, D).
        mix: the share of the token's own vector, channel by channel, (D).
    Returns:
        The mixed vectors (B, T, D), and what the state keeps for the next piece of text (B, D).
    """
    previous = torch.cat([last[:, None], x[:, :-1]], 1)
    return mix * x + (1 - mix) * previous, x[:, -1]


def _shift_by_library(x, last, mix):
    previous, x = previous_tokens(x, last, None)
    return interpolate(previous, x, mix)[0], x[:, -1]


def shift_without_state(x, last, mix):
    previous = torch.cat([torch.zeros_like(last)[:, None], x[:, :-1]], 1)
    return mix * x + (1 - mix) * previous, x[:, -1]


def shift_mixed_up(x, last, mix):
    previous = torch.cat([last[:, None], x[:, :-1]], 1)
    return (1 - mix) * x + mix * previous, x[:, -1]


def shift_to_the_future(x, last, mix):
    following = torch.cat([x[:, 1:], last[:, None]], 1)
    return mix * x + (1 - mix) * following, x[:, -1]


def shift_keeps_the_mixed(x, last, mix):
    previous = torch.cat([last[:, None], x[:, :-1]], 1)
    mixed = mix * x + (1 - mix) * previous
    return mixed, mixed[:, -1]


# 1.5


def state_bytes(tokens, layers, width, bytes_a_number):
    """How many bytes the state of an RWKV-4 takes.

    Args:
        tokens: how many tokens were read.
        layers: number of blocks.
        width: size of a vector, D.
        bytes_a_number: 4 for float32.
    Returns:
        A number of bytes.
    """
    return 5 * layers * width * bytes_a_number


EXERCISES = (
    Exercise(
        number="1.1",
        title="one step of the recurrence",
        stars=2,
        minutes=10,
        task="Write one step: from the sums before a token to what the channel reads out, and to the sums after it.",
        hint="Three lines. The bonus $u$ belongs to the read-out alone: once the token is past, it is weighed like any "
        "other. The decay applies to what was there before.",
        solution=wkv_step,
        expected=_by_library,
        cases=lambda: [_step_inputs(2, 6, seed=0), _step_inputs(3, 4, seed=10)],
        results=("wkv", "num", "den"),
        why="This is a whole layer's memory: two numbers a channel, whatever was read. A loop over your step computes "
        "what the sum over the past computes, in time linear in the text.",
        mistakes=(
            Mistake(
                step_with_bonus_kept,
                "wkv is right, the sums are not: the bonus u is for the current token only and must not enter num and "
                "den.",
            ),
            Mistake(
                step_without_the_current_token,
                "You read out the past alone. The current token takes part, with the weight e^(u + k).",
            ),
            Mistake(step_without_decay, "The decay is missing: every token multiplies the old sums by e^(-w)."),
            Mistake(step_that_grows, "The sign of w: e^(w) lets old tokens grow; they should fade, by e^(-w)."),
            Mistake(
                step_that_decays_the_new,
                "The new token has age 0 and is not decayed yet; e^(-w) multiplies the old sums only.",
            ),
        ),
        misconception="That the denominator is a count. It is the sum of the weights, and it decays like the "
        "numerator; without it the output would shrink while quiet tokens are read.",
        discussion=(
            "What does the channel read out after a thousand very quiet tokens, and why?",
            "Softmax attention is such a weighted mean, too. What does it keep that num and den do not?",
        ),
    ),
    Exercise(
        number="1.2",
        title="a step that cannot overflow",
        stars=3,
        minutes=20,
        task="The same step with sums relative to $e^m$. The check uses keys that plain sums do not survive, and a "
        "blank state ($m = -10^{38}$). Any gauge is right as long as nothing overflows or vanishes.",
        hint="Do it twice. For the read-out the two exponents are $m$ and $u + k$; for the sums afterwards they are "
        "$m - w$ and $k$. Subtract the larger from both before you call `exp`.",
        solution=stable_step,
        expected=_stable_by_library,
        cases=_stable_cases,
        results=("wkv", "num", "den", "m"),
        seen=lambda wkv, num, den, m: {"wkv": wkv, "num / den": num / den, "log den + m": torch.log(den) + m},
        why="This running maximum is the log-sum-exp trick, one token at a time. Flash attention uses the same step to "
        "compute a softmax without seeing all scores at once: the online softmax.",
        mistakes=(
            Mistake(
                stable_step_in_name,
                "The sums are safe, the read-out is not: exp(u + k) overflows, and exp(m) does. It needs a gauge of "
                "its own, max(m, u + k).",
            ),
            Mistake(
                gauge_without_decay,
                "Compare the exponents as they are after the decay, max(m - w, k). With max(m, k) both terms vanish "
                "where the past has faded and the new token is quiet.",
            ),
            Mistake(
                old_sums_not_rescaled,
                "The new sums are relative to the new gauge, so the old ones must be moved there: by e^(m - w - m'), "
                "not by e^(-w).",
            ),
            Mistake(
                old_gauge_returned,
                "num and den are relative to the new gauge, so the new gauge has to be returned with them.",
            ),
        ),
        misconception="That m is a part of the memory. It cancels: (num, den, m) and (num e^-5, den e^-5, m + 5) are "
        "the same state.",
        discussion=(
            "Why is the blank gauge -1e38 and not minus infinity?",
            "Which values of m would also be right? What is the cost of a bad choice?",
        ),
    ),
    Exercise(
        number="1.3",
        title="gluing two memories",
        stars=2,
        minutes=10,
        task="Two pieces of text were read apart, each from a blank state. Compute the sums over both, one after the "
        "other.",
        hint="While the second piece is read, what happens to the sums of the first?",
        solution=merge,
        expected=_read_on,
        cases=lambda: [
            tuple([(_normal(2, 4, seed=s), _normal(2, 4, seed=s + 1).exp()) for s in (50, 60)] + [_decay(4), 3]),
            tuple([(_normal(1, 5, seed=s), _normal(1, 5, seed=s + 1).exp()) for s in (70, 80)] + [_decay(5), 7]),
        ],
        results=("num", "den"),
        why="One channel's memory is additive up to a decay, so prompts could be read in parallel and glued. In the "
        "whole model that fails: the keys of deeper blocks depend on everything read before.",
        mistakes=(
            Mistake(
                lambda first, second, w, length: (first[0] + second[0], first[1] + second[1]),
                "The first piece's sums fade while the second is read; yours do not.",
            ),
            Mistake(merge_one_decay, "You let one token pass. The first piece fades by e^(-w) for each of `length`."),
            Mistake(merge_decays_the_second, "The older piece fades, not the newer: decay the first."),
            Mistake(
                merge_of_means,
                "You add means. Numerators and denominators are added separately and divided at the very end.",
            ),
        ),
        misconception="That states of the whole model can be glued like this. They cannot; deltas can be added "
        "(notebook 04), and that is one of their attractions.",
        discussion=("Why is it exact for one layer, and wrong for two?",),
    ),
    Exercise(
        number="1.4",
        title="token shift",
        stars=1,
        minutes=10,
        task="Before either mix, RWKV blends each token's vector with that of the token before, channel by channel. "
        "Write it for a piece of text that continues another: the token before the first one comes from the state.",
        hint="`torch.cat` puts `last` in front of all but the last of `x`. It needs a time axis: `last[:, None]`.",
        solution=token_shift,
        expected=_shift_by_library,
        cases=lambda: [
            (_normal(2, 5, 4, seed=1), _normal(2, 4, seed=2), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)),
            (_normal(3, 1, 4, seed=3), _normal(3, 4, seed=4), torch.linspace(0.2, 0.7, 4, dtype=torch.float64)),
        ],
        results=("mixed", "the state's vector"),
        why="It lets a layer see two neighbouring tokens at once, and it is the reason why two of the five vectors of "
        "the state are nothing but the last token's inputs.",
        mistakes=(
            Mistake(
                lambda x, last, mix: (mix * x + (1 - mix) * x.roll(1, 1), x[:, -1]),
                "roll brings the last token to the front. What stands before the first token is `last`, from the "
                "state.",
            ),
            Mistake(
                shift_without_state,
                "You start from zeros. That is right only for a blank state; here the text goes on, from `last`.",
            ),
            Mistake(shift_mixed_up, "mix is the share of the token's own vector, and 1 - mix that of the one before."),
            Mistake(shift_to_the_future, "You mix with the token that follows; a language model must not see it."),
            Mistake(
                shift_keeps_the_mixed,
                "The mixed vectors are right. The state keeps the last token's vector as it was before mixing.",
            ),
        ),
        misconception="That token shift is a second recurrence. It reaches back exactly one token, because what is "
        "kept is the unmixed vector; depth extends the reach, time does not.",
        discussion=("How many tokens back can the token shifts of four blocks see, without the WKV sums?",),
    ),
    Exercise(
        number="1.5",
        title="the size of a state",
        stars=1,
        minutes=5,
        task="How many bytes does the state take? (For 24 blocks of width 1,024 in float32, a published size of "
        "RWKV-4, the answer is below half a megabyte.)",
        hint="Five vectors a block: which ones?",
        solution=state_bytes,
        expected=lambda tokens, layers, width, size: sum(layers * width * size for _ in STATE_NAMES),
        cases=lambda: [(1_000, 24, 1024, 4), (10, 4, 128, 4), (3, 2, 8, 2)],
        results=("bytes",),
        why="The text's length does not enter. Constant memory is what recurrent models promise, and it is why they "
        "forget: whatever is new has to displace something old.",
        mistakes=(
            Mistake(
                lambda tokens, layers, width, bytes_a_number: 5 * tokens * layers * width * bytes_a_number,
                "That would be a cache that grows with the text. A recurrent state is written over.",
            ),
            Mistake(
                lambda tokens, layers, width, bytes_a_number: 5 * layers * width,
                "That is the count of numbers. How many bytes has one?",
            ),
            Mistake(
                lambda tokens, layers, width, bytes_a_number: 3 * layers * width * bytes_a_number,
                "num, den and m are three of the vectors. The last token's inputs to both mixes are kept as well.",
            ),
            Mistake(
                lambda tokens, layers, width, bytes_a_number: 5 * width * bytes_a_number,
                "That is one block's share; every block has a state of its own.",
            ),
        ),
        misconception="That a longer prompt has a larger state.",
        discussion=("From how many tokens on is the cache of a transformer of the same width larger?",),
    ),
)
