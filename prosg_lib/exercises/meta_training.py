"""Exercises of notebook 05: the parts of a generator's loss."""

import torch
import torch.nn.functional as F

from prosg_lib.exercises.checking import Exercise, Mistake


def _logits(*shape, seed):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ids(*shape, seed, vocab=11):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def _mask(*rows):
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


# 5.1


def answer_loss(logits, ids, is_answer):
    """Mean negative log likelihood of the words of answers, in nats a token.

    Args:
        logits: of the token after each position, (B, T, vocabulary).
        ids: the tokens that were read, (B, T).
        is_answer: True where a token is a word of an answer, (B, T); never at the first token.
    Returns:
        A number: the mean over all answer tokens of the batch.
    """
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -log_p[is_answer[:, 1:]].mean()


def _by_cross_entropy(logits, ids, is_answer):
    losses = [F.cross_entropy(logits[b, t - 1], ids[b, t]) for b, t in is_answer.nonzero().tolist()]
    return sum(losses) / len(losses)


def answer_loss_unshifted(logits, ids, is_answer):
    log_p = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    return -log_p[is_answer].mean()


def answer_loss_of_everything(logits, ids, is_answer):
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -log_p.mean()


def answer_loss_mask_unshifted(logits, ids, is_answer):
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -log_p[is_answer[:, :-1]].mean()


def answer_loss_over_all_tokens(logits, ids, is_answer):
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(log_p * is_answer[:, 1:]).mean()


def answer_loss_summed(logits, ids, is_answer):
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -log_p[is_answer[:, 1:]].sum()


# 5.2


def locality(plain, changed, valid):
    """Mean KL(p_plain || p_changed) of the next token, in nats.

    Args:
        plain: logits of the plain model, (B, T, vocabulary).
        changed: logits of the model with a delta, (B, T, vocabulary).
        valid: False at padding, (B, T).
    Returns:
        A number: the mean over the tokens that are no padding.
    """
    p, q = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    return (p.exp() * (p - q)).sum(-1)[valid].mean()


def _by_kl_div(plain, changed, valid):
    student, teacher = (F.log_softmax(logits[valid], -1) for logits in (changed, plain))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def locality_reversed(plain, changed, valid):
    p, q = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    return (q.exp() * (q - p)).sum(-1)[valid].mean()


def locality_with_padding(plain, changed, valid):
    p, q = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def locality_a_word(plain, changed, valid):
    p, q = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    return (p.exp() * (p - q))[valid].mean()


def locality_as_cross_entropy(plain, changed, valid):
    p, q = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    return -(p.exp() * q).sum(-1)[valid].mean()


# 5.3


def whole_mean(means, counts):
    """The mean loss of a batch that was too large for the memory, from those of its parts.

    Args:
        means: mean loss of each part, over the answer tokens in it, (parts).
        counts: number of answer tokens in each part, (parts).
    Returns:
        A number: the mean over all answer tokens of the batch.
    """
    return (means * counts).sum() / counts.sum()


def _one_by_one(means, counts):
    return torch.cat([mean.expand(int(count)) for mean, count in zip(means, counts, strict=True)]).mean()


