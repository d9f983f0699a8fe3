"""The lean second derivatives: PyTorch's values, true slopes of both orders, and fewer numbers written."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from prosg_lib.backbones.rwkv import interpolate, squared_relu
from prosg_lib.backbones.second_order import LeanSecondDerivatives
from prosg_lib.backbones.wkv import WKVState, wkv_chunked

IDS = torch.tensor([[1, 4, -100, 0], [2, 2, 3, 1], [0, 4, 1, 1]])
FIXED = torch.linspace(0.1, 1, 128, dtype=torch.float64).view(2, 64)


def three_mixes(start, end, weight, other):
    one, two, three = interpolate(start, end, weight, other, weight * other)
    return one * two + three


def wkv_and_its_state(x, y, v, w):
    out, state = wkv_chunked(v.exp(), w, x, y, chunk=2)
    return torch.cat([out, (state.num / state.den)[:, None]], 1)


# Functions of x and y (3, 4, 5), v and w (5,).
FORMS = {
    "square": (lambda x: x.square(), "x"),
    "torch.square": (lambda x: torch.square(x), "x"),
    "power": (lambda x: x**2 + x.pow(2) + torch.pow(x, 2), "x"),
    "squared relu": (lambda x: squared_relu(x) * squared_relu(1 - x) + squared_relu(x), "x"),
    "mix": (lambda x, y, v: interpolate(x, y, v)[0] ** 2, "xyv"),
    "mixes": (three_mixes, "xyvw"),
    "wkv": (lambda x, y, v, w: wkv_chunked(v.exp(), w, x, y, chunk=2)[0], "xyvw"),
    "wkv, padded": (lambda x, y, v, w: wkv_chunked(v.exp(), w, x, y, valid=IDS != 2, chunk=3)[0], "xyvw"),
    "wkv and its state": (wkv_and_its_state, "xyvw"),
    "wkv, decays fixed": (lambda x, y: wkv_chunked(*FIXED[:, : x.shape[-1]], x, y, chunk=2)[0], "xy"),
    "cross entropy": (lambda x: F.cross_entropy(x.flatten(0, 1), IDS.flatten()), "x"),
    "cross entropy, sum": (lambda x: F.cross_entropy(x.flatten(0, 1), IDS.flatten(), reduction="sum"), "x"),
    "cross entropy of each": (lambda x: F.cross_entropy(x.transpose(1, 2), IDS, reduction="none"), "x"),
    "cross entropy of one": (lambda v: F.cross_entropy(v, IDS[1, 2]), "v"),
    "layer norm": (lambda x, v, w: F.layer_norm(x, v.shape, v, w), "xvw"),
}


def operands(names: str, last: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (3, 4, last), "y": (3, 4, last), "v": (last,), "w": (last,)}
    return [torch.randn(shapes[n], dtype=torch.float64, requires_grad=True) for n in names]


def lean(form):
    def run(*operands):
        with LeanSecondDerivatives():
            return form(*operands)

    return run


class Written(TorchDispatchMode):
    """Counts the numbers that PyTorch's operations write; a view of what is there writes none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += sum(
                t.numel() for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, torch.Tensor)
            )
        return out


def written_twice(form, inputs) -> int:
    """For a value, its slopes and their slopes."""
    with Written() as written:
        out = form(*inputs)
        slopes = torch.autograd.grad(out, inputs, torch.ones_like(out), create_graph=True)
        torch.autograd.grad(slopes, inputs, [torch.ones_like(s) for s in slopes], allow_unused=True)
    return written.count


@pytest.mark.parametrize("name", FORMS)
def test_values_and_slopes_of_both_orders(name):
    """Values are PyTorch's; first and second derivatives are the measured ones, finite differences in float64."""
    form, names = FORMS[name]
    inputs = operands(names)
    assert_close(lean(form)(*inputs), form(*inputs), rtol=1e-14, atol=1e-14)
    assert gradcheck(lean(form), inputs)
    assert gradgradcheck(lean(form), inputs)


