"""Exercises of notebook 06c: a memory of outer products, two scores of the same answers, and a transformed gradient."""

import numpy as np
import torch

from prosg_lib.exercises.checking import Exercise, Mistake

# 6.7


def share_recalled(keys, values):
    """The share of facts that a sum of outer products gives back.

    Args:
        keys, values: one row a fact, (facts, r) and (facts, n).
    Returns:
        A number from 0 to 1: each key is asked; it counts if, of all stored values, the right one has the largest inner
        product with what the memory says.
    """
    memory = values.T @ keys
    said = keys @ memory.T
    nearest = (said @ values.T).argmax(1)
    return float((nearest == np.arange(len(keys))).mean())


def _fact_by_fact(keys, values):
    right = 0
    for number, key in enumerate(keys):
        said = sum(value * float(k @ key) for k, value in zip(keys, values, strict=True))
        right += max(range(len(values)), key=lambda place: float(values[place] @ said)) == number
    return right / len(keys)


def _facts():
    return [
        (np.random.default_rng(seed).normal(size=(facts, r)), np.random.default_rng(seed + 9).normal(size=(facts, n)))
        for seed, facts, r, n in ((0, 24, 8, 12), (1, 16, 6, 5), (2, 40, 16, 8), (3, 30, 5, 5))
    ]


def recalled_by_looking_back(keys, values):
    scores = keys @ keys.T
    weights = np.exp(10 * (scores - scores.max(1, keepdims=True)))
    said = weights / weights.sum(1, keepdims=True) @ values
    return float(((said @ values.T).argmax(1) == np.arange(len(keys))).mean())


def recalled_last(keys, values):
    memory = np.outer(values[-1], keys[-1])
    return float(((keys @ memory.T @ values.T).argmax(1) == np.arange(len(keys))).mean())