EXERCISES = (
    Exercise(
        number="5.1",
        title="the loss on answers alone",
        stars=2,
        minutes=10,
        task="A generator is trained by how likely the right answers become. Compute the mean loss of their words, and "
        "of nothing else.",
        hint="The logits at position $t$ are about token $t + 1$. Cut the last logits and the first token, then "
        "select.",
        solution=answer_loss,
        expected=_by_cross_entropy,
        cases=lambda: [
            (_logits(2, 6, 11, seed=0), _ids(2, 6, seed=1), _mask("000110", "010011")),
            (_logits(1, 5, 11, seed=2), _ids(1, 5, seed=3), _mask("00010")),
        ],
        results=("the loss",),
        why="On the words of answers the state and the delta have to prove themselves; the text around them is "
        "predictable without either, and would drown the signal.",
        mistakes=(
            Mistake(
                answer_loss_unshifted,
                "You compare the logits with the token that was just read. They are about the one that follows.",
            ),
            Mistake(answer_loss_of_everything, "You average over all tokens. Only the words of answers count."),
            Mistake(
                answer_loss_mask_unshifted,
                "The mask is one token off: cut its first place, as you do with the tokens.",
            ),
            Mistake(
                answer_loss_over_all_tokens,
                "You divide by all tokens. With few answer words the loss would look small; divide by their number.",
            ),
            Mistake(answer_loss_summed, "This is the sum. With it, batches with more answers would take larger steps."),
        ),
        misconception="That a smaller loss on the whole text means more is remembered. Most of the text can be "
        "guessed.",
        discussion=("Should the full stop behind an answer count? What would a generator learn from it?",),
    ),
    Exercise(
        number="5.2",
        title="locality as a KL divergence",
        stars=2,
        minutes=10,
        task="A delta should change what the model says about the prompt, and nothing else. Measure the rest: how far "
        "the next-token distributions on unrelated text move away from the plain model's.",
        hint="KL(p || q) = sum p (log p - log q), over the vocabulary. Which of the two models is p?",
        solution=locality,
        expected=_by_kl_div,
        cases=lambda: [
            (_logits(2, 4, 11, seed=5), _logits(2, 4, 11, seed=6), _mask("0011", "1111")),
            (_logits(1, 3, 11, seed=7), _logits(1, 3, 11, seed=8), _mask("011")),
        ],
        results=("the divergence",),
        why="It weighs words by how likely the *plain* model finds them: whatever it would have said must stay likely.",
        mistakes=(
            Mistake(
                locality_reversed,
                "This is KL(changed || plain). The plain model is the reference, so it gives the weights.",
            ),
            Mistake(locality_with_padding, "Padding counts, too. Select by `valid` before the mean."),
            Mistake(
                locality_a_word, "You average over the vocabulary. A divergence sums over it; average over tokens."
            ),
            Mistake(
                locality_as_cross_entropy,
                "This is the cross-entropy: it is not zero for equal models. Subtract the plain model's entropy.",
            ),
            Mistake(
                lambda plain, changed, valid: (torch.softmax(plain, -1) * (plain - changed)).sum(-1)[valid].mean(),
                "Logits are no log probabilities: a constant added to all of them changes nothing. Use log_softmax.",
            ),
        ),
        misconception="That KL is a distance. It is not symmetric, and here the asymmetry is what is wanted.",
        discussion=("What would training with the reversed divergence prefer?",),
    ),
    Exercise(
        number="5.3",
        title="a batch in parts",
        stars=1,
        minutes=5,
        task="A batch does not fit, so it is read in parts, each with a mean loss over its answer tokens. Which number "
        "is the whole batch's?",
        hint="Two parts, one with a single answer token and one with ninety-nine: which should weigh more?",
        solution=whole_mean,
        expected=_one_by_one,
        cases=lambda: [
            (torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([1, 99])),
            (_logits(4, seed=9) ** 2, torch.tensor([5, 2, 8, 1])),
        ],
        results=("the mean",),
        why="With these weights, a training in parts takes exactly the steps of a training in one.",
        mistakes=(
            Mistake(
                lambda means, counts: means.mean(),
                "A mean of means weighs every part alike. A part with more answer tokens has to weigh more.",
            ),
            Mistake(
                lambda means, counts: means.sum(), "You add up means: the loss would grow with the number of parts."
            ),
            Mistake(
                lambda means, counts: (means * counts).sum() / len(counts),
                "You divide by the number of parts; divide by the number of tokens.",
            ),
            Mistake(
                lambda means, counts: (means * counts).sum(),
                "This is the sum over all answer tokens. Divide by how many there are.",
            ),
        ),
        misconception="That adding up gradients is always the same as a larger batch. Only with the right weights.",
        discussion=("Where else do means of means appear in evaluations, and when are they what is wanted?",),
    ),
)