@pytest.mark.parametrize("name", FORMS)
def test_many_at_once_by_vmap(name):
    """Over copies of all operands, and of the first alone with the others shared: values, gradients and second
    derivatives are those of a loop over the copies."""
    form, names = FORMS[name]
    inputs = operands(names)
    for shared in {0, len(inputs) - 1}:
        dims = (0,) * (len(inputs) - shared) + (None,) * shared
        many = [
            torch.stack([t, 0.5 * t + 0.1]).detach().requires_grad_() if dim == 0 else t
            for t, dim in zip(inputs, dims, strict=True)
        ]

        def loop(*many, dims=dims):
            rows = ([t if dim is None else t[i] for t, dim in zip(many, dims, strict=True)] for i in range(2))
            return torch.stack([lean(form)(*row) for row in rows])

        results = []
        for function in (torch.func.vmap(lean(form), in_dims=dims), loop):
            out = function(*many)
            first = torch.autograd.grad(out.square().sum(), many, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), many)
            results.append([out, *first, *second])
        for mapped, looped in zip(*results, strict=True):
            assert_close(mapped, looped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FORMS if "wkv" not in name])
def test_fewer_numbers_are_written(name):
    """Than by PyTorch's own two derivatives; if the lean ones were not taken, they would be as many."""
    form, names = FORMS[name]
    inputs = operands(names, last=64)
    assert written_twice(lean(form), inputs) < 0.9 * written_twice(form, inputs)


def test_fewer_numbers_are_written_by_wkv():
    """Of more tokens than a chunk has, so that the decays from place to place are few beside them."""
    torch.manual_seed(0)
    inputs = [torch.rand(shape, requires_grad=True) for shape in ((8,), (8,), (16, 64, 8), (16, 64, 8))]

    def wkv(*inputs):
        return wkv_chunked(*inputs)[0]

    assert written_twice(lean(wkv), inputs) < 0.9 * written_twice(wkv, inputs)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: torch.square(x.detach(), out=torch.empty_like(x)) * x,
        lambda x: x**3,
        lambda x: torch.pow(2, x),
        lambda x: interpolate(x, 2 * x, x)[0],
        lambda x: interpolate(x, x[0], x[0, 0])[0],
        lambda x: interpolate(x[0, 0], x[0, 1], x[0, 2])[0],
        lambda x: squared_relu(x.bfloat16()),
        lambda x: wkv_chunked(x[0, 0].exp(), x[0, 1], x, x, WKVState(x[:, 0], x[:, 1].exp(), x[:, 2]))[0],
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.layer_norm(x[0, 0], (5,), x[0, 1], x[0, 2]),
        lambda x: F.layer_norm(x, (4, 5), x[0], x[1]),
        lambda x: F.cross_entropy(x.transpose(1, 2), IDS, label_smoothing=0.1),
        lambda x: F.cross_entropy(x.transpose(1, 2), IDS, torch.arange(1.0, 6.0).to(x)),
        lambda x: F.cross_entropy(x.flatten(0, 1), x.flatten(0, 1).softmax(-1)),
        lambda x: x.bfloat16().square(),
    ],
)
def test_other_forms_are_left_to_pytorch(form):
    (x,) = operands("x")
    assert torch.equal(lean(form)(x), form(x))
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (lean(form), form))
    assert torch.equal(found, expected)


def test_an_improbable_class_has_a_finite_loss():
    """Its probability is zero in float32, the logarithm of it is not."""
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = lean(F.cross_entropy)(logits, torch.tensor([0]))
    assert loss.item() == 200
    assert_close(torch.autograd.grad(loss, logits)[0], torch.tensor([[-1.0, 1.0]]))


def test_layer_norm_slopes_where_the_weights_are_fixed():
    """As in a LoRA step: only the input asks for slopes."""
    x, v, w = operands("xvw")
    inputs = [x, v.detach(), w.detach()]
    assert gradgradcheck(lean(lambda x, v, w: F.layer_norm(x, (5,), v, w)), inputs)


def test_slopes_where_not_all_mixes_are_used():
    assert gradgradcheck(lean(lambda x, y, v, w: list(interpolate(x, y, v, w))[1] ** 2), operands("xyvw"))


def test_mixes_of_fixed_weights_need_no_slopes_of_them():
    """As in a LoRA step: true slopes, alone and by vmap, of fewer numbers than where the weights ask for theirs."""
    x, y, v, w = operands("xyvw", last=64)
    written = written_twice(lean(three_mixes), [x, y, v, w])
    fixed = lean(lambda x, y: three_mixes(x, y, v.detach(), w.detach()))
    assert written_twice(fixed, [x, y]) < 0.8 * written
    few = [t[0, 0, :5].detach().requires_grad_() for t in (x, y)]
    small = lean(lambda x, y: three_mixes(x[None], y[None], v.detach()[:5], w.detach()[:5]))
    assert gradgradcheck(small, few)
    many = [torch.stack([t, 2 * t]).detach().requires_grad_() for t in few]
    assert gradgradcheck(torch.func.vmap(small), many)
