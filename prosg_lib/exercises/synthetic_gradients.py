"""Exercises of notebook 04: how a delta is applied, what a generator reads of a state, and what each token writes."""

import torch

from prosg_lib.backbones.state import Normaliser
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.exercises.checking import Exercise, Mistake, random_tensors


def _padded(*lengths):
    """Left padding, (B, T): False where a shorter prompt has no token."""
    return torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]


# 4.1


def changed(x, w, u, v, scale):
    """The output of a linear map with a delta of its own for each sequence, without forming any changed weight.

    Args:
        x: the map's input, (B, T, in).
        w: its weight, (out, in).
        u, v: the delta's factors, (B, out, rank) and (B, in, rank).
        scale: of the delta, a number.
    Returns:
        y = x W^T + scale (x V) U^T, (B, T, out).
    """
    return x @ w.T + scale * (x @ v) @ u.mT


def _by_library(x, w, u, v, scale):
    map_ = torch.nn.Linear(w.shape[1], w.shape[0], False, dtype=w.dtype)
    map_.weight.data = w
    with applied(_OneMap(map_), LowRankDelta({"map": Factors(u, v)}, "one map", scale)):
        return map_(x)


class _OneMap:
    """What a delta needs of a model."""

    tokenizer, peft_refuses = None, ()

    def __init__(self, map_):
        self._map = map_

    def editable(self):
        return {"map": self._map}

    def fingerprint(self):
        return "one map"


# 4.2


def normalised(features, texts):
    """State features with zero mean and unit variance, channel by channel, by statistics of other texts.

    Args:
        features: of a batch of prompts, (B, F).
        texts: features of many texts, collected once, before training, (N, F).
    Returns:
        (B, F). A channel that is the same in all texts is only centred.
    """
    std = texts.std(0)
    return (features - texts.mean(0)) / torch.where(std > 1e-6, std, 1.0)


def _by_normaliser(features, texts):
    found = Normaliser.fit(texts)
    return (features - found.mean) / found.std


def _features():
    scale = torch.tensor([1.0, 1e3, 1e-2, 5.0, 0.0], dtype=torch.float64)
    features, texts = random_tensors((3, 5), (40, 5), seed=3)
    return [(7 + features * scale, 7 + texts * scale), (1 - features[:2] * scale, texts * scale)]


def normalised_by_batch(features, texts):
    std = features.std(0)
    return (features - features.mean(0)) / torch.where(std > 1e-6, std, 1.0)


def normalised_by_variance(features, texts):
    variance = texts.var(0)
    return (features - texts.mean(0)) / torch.where(variance > 1e-6, variance, 1.0)


# 4.3


def written(g, x, v, valid):
    """U of a batch of prompts, from the gradients that a generator predicts: the sum over t of g_t (V^T x_t)^T.

    Args:
        g: predicted gradient at the map's output, (B, T, out).
        x: the map's input, (B, T, in).
        v: V, shared by all prompts, (in, rank).
        valid: False at the padding of shorter prompts, (B, T).
    Returns:
        U, (B, out, rank).
    """
    return (g * valid[..., None]).mT @ (x @ v)


def _token_by_token(g, x, v, valid):
    u = torch.zeros(len(g), g.shape[2], v.shape[1], dtype=g.dtype)
    for b, t in valid.nonzero().tolist():
        u[b] += torch.outer(g[b, t], v.T @ x[b, t])
    return u


