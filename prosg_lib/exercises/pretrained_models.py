"""Exercises of notebook 08: padding that leaves no trace, memories added and removed, one change for many, LoRA."""

import torch

from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.exercises.checking import Exercise, Mistake, random_tensors

# 8.1


def state_after(h, decay, write, valid):
    """The state of a recurrence h <- decay * h + write after a left-padded batch of texts.

    Args:
        h: the state before, from an earlier text and not blank, (B, D).
        decay, write: of every column, padding included, (B, T, D).
        valid: False where a column is padding, (B, T).
    Returns:
        The state that each text gives when it is read alone, without padding, (B, D).
    """
    for t in range(valid.shape[1]):
        after = decay[:, t] * h + write[:, t]
        h = torch.where(valid[:, t, None], after, h)
    return h


def _alone(h, decay, write, valid):
    rows = []
    for row, there in enumerate(valid):
        state = h[row]
        for d, w in zip(decay[row][there], write[row][there], strict=True):
            state = d * state + w
        rows.append(state)
    return torch.stack(rows)


def _padded_texts():
    lengths = torch.tensor([5, 2, 4])
    valid = torch.arange(5) >= 5 - lengths[:, None]
    h, decay, write = random_tensors((3, 4), (3, 5, 4), (3, 5, 4))
    return [(h, decay.sigmoid(), write, valid)]


def state_of_every_column(h, decay, write, valid):
    for t in range(valid.shape[1]):
        h = decay[:, t] * h + write[:, t]
    return h


def state_that_decays_at_padding(h, decay, write, valid):
    for t in range(valid.shape[1]):
        h = decay[:, t] * h + valid[:, t, None] * write[:, t]
    return h


def state_wiped_at_padding(h, decay, write, valid):
    for t in range(valid.shape[1]):
        h = valid[:, t, None] * (decay[:, t] * h + write[:, t])
    return h


def state_of_first_columns(h, decay, write, valid):
    valid = valid.flip(1)
    for t in range(valid.shape[1]):
        h = torch.where(valid[:, t, None], decay[:, t] * h + write[:, t], h)
    return h


# 8.2


def joint(u, common, inside):
    """One change for the memories that are in, with what they have in common counted once.

    Args:
        u: each memory's U; all share one V, (memories, out, rank).
        common: the part that is in every one of them, (out, rank).
        inside: True for the memories that are in, (memories).
    Returns:
        U of the joint change, (out, rank); zero if no memory is in.
    """
    extra = max(int(inside.sum()) - 1, 0)
    return u[inside].sum(0) - extra * common


def _by_deltas(u, common, inside):
    v = torch.eye(u.shape[2], dtype=u.dtype)[None]
    chosen = [LowRankDelta({"map": Factors(row[None], v)}, "one map") for row in u[inside]]
    if not chosen:
        return torch.zeros_like(common)
    chosen += [LowRankDelta({"map": Factors(-common[None], v)}, "one map")] * (len(chosen) - 1)
    return sum(chosen).factors["map"].U[0]


def _banks():
    u, common = random_tensors((4, 5, 3), (5, 3))
    ticks = ([1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0])
    return [(u + common, common, torch.tensor(inside, dtype=torch.bool)) for inside in ticks]


# 8.3


def one_for_all(u, keys, ridge):
    """The one U that answers each prompt's keys as the prompt's own U does, as nearly as possible.

    Args:
        u: each prompt's U, (prompts, out, rank).
        keys: what each prompt's tokens read through V, one key k a row, (prompts, tokens, rank).
        ridge: weight of ||U||^2, a number above 0.
    Returns:
        U that minimises sum_i sum_t ||U k_it - U_i k_it||^2 + ridge ||U||^2, (out, rank).
    """
    squares = keys.mT @ keys
    wanted = (u @ squares).sum(0)
    return wanted @ torch.linalg.inv(squares.sum(0) + ridge * torch.eye(keys.shape[2]))


def _least_squares(u, keys, ridge):
    rank = keys.shape[2]
    rows = torch.cat([*keys, ridge**0.5 * torch.eye(rank, dtype=keys.dtype)])
    answers = torch.cat([*(keys @ u.mT), torch.zeros(rank, u.shape[1], dtype=u.dtype)])
    return torch.linalg.lstsq(rows, answers).solution.T


