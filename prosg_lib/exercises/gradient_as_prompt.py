"""Exercises of notebook 07: one gradient step through which one can differentiate."""

import torch

from prosg_lib.exercises.checking import Exercise, Mistake
from prosg_lib.gradient_steps.one_step import gradient_step


def _losses(seed):
    """An inner and an outer loss that are neither quadratic nor alike, and a start."""
    generator = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 5, 1))
    return lambda w: torch.log(torch.cosh(a @ w)).sum(), lambda w: torch.tanh(b @ w).square().sum(), w[0]


# 7.1


def inner_step(loss, w, eta):
    """One step of gradient descent through which an outer loss can be differentiated.

    Args:
        loss: a function of w that returns a scalar, such as the negative log likelihood of a context.
        w: the weights at the start, (D).
        eta: learning rate, a number.
    Returns:
        The weights after the step, (D).
    """
    return w - eta * torch.func.grad(loss)(w)


def _by_library(loss, w, eta):
    return gradient_step([lambda named: loss(named["w"])], {"w": w}, eta)["w"]


_CUT = "The numbers are right, but the step is cut off"


def _cut_off(answer):
    inner, outer, w = _losses(0)
    try:
        found = torch.func.grad(lambda w: outer(answer(inner, w, 0.2)))(w)
    except Exception as error:
        return f"{_CUT}: differentiating an outer loss through it raised {type(error).__name__}. Use torch.func.grad."
    exact = torch.func.grad(lambda w: outer(inner_step(inner, w, 0.2)))(w)
    if torch.allclose(found, exact):
        return None
    return f"{_CUT} from its start: an outer loss gets another gradient through it. Nothing may be detached."


# 7.2


def meta_gradient(inner, outer, w, eta):
    """The gradient of the outer loss after one inner step, with respect to the start: exact, of second order.

    Args:
        inner, outer: functions of w that return a scalar.
        w: the start, (D).
        eta: learning rate of the inner step, a number.
    Returns:
        d outer(w - eta grad inner(w)) / d w, (D).
    """

    def outer_after_step(w):
        return outer(w - eta * torch.func.grad(inner)(w))

    return torch.func.grad(outer_after_step)(w)


def _by_hessian(inner, outer, w, eta):
    stepped = w - eta * torch.func.grad(inner)(w)
    g = torch.func.grad(outer)(stepped)
    return g - eta * torch.func.hessian(inner)(w) @ g


def meta_gradient_wrong_sign(inner, outer, w, eta):
    g = torch.func.grad(outer)(w - eta * torch.func.grad(inner)(w))
    return g + eta * torch.func.hessian(inner)(w) @ g


def meta_gradient_hessian_after(inner, outer, w, eta):
    stepped = w - eta * torch.func.grad(inner)(w)
    g = torch.func.grad(outer)(stepped)
    return g - eta * torch.func.hessian(inner)(stepped) @ g


# 7.3


def divergence(teacher, student, answer):
    """The loss of LC: how far the student's next-token distribution is from the teacher's, in nats.

    Args:
        teacher, student: logits at every position of query and answer, (T, vocab) each.
        answer: True at the positions of the answer, (T).
    Returns:
        KL(teacher || student) over the whole vocabulary, a mean over the positions of the answer, ().
    """
    log_p, log_q = teacher[answer].log_softmax(1), student[answer].log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def _by_entropy(teacher, student, answer):
    p = teacher[answer].softmax(-1)
    return torch.nn.functional.cross_entropy(student[answer], p) + (p * p.log()).sum(-1).mean()


