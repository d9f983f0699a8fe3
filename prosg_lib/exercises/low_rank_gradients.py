"""Exercises of notebook 03: a prompt's gradient as a sum of outer products, its spectrum, and one step of LoRA."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prosg_lib.deltas.gradient_factors import TokenFactors, _thin_svd
from prosg_lib.exercises.checking import Exercise, Mistake, random_tensors


def _orthonormal(size, rank):
    return torch.linalg.qr(random_tensors((size, rank), seed=7)[0])[0]


# 3.1


def gradient(g, x):
    """The gradient of a linear map's weight, without automatic differentiation.

    Args:
        g: gradient at the map's output, one row a token, (tokens, out).
        x: the map's input, (tokens, in).
    Returns:
        G, (out, in).
    """
    return g.T @ x


def _by_autograd(g, x):
    w = torch.zeros(g.shape[1], x.shape[1], dtype=g.dtype, requires_grad=True)
    return torch.autograd.grad((g * (x @ w.T)).sum(), w)[0]


# 3.2


def thin_svd(g, x):
    """The singular value decomposition of G = g^T x, computed without forming G.

    Args:
        g: (tokens, out), with fewer tokens than outputs.
        x: (tokens, in), with fewer tokens than inputs.
    Returns:
        U (out, tokens), s (tokens), V (in, tokens), with U diag(s) V^T = G.
    """
    q_g, r_g = torch.linalg.qr(g.T)
    q_x, r_x = torch.linalg.qr(x.T)
    u, s, vh = torch.linalg.svd(r_g @ r_x.T)
    return q_g @ u, s, q_x @ vh.T


def core_not_transposed(g, x):
    q_g, r_g = torch.linalg.qr(g.T)
    q_x, r_x = torch.linalg.qr(x.T)
    u, s, vh = torch.linalg.svd(r_g @ r_x)
    return q_g @ u, s, q_x @ vh.T


def core_only(g, x):
    _, r_g = torch.linalg.qr(g.T)
    _, r_x = torch.linalg.qr(x.T)
    u, s, vh = torch.linalg.svd(r_g @ r_x.T)
    return u, s, vh.T


def v_not_transposed(g, x):
    q_g, r_g = torch.linalg.qr(g.T)
    q_x, r_x = torch.linalg.qr(x.T)
    u, s, vh = torch.linalg.svd(r_g @ r_x.T)
    return q_g @ u, s, q_x @ vh


def svd_of_rows(g, x):
    q_g, r_g = torch.linalg.qr(g)
    q_x, r_x = torch.linalg.qr(x)
    u, s, vh = torch.linalg.svd(r_g @ r_x.T)
    return q_g @ u, s, q_x @ vh.T


def svd_of_the_matrix(g, x):
    u, s, vh = torch.linalg.svd(g.T @ x, full_matrices=False)
    return u[:, : len(x)], s[: len(x)], vh[: len(x)].T


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        each = made if isinstance(made, tuple | list) else [made]
        self.numel = max([self.numel, *(t.numel() for t in each if isinstance(t, torch.Tensor))])
        return made


_FORMS_G = "The numbers are right, but somewhere you form G"


def _forms_g(answer):
    g, x = random_tensors((3, 40), (3, 60))
    with _Largest() as largest:
        answer(g, x)
    if largest.numel < 40 * 60:
        return None
    return f"{_FORMS_G}, all {largest.numel:,} numbers of it. The factors have {40 * 3 + 60 * 3}: decompose those."


# 3.3


def energy_kept(s, rank):
    """The share of a gradient's energy (squared Frobenius norm) that its best approximation of a rank keeps.

    Args:
        s: singular values, largest first, (tokens).
        rank: how many directions are kept.
    Returns:
        A number from 0 to 1.
    """
    return (s[:rank] ** 2).sum() / (s**2).sum()


def _from_the_error(s, rank):
    u, v = _orthonormal(12, len(s)), _orthonormal(15, len(s))
    full, kept = (u * s) @ v.T, (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    return 1 - torch.linalg.matrix_norm(full - kept) ** 2 / torch.linalg.matrix_norm(full) ** 2


# 3.4


def lora_step(g, x, v, eta):
    """U after one step of gradient descent in a LoRA adapter W + U V^T that starts at U = 0, with V fixed.

    Args:
        g: gradient at the map's output, (tokens, out).
        x: the map's input, (tokens, in).
        v: V, (in, rank).
        eta: the learning rate, a number.
    Returns:
        U, (out, rank).
    """
    return -eta * g.T @ (x @ v)


def _step_by_autograd(g, x, v, eta):
    u = torch.zeros(g.shape[1], v.shape[1], dtype=g.dtype, requires_grad=True)
    return -eta * torch.autograd.grad((g * ((x @ v) @ u.T)).sum(), u)[0]


# 3.5


def energy_read(g, x, v):
    """The share of a gradient's energy that reading directions can see: of G V in that of G.

    Args:
        g: gradient at the map's output, (tokens, out).
        x: the map's input, (tokens, in).
        v: V, (in, rank), with orthonormal columns.
    Returns:
        A number from 0 to 1.
    """
    return ((g.T @ (x @ v)) ** 2).sum() / ((g.T @ x) ** 2).sum()


def _by_projection(g, x, v):
    gram = x.T @ (g @ g.T) @ x
    return torch.trace(v @ v.T @ gram) / torch.trace(gram)


EXERCISES = (
    Exercise(
        number="3.1",
        title="a gradient as a sum of outer products",
        stars=1,
        minutes=5,
        task="For $y_t = W x_t$, each token adds the outer product $g_t x_t^\\top$ to the gradient of $W$. Write the "
        "sum over all tokens. One matrix product does it.",
        hint="Write $G_{ij} = \\sum_t g_{ti}\\, x_{tj}$. Which index is summed over, and where must it stand in each "
        "factor of a matrix product?",
        solution=gradient,
        expected=_by_autograd,
        cases=lambda: [random_tensors((7, 5), (7, 4)), random_tensors((3, 6), (3, 6), seed=1)],
        results=("G (out, in)",),
        why="It agrees with automatic differentiation. G has at most as many directions as there are tokens, so for a "
        "short prompt the two factors say everything and are far smaller.",
        mistakes=(
            Mistake(
                lambda g, x: x.T @ g,
                "This is the transpose of G. W maps x to y, so it is (out, in), and its gradient has the same shape.",
            ),
            Mistake(
                lambda g, x: g.T @ x / len(x),
                "You divide by the number of tokens. If the loss is a mean, its 1/T is already in g.",
            ),
            Mistake(
                lambda g, x: torch.outer(g.sum(0), x.sum(0)),
                "You sum over the tokens first and multiply afterwards. That pairs what one token writes with the "
                "address of another, and always has rank 1.",
            ),
            Mistake(
                lambda g, x: g[:, :, None] * x[:, None, :],
                "These are the outer products of the single tokens; their sum is missing.",
            ),
        ),
        misconception="That a gradient of a recurrent model needs another formula: g collects what a token does to all "
        "later losses through the state, and the sum over tokens stays the same.",
        discussion=(
            "What is the rank of G for a prompt of ten tokens? Can it be lower?",
            "Read one term as a memory: which of g and x is the address, and which is what is stored?",
        ),
    ),
    Exercise(
        number="3.2",
        title="the spectrum without the matrix",
        stars=3,
        minutes=15,
        task="Compute the singular value decomposition of $G = \\Gamma^\\top X$ from its two thin factors. Use "
        "`torch.linalg.qr` twice and `torch.linalg.svd` once, on a matrix of (tokens, tokens). The check notices if "
        "you form $G$.",
        hint="With $\\Gamma^\\top = Q_g R_g$ and $X^\\top = Q_x R_x$ you have $G = Q_g (R_g R_x^\\top) Q_x^\\top$. "
        "Decompose the small matrix in brackets, then put the $Q$'s back. `torch.linalg.svd` returns $V^\\top$.",
        solution=thin_svd,
        expected=lambda g, x: _thin_svd(TokenFactors(g, x)),
        cases=lambda: [random_tensors((6, 20), (6, 14)), random_tensors((4, 9), (4, 9), seed=1)],
        results=("U (out, tokens)", "s (tokens)", "V (in, tokens)"),
        seen=lambda u, s, v: {"s": s, "U diag(s) V^T": (u * s) @ v.T, "U^T U": u.T @ u, "V^T V": v.T @ v},
        also=_forms_g,
        why="For 80 tokens and a map of 2,048 x 8,192 this decomposes an 80 x 80 matrix instead of one with 17 million "
        "numbers. Every best rank-r approximation in this course is computed like this.",
        mistakes=(
            Mistake(
                core_not_transposed,
                "The product of the two triangular factors is not right: X stands on the right of G, so R_x enters "
                "transposed.",
            ),
            Mistake(
                core_only,
                "These are the singular vectors of the small core. They are coordinates in the bases Q_g and Q_x: "
                "multiply by the Q's to get vectors of G.",
            ),
            Mistake(
                v_not_transposed, "U and s are right. torch.linalg.svd returns V^T as its third result; transpose it."
            ),
            Mistake(
                svd_of_rows,
                "Decompose the tall matrices g^T (out, tokens) and x^T (in, tokens); yours are wide, with tokens as "
                "rows.",
            ),
            Mistake(svd_of_the_matrix, _FORMS_G),
        ),
        misconception="That singular values of a product are products of singular values. They are not, unless the "
        "singular vectors in the middle agree; that is what the core R_g R_x^T takes care of.",
        discussion=(
            "How do time and memory grow with the number of tokens? From which length on would you form G after all?",
            "Why is the QR decomposition safer than the square root of the Gram matrices' eigenvalues?",
        ),
    ),
    Exercise(
        number="3.3",
        title="the energy that a rank keeps",
        stars=1,
        minutes=5,
        task="Given the singular values of a gradient, which share of its energy $\\|G\\|_F^2$ does the best "
        "approximation of rank $r$ keep?",
        hint="Eckart and Young: the squared error is the sum of the squared singular values that are left out.",
        solution=energy_kept,
        expected=_from_the_error,
        cases=lambda: [
            (torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64), 2),
            (random_tensors((9,))[0].abs().sort(descending=True)[0], 4),
        ],
        results=("the share",),
        why="Singular values 8, 4, 2, 1 keep 80/85 = 0.94 of their energy at rank 2, although the two that are left "
        "out make up a fifth of the sum. Energy forgives small directions.",
        mistakes=(
            Mistake(
                lambda s, rank: s[:rank].sum() / s.sum(), "You add up singular values. Energy adds up their squares."
            ),
            Mistake(
                lambda s, rank: (s[rank:] ** 2).sum() / (s**2).sum(),
                "This is the share that is lost; what is kept is the rest.",
            ),
            Mistake(
                lambda s, rank: (s[:rank] ** 2).sum().sqrt() / (s**2).sum().sqrt(),
                "This is a ratio of norms, the square root of what is asked. Energy is the squared norm.",
            ),
            Mistake(
                lambda s, rank: s[rank - 1] ** 2 / (s**2).sum(),
                "This is the share of one direction alone. Rank r keeps the first r directions.",
            ),
        ),
        misconception="That 0.98 of the energy means 0.98 of the effect. Energy measures the matrix; what a step does "
        "to the loss has to be measured, and section 3 does.",
        discussion=("A direction with little energy may still carry the one rare fact. How would you find out?",),
    ),
    Exercise(
        number="3.4",
        title="one step of LoRA",
        stars=2,
        minutes=10,
        task="An adapter changes $W$ to $W + U V^\\top$. It starts at $U = 0$, and $V$ is fixed. Where does one step "
        "of plain gradient descent with learning rate $\\eta$ take $U$?",
        hint="The adapter's output is $y_t = W x_t + U (V^\\top x_t)$: to $U$, the input of token $t$ is $V^\\top "
        "x_t$. Exercise 3.1 tells the rest.",
        solution=lora_step,
        expected=_step_by_autograd,
        cases=lambda: [
            (*random_tensors((7, 5), (7, 4), (4, 3)), 0.3),
            (*random_tensors((6, 4), (6, 4), (4, 4), seed=1), 2.0),
        ],
        results=("U (out, rank)",),
        why="U = -eta G V: the full gradient seen through V. A generator that predicts g can write this sum while the "
        "prompt streams by; notebook 04 builds it.",
        mistakes=(
            Mistake(lambda g, x, v, eta: eta * g.T @ (x @ v), "The sign: gradient descent goes against the gradient."),
            Mistake(
                lambda g, x, v, eta: -g.T @ (x @ v), "The learning rate is missing: the step is eta times the gradient."
            ),
            Mistake(
                lambda g, x, v, eta: -eta * (x @ v).T @ g,
                "This is the transpose of U. U V^T has the shape of W, (out, in), so U is (out, rank).",
            ),
            Mistake(
                lambda g, x, v, eta: -eta * g.T @ x,
                "This is the step of the full weight, -eta G. U sees each input only through V: as V^T x, of size "
                "rank.",
            ),
            Mistake(
                lambda g, x, v, eta: -eta * g.T @ (x @ v) / len(x),
                "You divide by the number of tokens. If the loss is a mean, its 1/T is already in g.",
            ),
        ),
        misconception="That LoRA's first step also moves V. At U = 0 the gradient of V is U^T (...) = 0: V gets no "
        "gradient until U has moved.",
        discussion=(
            "In LoRA's own notation the change is B A. Which of U and V^T is B, which is A, and which starts at zero?",
            "Compare the costs of g^T (x V) and (g^T x) V.",
        ),
    ),
    Exercise(
        number="3.5",
        title="what reading directions see",
        stars=2,
        minutes=10,
        task="The columns of $V$ are orthonormal. Which share of the energy of $G$ is left when it is seen through "
        "$V$, that is $\\|G V\\|_F^2 / \\|G\\|_F^2$?",
        hint="Build $G V$ as in exercise 3.4, and sum the squares.",
        solution=energy_read,
        expected=_by_projection,
        cases=lambda: [
            (*random_tensors((7, 5), (7, 6)), _orthonormal(6, 2)),
            (*random_tensors((4, 6), (4, 8)), _orthonormal(8, 3)),
        ],
        results=("the share",),
        why="Random directions would see rank / in on average. One V learned from many prompts sees far more, because "
        "prompts share their addresses.",
        mistakes=(
            Mistake(
                lambda g, x, v: torch.linalg.matrix_norm(g.T @ (x @ v)) / torch.linalg.matrix_norm(g.T @ x),
                "This is a ratio of norms; square it to get energies.",
            ),
            Mistake(
                lambda g, x, v: ((x @ v) ** 2).sum() / (x**2).sum(),
                "This is the share of the inputs' energy. It ignores g: an input at which nothing is written does not "
                "count.",
            ),
            Mistake(
                lambda g, x, v: ((g**2).sum(1) * ((x @ v) ** 2).sum(1)).sum() / ((g**2).sum(1) * (x**2).sum(1)).sum(),
                "You add up the tokens' energies one by one. Their outer products overlap, so sum them to G first and "
                "square afterwards.",
            ),
            Mistake(
                lambda g, x, v: 1 - ((g.T @ (x @ v)) ** 2).sum() / ((g.T @ x) ** 2).sum(),
                "This is the share that V does not see.",
            ),
        ),
        misconception="That the best V for one gradient is the best V for all. Its own right singular vectors are, but "
        "they are known only after the gradient is.",
        discussion=("What would an adversarial prompt look like, whose gradient no shared V reads?",),
    ),
)