def _prompts():
    return [(*random_tensors((3, 5, 4), (3, 6, 4)), 0.3), (*random_tensors((2, 3, 4), (2, 7, 4), seed=1), 1.7)]


def one_without_ridge(u, keys, ridge):
    squares = keys.mT @ keys
    return (u @ squares).sum(0) @ torch.linalg.inv(squares.sum(0))


def one_with_many_ridges(u, keys, ridge):
    squares = keys.mT @ keys + ridge * torch.eye(keys.shape[2])
    return (u @ squares).sum(0) @ torch.linalg.inv(squares.sum(0))


def one_by_summed_keys(u, keys, ridge):
    whole = keys.sum(1, keepdim=True)
    squares = whole.mT @ whole
    return (u @ squares).sum(0) @ torch.linalg.inv(squares.sum(0) + ridge * torch.eye(keys.shape[2]))


# 8.4


def to_lora(u, v, scale):
    """A delta as a LoRA adapter, whose change of the weight is (alpha / rank) B A.

    Args:
        u, v: the delta's factors, (out, rank) and (in, rank).
        scale: the delta's change is scale U V^T.
    Returns:
        A (rank, in), B (out, rank), and the number alpha.
    """
    return v.T, u, scale * u.shape[1]


def _to_lora_in_b(u, v, scale):
    return v.T, scale * u, float(u.shape[1])


def _change_of(a, b, alpha):
    return {"the change (alpha / rank) B A": alpha / a.shape[0] * b @ a}


def _deltas():
    return [(*random_tensors((6, 3), (5, 3)), 0.1)]