EXERCISES = (
    Exercise(
        number="4.1",
        title="a weight that is never written",
        stars=2,
        minutes=10,
        task="Compute the output of a map with a delta for each sequence of the batch. Form no matrix of the size of "
        "W.",
        hint="Read from right to left: `x @ v` is (B, T, rank). Then `u.mT` brings it to the outputs.",
        solution=changed,
        expected=_by_library,
        cases=lambda: [
            (*random_tensors((2, 3, 5), (4, 5), (2, 4, 2), (2, 5, 2)), 0.5),
            (*random_tensors((3, 1, 6), (6, 6), (3, 6, 1), (3, 6, 1), seed=1), -2.0),
        ],
        results=("y (B, T, out)",),
        why="The base weights stay as they are: removing a delta is exact, and every sequence of a batch may have "
        "another one.",
        mistakes=(
            Mistake(lambda x, w, u, v, scale: x @ w.T + (x @ v) @ u.mT, "The delta's scale is missing."),
            Mistake(
                lambda x, w, u, v, scale: x @ w.T + scale * (x @ v[0]) @ u[0].T,
                "Every sequence gets the first one's delta. Keep the batch axis of u and v.",
            ),
            Mistake(
                lambda x, w, u, v, scale: x @ (w + scale * (u @ v.mT).mean(0)).T,
                "You average the deltas of the batch. Each sequence keeps its own.",
            ),
            Mistake(
                lambda x, w, u, v, scale: scale * (x @ v) @ u.mT,
                "This is the change alone; the map's own output x W^T is missing.",
            ),
            Mistake(
                lambda x, w, u, v, scale: scale * (x @ w.T + (x @ v) @ u.mT),
                "The scale belongs to the delta; you scale the map's own output as well.",
            ),
        ),
        misconception="That a delta for each sequence needs a copy of the weight for each. It needs two thin factors.",
        discussion=("From which rank on would it be cheaper to form W + scale U V^T once and use it?",),
    ),
    Exercise(
        number="4.2",
        title="five vectors of different kinds",
        stars=1,
        minutes=10,
        task="The channels of a state differ in size by orders of magnitude. Bring each to zero mean and unit variance "
        "by statistics of other texts, collected once.",
        hint="Which axis of `texts` is the one of texts? What happens to a channel whose deviation is zero?",
        solution=normalised,
        expected=_by_normaliser,
        cases=_features,
        results=("(B, F)",),
        why="Fixed statistics make a feature mean the same in every batch, also in a batch of one prompt, which is "
        "what a user has.",
        mistakes=(
            Mistake(
                lambda features, texts: (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True),
                "You normalise over the channels of each prompt, as a layer norm does. Each channel needs its own "
                "statistics, over texts.",
            ),
            Mistake(
                normalised_by_batch,
                "You use the batch's own statistics. A single prompt would be all zeros; use those of `texts`.",
            ),
            Mistake(normalised_by_variance, "Divide by the standard deviation, not by the variance."),
            Mistake(
                lambda features, texts: (features - texts.mean()) / texts.std(),
                "One mean and deviation for all channels leaves the small ones invisible.",
            ),
            Mistake(
                lambda features, texts: (features - texts.mean(0)) / texts.std(0),
                "A channel that never changes has the deviation 0, and 0 by 0 is no number. Divide it by 1.",
            ),
        ),
        misconception="That a layer norm would do the same. It compares the channels of one state with each other, and "
        "the loud ones win.",
        discussion=("Which of the five vectors may be dropped, and why is num / den a better feature than both?",),
    ),
    Exercise(
        number="4.3",
        title="what a prompt writes",
        stars=2,
        minutes=10,
        task="A generator has predicted $g_t$ for every token of a batch of prompts. Add up what they write. Prompts "
        "of different lengths are padded on the left, and padding must write nothing.",
        hint="Exercise 3.4 for a batch: `.mT` transposes the last two axes. Set $g_t$ to zero at the padding first.",
        solution=written,
        expected=_token_by_token,
        cases=lambda: [
            (*random_tensors((2, 6, 4), (2, 6, 5), (5, 3)), _padded(6, 2)),
            (*random_tensors((3, 4, 3), (3, 4, 3), (3, 3), seed=1), _padded(1, 4, 3)),
        ],
        results=("U (B, out, rank)",),
        why="It is a sum over tokens, so it streams: read a prompt in pieces and add up. It also adds: two prompts' "
        "U's sum to a U of the same rank.",
        mistakes=(
            Mistake(
                lambda g, x, v, valid: g.mT @ (x @ v),
                "Padding writes, too. Multiply by `valid` before you sum over tokens.",
            ),
            Mistake(
                lambda g, x, v, valid: torch.einsum("bto,btr->or", g * valid[..., None], x @ v).expand(len(g), -1, -1),
                "You sum over the batch as well. Each prompt has a delta of its own; keep the first axis.",
            ),
            Mistake(
                lambda g, x, v, valid: (x @ v).mT @ (g * valid[..., None]),
                "This is U transposed: what is written, g, belongs to the outputs, (out, rank).",
            ),
            Mistake(
                lambda g, x, v, valid: (g * valid[..., None]).mT @ (x @ v) / valid.sum(1)[:, None, None],
                "You divide by the number of tokens. Then a fact would fade by being told among others; it is a sum.",
            ),
            Mistake(
                lambda g, x, v, valid: (g * valid[..., None]).mT @ x,
                "V is missing: each input is read through it, as V^T x_t, of size rank.",
            ),
        ),
        misconception="That the rank limits how many tokens can be written. It limits how many addresses can be told "
        "apart; any number of tokens adds up.",
        discussion=(
            "What happens to a fact if another prompt is added that writes under nearly the same key?",
            "Which token of a prompt is never written, and why?",
        ),
    ),
)