def recalled_fact_alone(keys, values):
    right = [(values @ (np.outer(v, k) @ k)).argmax() == i for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    return float(np.mean(right))


def recalled_nearest_in_space(keys, values):
    said = keys @ (values.T @ keys).T
    away = ((said[:, None] - values[None]) ** 2).sum(-1)
    return float((away.argmin(1) == np.arange(len(keys))).mean())


def recalled_first(keys, values):
    said = keys @ (values.T @ keys).T
    return float(((said @ values.T).argmax(0) == np.arange(len(keys))).mean())


# 6.8


def two_scores(predicted, gold):
    """Two scores of the same answers.

    Args:
        predicted, gold: token ids, one row a problem, (problems, tokens).
    Returns:
        The share of tokens that are right in their place, and the share of problems that are right in every token.
    """
    right = predicted == gold
    return right.mean(), right.all(1).mean()


def _by_loops(predicted, gold):
    tokens = problems = 0
    for said, wanted in zip(predicted.tolist(), gold.tolist(), strict=True):
        here = sum(s == w for s, w in zip(said, wanted, strict=True))
        tokens, problems = tokens + here, problems + (here == len(wanted))
    return tokens / gold.size, problems / len(gold)


def _numbers():
    cases = []
    for seed, problems, digits, wrong in ((0, 20, 10, 0.1), (1, 9, 4, 0.2), (2, 12, 6, 0.05)):
        rng = np.random.default_rng(seed)
        gold = rng.integers(10, size=(problems, digits))
        hard = rng.random((problems, 1)) < 0.5  # errors come together
        cases.append((np.where(hard & (rng.random(gold.shape) < 2 * wrong), (gold + 1) % 10, gold), gold))
    return cases


def scores_if_independent(predicted, gold):
    share = (predicted == gold).mean()
    return share, share ** gold.shape[1]


def scores_in_any_order(predicted, gold):
    found = [np.isin(wanted, said) for said, wanted in zip(predicted, gold, strict=True)]
    return np.mean(found), np.mean([row.all() for row in found])


# 6.9


def transformed_step(g, x, v, eta, transform):
    """A step along a prompt's gradient whose factors were transformed token by token, read along V (MEND, rank r).

    Args:
        g: gradient at the map's output, one row a token, (tokens, out).
        x: the map's input, (tokens, in).
        v: reading directions, (in, r).
        eta: step size.
        transform: network on [x; g], one row a token: (tokens, in + out) -> (tokens, in + out).
    Returns:
        U (out, r), such that the change of the weights is U V^T.
    """
    both = transform(torch.cat([x, g], 1))
    new_x, new_g = both[:, : x.shape[1]], both[:, x.shape[1] :]
    return -eta * new_g.T @ (new_x @ v)


def _token_by_token(g, x, v, eta, transform):
    both = transform(torch.cat([x, g], -1))
    change = torch.zeros(g.shape[1], v.shape[1], dtype=g.dtype)
    for row in both:
        new_x, new_g = row.split([x.shape[1], g.shape[1]])
        change -= eta * torch.outer(new_g, v.mT @ new_x)
    return change


def _steps():
    cases = []
    for seed, tokens, n_in, n_out, r in ((0, 7, 6, 5, 3), (1, 9, 4, 8, 2), (2, 6, 5, 5, 5)):
        draw = torch.Generator().manual_seed(seed)
        g, x, v, a = (
            torch.randn(shape, generator=draw, dtype=torch.float64)
            for shape in ((tokens, n_out), (tokens, n_in), (n_in, r), (n_in + n_out, n_in + n_out))
        )
        cases.append((g, x, v, 0.3, lambda z, a=a: z + torch.relu(z @ a)))
    return cases


def step_uphill(g, x, v, eta, transform):
    both = transform(torch.cat([x, g], 1))
    return eta * both[:, x.shape[1] :].T @ (both[:, : x.shape[1]] @ v)


def step_the_other_way_round(g, x, v, eta, transform):
    both = transform(torch.cat([g, x], 1))
    return -eta * both[:, : g.shape[1]].T @ (both[:, g.shape[1] :] @ v)


def step_as_mean(g, x, v, eta, transform):
    both = transform(torch.cat([x, g], 1))
    return -eta * both[:, x.shape[1] :].T @ (both[:, : x.shape[1]] @ v) / len(g)


EXERCISES = (
    Exercise(
        number="6.7",
        title="what a sum of outer products holds",
        stars=2,
        minutes=15,
        task="Write facts into a memory: the sum of the outer products of value and key. Then ask each key, and say "
        "which share of the facts comes back.",
        hint="`memory` is (n, r), one product of two matrices. What it says to a key is `memory @ key`. All inner "
        "products with the stored values at once: `said @ values.T`, and `argmax(1)`.",
        solution=share_recalled,
        expected=_fact_by_fact,
        cases=_facts,
        results=("the share",),
        why="What comes back is v (k · k) plus the other values, each times its key's likeness to k. While keys are "
        "unlike, the first term wins. This is linear attention, and a delta of the token-wise generator.",
        mistakes=(
            Mistake(
                recalled_by_looking_back,
                "You compare the key with every stored key and take a softmax. That is attention: it keeps all pairs. "
                "Here only their sum is kept.",
            ),
            Mistake(recalled_last, "Your memory holds the last fact alone. Sum the outer products of all of them."),
            Mistake(recalled_fact_alone, "You ask each fact of a memory that holds it alone, so nothing interferes."),
            Mistake(
                recalled_nearest_in_space,
                "You take the value that is nearest in distance. What the memory says is far too long for that; take "
                "the largest inner product.",
            ),
            Mistake(
                recalled_first,
                "`argmax` goes over the wrong axis: for each key the likeliest value is asked, not for each value the "
                "likeliest key.",
            ),
        ),
        misconception="That r directions hold r facts. With random keys errors begin well before, and it goes on "
        "working in part long after.",
        discussion=(
            "Which keys would you choose, if you could?",
            "A delta rule first subtracts what the memory says to a key already. What would that change?",
        ),
    ),
    Exercise(
        number="6.8",
        title="nearly right, or all of it",
        stars=1,
        minutes=5,
        task="Score the same answers twice: by tokens, and by problems, where only a whole right answer counts.",
        hint="`predicted == gold` has the shape (problems, tokens). Two means of it, one of them after `all`.",
        solution=two_scores,
        expected=_by_loops,
        cases=_numbers,
        results=("by tokens", "by problems"),
        why="Ten digits, each right with 0.9, make a whole number with 0.35 if errors are independent, and with more "
        "if they come together. So 0 in the phone book is not the same as knowing nothing.",
        mistakes=(
            Mistake(
                scores_if_independent,
                "You multiply shares, as if errors were independent. Count the problems that are right in every token.",
            ),
            Mistake(
                lambda predicted, gold: ((predicted == gold).mean(), (predicted == gold).any(1).mean()),
                "You count a problem as soon as one token is right.",
            ),
            Mistake(
                lambda predicted, gold: ((predicted == gold).mean(), (predicted == gold).all()),
                "You ask whether every problem is right. Asked is the share that is.",
            ),
            Mistake(
                lambda predicted, gold: ((predicted == gold).mean(), (predicted == gold).all(0).mean()),
                "`all` goes over the wrong axis: this is the share of *places* that are right in all problems.",
            ),
            Mistake(scores_in_any_order, "A digit counts in its place only. You accept it anywhere in the answer."),
        ),
        misconception="That the stricter score is the more honest one. It hides differences among weak models, as the "
        "lenient one hides them among strong ones.",
        discussion=("Which of the two scores would show earlier in a training that something is learned?",),
    ),
    Exercise(
        number="6.9",
        title="a gradient, transformed",
        stars=2,
        minutes=15,
        task="Write V3's change of one map: the networks transform $x_t$ and $g_t$ of every token together; then it is "
        "a step along the gradient, read along the directions $V$: "
        "$U = -\\eta \\sum_t \\tilde g_t (V^\\top \\tilde x_t)^\\top$.",
        hint="Concatenate x and g along the last axis, in this order, transform, and take them apart. The sum over "
        "tokens is a product of two matrices (exercises 3.1 and 3.4).",
        solution=transformed_step,
        expected=_token_by_token,
        cases=_steps,
        results=("U",),
        why="If the networks do nothing this is one step of LoRA, exercise 3.4. And it needs g: a backward pass "
        "through the prompt, which the token-wise generator saves by predicting it.",
        mistakes=(
            Mistake(step_uphill, "The sign is wrong: this goes up the gradient of the prompt's loss."),
            Mistake(
                lambda g, x, v, eta, transform: -eta * g.T @ (x @ v),
                "This is a plain gradient step. Where are the networks?",
            ),
            Mistake(
                lambda g, x, v, eta, transform: -eta * transform(torch.cat([x, g], 1))[:, x.shape[1] :].T @ (x @ v),
                "You use the transformed g with the old x. Both come out of the networks.",
            ),
            Mistake(
                lambda g, x, v, eta, transform: -eta * g.T @ (transform(torch.cat([x, g], 1))[:, : x.shape[1]] @ v),
                "You use the transformed x with the old g. Both come out of the networks.",
            ),
            Mistake(step_the_other_way_round, "The networks expect x first and g behind it."),
            Mistake(
                step_as_mean, "You take the mean over tokens. The loss is summed over tokens here, and so is this."
            ),
        ),
        misconception="That a transformed gradient must be better than a predicted one, because it starts from the "
        "truth. It starts from the gradient of *reading* the prompt, which answers no question.",
        discussion=("What is V3 at the start of its training, and why is that a good place to start?",),
    ),
)