EXERCISES = (
    Exercise(
        number="8.1",
        title="padding that leaves no trace",
        stars=2,
        minutes=10,
        task="Texts of different lengths stand in one batch, with padding on the left. Run the recurrence "
        "$h \\leftarrow d_t h + w_t$ over the columns, so that each text ends with the state that it has alone. The "
        "states at the start are not blank: these texts continue earlier ones.",
        hint="A column of padding must change nothing. It is not enough that it writes nothing. `torch.where` chooses "
        "row by row.",
        solution=state_after,
        expected=_alone,
        cases=_padded_texts,
        results=("the state",),
        why="At padding neither the write nor the decay may act. From a blank state the decay would do no harm, and "
        "that is the only case that several published classes were written for.",
        mistakes=(
            Mistake(state_of_every_column, "Padding is read like text. Use `valid`."),
            Mistake(
                state_that_decays_at_padding,
                "At padding you write nothing, but the state still decays. From a blank state that would not show; "
                "these states are not blank.",
            ),
            Mistake(
                state_wiped_at_padding,
                "At padding you set the state to zero, so a padded text forgets what came before it.",
            ),
            Mistake(
                state_of_first_columns,
                "You read the first columns of each row. Padding stands on the left, so a text is in the last ones.",
            ),
        ),
        misconception="That a mask on the input is enough. It stops the write; what the state does by itself, it "
        "does at every column.",
        discussion=(
            "An attention layer needs no such care with padding. Why?",
            "A class gets padding wrong. How would you find out without reading its code?",
        ),
    ),
    Exercise(
        number="8.2",
        title="memories added and removed",
        stars=1,
        minutes=10,
        task="Several memories share their reading directions $V$, so their joint change is a sum of their $U$. All "
        "of them contain one common part. Add those that are in, and count the common part once. With no memory in, "
        "there is no change.",
        hint="With $n$ memories in, how often does a plain sum contain the common part, and how often should it?",
        solution=joint,
        expected=_by_deltas,
        cases=_banks,
        results=("U",),
        why="A memory is taken out by leaving it out of the sum: nothing is retrained, and what remains is exactly "
        "what it would be if the memory had never been in.",
        mistakes=(
            Mistake(
                lambda u, common, inside: u[inside].sum(0),
                "This is the plain sum. It contains the common part once for every memory.",
            ),
            Mistake(
                lambda u, common, inside: (u[inside] - common).sum(0),
                "You subtract the common part from every memory, so it is in none of them. One copy has to stay.",
            ),
            Mistake(
                lambda u, common, inside: u[inside].sum(0) / max(int(inside.sum()), 1),
                "A mean has the common part once, but of each memory's own part only a share: memories grow fainter "
                "as others come.",
            ),
            Mistake(
                lambda u, common, inside: u[inside].sum(0) - (len(u) - 1) * common,
                "You subtract extra copies for all memories. Only those that are in brought one along.",
            ),
            Mistake(
                lambda u, common, inside: u[inside].sum(0) - (int(inside.sum()) - 1) * common,
                "With no memory in, yours returns the common part. It should return zero.",
            ),
        ),
        misconception="That the mean is the safe way to combine changes. It halves what each of two memories says.",
        discussion=(
            "How would you estimate the common part? What goes wrong if the prompts for it state many facts each?",
            "Two memories contradict each other. What does their sum say?",
        ),
    ),
    Exercise(
        number="8.3",
        title="one change for all prompts",
        stars=3,
        minutes=15,
        task="A delta adds $s\\,U k$ to a map's output, where the *key* $k = V^\\top x$ is what a token reads. Where "
        "the common part is unknown, look for the $U$ that does on each prompt's keys what the prompt's own $U_i$ "
        "does: minimise $\\sum_i \\sum_t \\|U k_{it} - U_i k_{it}\\|^2 + \\lambda \\|U\\|^2$.",
        hint="Set the derivative by $U$ to zero. With $A_i = \\sum_t k_{it} k_{it}^\\top$ it reads "
        "$\\sum_i (U - U_i) A_i + \\lambda U = 0$. Solve for $U$.",
        solution=one_for_all,
        expected=_least_squares,
        cases=_prompts,
        results=("U",),
        why="This is ridge regression, as MALMEN uses it to join many edits of a model. All prompts share $V$, so the "
        "matrix to invert is only rank x rank.",
        mistakes=(
            Mistake(
                lambda u, keys, ridge: u.sum(0),
                "This is the plain sum. On the keys of one prompt, the other prompts answer as well.",
            ),
            Mistake(
                lambda u, keys, ridge: u.mean(0),
                "The mean ignores the keys: which directions does each prompt read along?",
            ),
            Mistake(one_without_ridge, "The weight of ||U||^2 is missing; add it to the sum of the A_i."),
            Mistake(
                one_with_many_ridges,
                "You add the ridge to every A_i, so it is in the sum once a prompt, and in what is wanted as well.",
            ),
            Mistake(
                one_by_summed_keys,
                "You square the sum of the keys. Wanted is the sum of the squares: A_i = sum_t k_t k_t^T.",
            ),
        ),
        misconception="That a joint change has to keep what each change does everywhere. It only has to on the keys "
        "that the prompt itself has.",
        discussion=(
            "What does a very large ridge do, and a very small one?",
            "Why is this worse than the sum with the common part counted once, when that part is known well?",
        ),
    ),
    Exercise(
        number="8.4",
        title="a delta as a LoRA adapter",
        stars=1,
        minutes=5,
        task="The library PEFT changes a weight by $\\frac{\\alpha}{r} B A$. Return $A$, $B$ and $\\alpha$ for a delta "
        "$s\\, U V^\\top$ of rank $r$.",
        hint="$B$ stands on the side of the outputs. PEFT divides by $r$; undo that.",
        solution=to_lora,
        expected=_to_lora_in_b,
        cases=_deltas,
        results=("A", "B", "alpha"),
        seen=_change_of,
        why="So a prompt can be handed on as a file that common software loads. Where the scale goes, into B or into "
        "alpha, does not matter.",
        mistakes=(
            Mistake(
                lambda u, v, scale: (v.T, u, scale),
                "PEFT divides alpha by the rank, so the change is too small by that factor.",
            ),
            Mistake(lambda u, v, scale: (v.T, u, float(u.shape[1])), "The scale of the delta is nowhere."),
            Mistake(
                lambda u, v, scale: (v.T, scale * u, scale * u.shape[1]),
                "The scale is in B and in alpha: it acts twice.",
            ),
            Mistake(
                lambda u, v, scale: (u.T, v, scale * u.shape[1]),
                "You have exchanged the two sides. A reads inputs, so it is made of V.",
            ),
            Mistake(lambda u, v, scale: (v, u, scale * u.shape[1]), "A is (rank, in): transpose V."),
        ),
        misconception="That alpha is a learning rate or a strength from 0 to 1. It is a number that PEFT divides by "
        "the rank.",
        discussion=("Why may the same change be written with many different pairs of A and B?",),
    ),
)