def _logits():
    cases = []
    for seed, vocab in ((5, 6), (6, 9)):
        generator = torch.Generator().manual_seed(seed)
        teacher, student = (torch.randn(7, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
        cases.append((2 * teacher, student, torch.arange(7) >= 4))
    return cases


def divergence_other_way(teacher, student, answer):
    log_p, log_q = teacher[answer].log_softmax(-1), student[answer].log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def divergence_from_the_likeliest(teacher, student, answer):
    return torch.nn.functional.cross_entropy(student[answer], teacher[answer].argmax(-1))


def divergence_with_entropy(teacher, student, answer):
    return torch.nn.functional.cross_entropy(student[answer], teacher[answer].softmax(-1))


def divergence_everywhere(teacher, student, answer):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def divergence_summed(teacher, student, answer):
    log_p, log_q = teacher[answer].log_softmax(-1), student[answer].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


# 7.4


def slope(f, w, direction, eps):
    """The derivative of f at w along a direction, measured by central differences.

    Args:
        f: a function of w that returns a scalar.
        w, direction: (D) each.
        eps: how far to go to either side, in units of the direction.
    Returns:
        A number.
    """
    return (f(w + eps * direction) - f(w - eps * direction)) / (2 * eps)


def _by_forward_mode(f, w, direction, eps):
    return torch.func.jvp(f, (w,), (direction,))[1]


def _slopes():
    cases = []
    for seed in (3, 4):
        inner, outer, w = _losses(seed)
        direction = torch.randn(4, generator=torch.Generator().manual_seed(seed + 20), dtype=torch.float64)
        cases.append((lambda w, i=inner, o=outer: o(w - 0.2 * torch.func.grad(i)(w)), w, direction, 1e-5))
    return cases


EXERCISES = (
    Exercise(
        number="7.1",
        title="a step to differentiate through",
        stars=2,
        minutes=10,
        task="Take one gradient step on the inner loss, so that an outer loss can be differentiated through it. The "
        "check tries.",
        hint="`torch.func.grad(loss)` is a function: call it at `w`. Do not change `w` in place, and detach nothing.",
        solution=inner_step,
        expected=_by_library,
        cases=lambda: [(_losses(seed)[0], _losses(seed)[2], eta) for seed, eta in ((0, 0.2), (1, 0.7))],
        results=("w after the step",),
        also=_cut_off,
        why="The step is now a function of its start like any other, and a start can be trained so that the step does "
        "what a prompt would.",
        mistakes=(
            Mistake(
                lambda loss, w, eta: w + eta * torch.func.grad(loss)(w),
                "You go up: a step of gradient descent subtracts the gradient.",
            ),
            Mistake(lambda loss, w, eta: w - torch.func.grad(loss)(w), "The learning rate is missing."),
            Mistake(
                lambda loss, w, eta: -eta * torch.func.grad(loss)(w),
                "This is the step; the weights after it are w plus the step.",
            ),
            Mistake(lambda loss, w, eta: w - eta * torch.func.grad(loss)(w).detach(), _CUT),
            Mistake(lambda loss, w, eta: w - eta * loss(w), "You subtract the loss itself. Subtract its gradient."),
        ),
        misconception="That `optimizer.step()` would do. It writes over the weights, and what wrote them is forgotten.",
        discussion=(
            "Which tensors must be kept between the inner step and the outer gradient, and how large are they?",
        ),
    ),
    Exercise(
        number="7.2",
        title="the gradient through the step",
        stars=3,
        minutes=15,
        task="Differentiate the outer loss after one inner step by the *start* of the step.",
        hint="Write the outer loss after the step as one function of $w$, and take its gradient. By hand it is "
        "$(I - \\eta H)\\, g$, with $H$ the Hessian of the inner loss at $w$ and $g$ the outer gradient after the "
        "step.",
        solution=meta_gradient,
        expected=_by_hessian,
        cases=lambda: [(*_losses(seed), eta) for seed, eta in ((0, 0.2), (1, 0.5))],
        results=("the gradient",),
        why="One such gradient is a meta-step of LC: inner loss on the context, outer loss the divergence from the "
        "prompted model. No Hessian is ever formed; automatic differentiation multiplies by it.",
        mistakes=(
            Mistake(
                lambda inner, outer, w, eta: torch.func.grad(outer)(w - eta * torch.func.grad(inner)(w)),
                "This is the first-order gradient: it takes the inner gradient as a constant and drops the Hessian.",
            ),
            Mistake(
                lambda inner, outer, w, eta: torch.func.grad(outer)(w),
                "There is no inner step in this: the outer loss is to be taken after it.",
            ),
            Mistake(
                meta_gradient_wrong_sign, "The sign of the Hessian's term: the step subtracts, so it is I - eta H."
            ),
            Mistake(
                meta_gradient_hessian_after,
                "The Hessian is that of the inner loss at the start of the step, not behind it.",
            ),
            Mistake(
                lambda inner, outer, w, eta: torch.func.grad(lambda w: outer(w) - eta * inner(w))(w),
                "The losses are not added: the inner loss acts through the step alone.",
            ),
        ),
        misconception="That a smaller learning rate makes first order exact. The dropped term shrinks with eta, and so "
        "does everything that the step can do.",
        discussion=("What does the term with H do to directions in which the inner loss is strongly curved?",),
    ),
    Exercise(
        number="7.3",
        title="the loss of LC",
        stars=1,
        minutes=10,
        task="The teacher has the context in its prompt, the student has taken a step on it. Both read query and "
        "answer. Write the loss that pulls the student to the teacher at the answer.",
        hint="Take `log_softmax` of both. $\\mathrm{KL}(p\\,\\|\\,q) = \\sum_i p_i\\,(\\log p_i - \\log q_i)$, here "
        "with the teacher as $p$.",
        solution=divergence,
        expected=_by_entropy,
        cases=_logits,
        results=("the loss",),
        why="It is zero when the student says what the teacher says, unsure where the teacher is. The right answer "
        "appears nowhere in it.",
        mistakes=(
            Mistake(
                divergence_other_way, "This is KL(student || teacher). The teacher's probabilities are the weights."
            ),
            Mistake(
                divergence_from_the_likeliest,
                "You keep the teacher's likeliest token alone. What it says of all others is part of the lesson.",
            ),
            Mistake(
                divergence_with_entropy,
                "This is the cross-entropy. Subtract the teacher's entropy, so that a perfect student gets zero.",
            ),
            Mistake(divergence_everywhere, "You count the query's positions, too. Only the answer's matter."),
            Mistake(divergence_summed, "A sum over the answer's tokens; take their mean, or long answers weigh more."),
        ),
        misconception="That LC can beat its teacher. At best it says what the teacher says, mistakes included.",
        discussion=("What would KL(student || teacher) ask of a student that cannot match its teacher?",),
    ),
    Exercise(
        number="7.4",
        title="a check by finite differences",
        stars=1,
        minutes=5,
        task="Measure a derivative without differentiating: go a little to either side.",
        hint="Two evaluations, $2\\varepsilon$ apart.",
        solution=slope,
        expected=_by_forward_mode,
        cases=_slopes,
        results=("the slope",),
        why="The error falls with the square of eps, until rounding takes over. It needs nothing of how f was written, "
        "so it finds mistakes that two formulas may share.",
        mistakes=(
            Mistake(
                lambda f, w, direction, eps: (f(w + eps * direction) - f(w)) / eps,
                "One side only: the error then falls with eps instead of eps squared, too slow for this check.",
            ),
            Mistake(
                lambda f, w, direction, eps: (f(w + eps * direction) - f(w - eps * direction)) / eps,
                "The two points are 2 eps apart.",
            ),
            Mistake(
                lambda f, w, direction, eps: f(w + eps * direction) - f(w - eps * direction),
                "This is the difference; the slope is the difference over 2 eps.",
            ),
            Mistake(
                lambda f, w, direction, eps: (f(w + eps) - f(w - eps)) / (2 * eps),
                "You moved along (1, 1, ..., 1). Move along the direction that is given.",
            ),
        ),
        misconception="That a smaller eps is always better. In float32 the difference drowns in rounding at once.",
        discussion=("Which eps is best in float64, and why near the cube root of the rounding error?",),
    ),
)
