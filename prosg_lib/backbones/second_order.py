"""Second derivatives in fewer passes over memory than PyTorch's own, for gradients through a gradient step.

PyTorch derives most second derivatives step by step from the formula of the first, and each step passes over the whole
input. Here they are written out, or routed through something that is cheap to differentiate twice. The plain functions
of `rwkv`, `wkv` and PyTorch are the reference: a test compares values and derivatives of both orders.

How to read it: every class is one autograd function. Where its `backward` is itself differentiated, that is another
class here, named ...Grads. In comments, `g` is the gradient at an output, and a name with _ at its end is the change of
what has the name.

Glossary of shapes: N any leading dimensions, D width, C classes; for WKV, see `wkv`.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, bmm
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from prosg_lib.backbones.rwkv import interpolate, squared_relu
from prosg_lib.backbones.wkv import Decays, chunk_totals, decayed_sums, in_chunks, out_of_chunks, weighted_means

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


class LeanSecondDerivatives(TorchFunctionMode):
    """Context manager: what is computed inside has the second derivatives of this module, whenever it is
    differentiated. Values are the same up to rounding.

    Replaced are the functions in `_LEAN`. Calls of a form that is not covered, such as a cross entropy with class
    weights, and half precision are left to PyTorch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        lean, kwargs = _LEAN.get(function), kwargs or {}
        if lean is not None and args and _is_plain(args[0]) and "out" not in kwargs:
            result = lean(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)


def _is_plain(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)


class _Lean(Function):
    """Base class: `torch.func.vmap` can run it, and by default the inputs are saved for the backward pass."""

    generate_vmap_rule = True

    def __init_subclass__(cls):
        super().__init_subclass__()
        # PyTorch asks for the signature at every call, and working it out takes as long as computing a small tensor.
        cls.forward.__signature__ = inspect.signature(cls.forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class _Square(_Lean):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return _DoubledProduct.apply(*ctx.saved_tensors, g)


class _DoubledProduct(_Lean):
    """2 a b, in one pass."""

    @staticmethod
    def forward(a, b):
        return torch.addcmul(a.new_zeros(()), a, b, value=2)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return _DoubledProduct.apply(b, g), _DoubledProduct.apply(a, g)


def _power(x, exponent):
    return _Square.apply(x) if isinstance(exponent, int | float) and exponent == 2 else NotImplemented


class _SquaredRelu(_Lean):
    """relu(x)^2, and r = relu(x) as a second output, from which the gradient 2 r g is formed. That is zero where the
    relu is closed; only what flows back into r needs a mask."""

    @staticmethod
    def forward(x):
        relu = torch.relu(x)
        return relu * relu, relu

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)  # in a first derivative, nothing flows back into r

    @staticmethod
    def backward(ctx, g, g_relu):
        (relu,) = ctx.saved_tensors
        first = None if g is None else _DoubledProduct.apply(relu, g)
        second = None if g_relu is None else torch.ops.aten.threshold_backward(g_relu, relu, 0)
        return _sum(first, second)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for zero."""
    return b if a is None else a if b is None else a + b


class _Interpolate(_Lean):
    """start + difference weight, for each weight (D,)."""

    @staticmethod
    def forward(start, difference, *weights):
        return tuple(torch.addcmul(start, difference, weight) for weight in weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gs):
        if any(ctx.needs_input_grad[2:]):
            return _InterpolateGrads.apply(*ctx.saved_tensors, *gs)
        _, *weights = ctx.saved_tensors
        return sum(gs[1:], gs[0]), _weighted(gs, weights), *(None for _ in weights)


class _InterpolateGrads(_Lean):
    @staticmethod
    def forward(difference, *weights_and_gs):
        weights, gs = _halves(weights_and_gs)
        of_start = sum(gs[1:], gs[0].view_as(gs[0]))  # a view, because a function may not return its input itself
        return of_start, _weighted(gs, weights), *(_over_rows(g * difference) for g in gs)

    @staticmethod
    def backward(ctx, of_start, of_difference, *of_weights):
        difference, *weights_and_gs = ctx.saved_tensors
        weights, gs = _halves(weights_and_gs)
        of_gs = (
            torch.addcmul(torch.addcmul(of_start, of_difference, weight), difference, of_weight)
            for weight, of_weight in zip(weights, of_weights, strict=True)
        )
        return _weighted(gs, of_weights), *(_over_rows(g * of_difference) for g in gs), *of_gs


def _halves(both):
    return both[: len(both) // 2], both[len(both) // 2 :]


def _weighted(terms, weights) -> Tensor:
    (first, weight), *others = zip(terms, weights, strict=True)
    total = first * weight
    for term, weight in others:
        total = torch.addcmul(total, term, weight)
    return total


def _over_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)


def _interpolate(start, end, *weights):
    if start.ndim < 2 or start.shape != end.shape or any(w.shape != start.shape[-1:] for w in weights):
        return NotImplemented
    return _Interpolate.apply(start, end - start, *weights)


class _WeightedMeans(_Lean):
    """num / den, the decayed sums of weight v and of weight (`wkv.weighted_means`), and den as a second output, from
    which gradients are formed: what flows back into it is part of the second derivative."""

    @staticmethod
    def forward(weight, v, valid, *decays):
        num, den = (decayed_sums(x, Decays(*decays))[0] for x in (weight * v, weight))
        if valid is not None:  # so that mean and gradients are zero at padding
            den = den.masked_fill(~valid, torch.inf)
        return num / den, den

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, v, _, *decays = inputs
        ctx.save_for_backward(weight, v, *output, *decays)
        ctx.set_materialize_grads(False)  # in a first derivative, nothing flows back into den

    @staticmethod
    def backward(ctx, to_mean, to_den):
        weight, v, mean, den, *decays = ctx.saved_tensors
        # It is the gradient of a transposed tensor, and computing in that memory order takes several times as long.
        to_mean = torch.zeros_like(mean) if to_mean is None else to_mean.contiguous()
        if any(ctx.needs_input_grad[3:]):
            of_weight, of_v, _, *of_decays = _WeightedMeansGrads.apply(to_mean, to_den, *ctx.saved_tensors)
            return of_weight, of_v, None, *of_decays
        of_num, of_den = (
            decayed_sums(to, Decays(*decays).transposed())[0] for to in _to_sums(to_mean, to_den, mean, den)
        )
        return torch.addcmul(of_den, of_num, v), of_num * weight, *(None for _ in ctx.needs_input_grad[2:])


class _WeightedMeansGrads(_Lean):
    """Gradients for weight, v and the decays. Its own derivative asks how everything changes when weight, v and the
    decays change by what flows back into their gradients: the names with _."""

    @staticmethod
    def forward(to_mean, to_den, weight, v, mean, den, *decays):
        decays = Decays(*decays)
        of_sums, of_decays = [], []
        for x, to in zip((weight * v, weight), _to_sums(to_mean, to_den, mean, den), strict=True):
            of_x, to_found, to_totals = decayed_sums(to, decays.transposed())
            of_sums.append(of_x)
            x, to = in_chunks(x, decays), in_chunks(to, decays)
            totals, found = chunk_totals(x, decays)
            of_within, of_total = bmm(x.mT, to), bmm(_row(to_totals), x)
            of_decays.append((of_within, of_total, bmm(totals.mT, to_found), bmm(_row(found), to)))
        of_num, of_den = of_sums
        return torch.addcmul(of_den, of_num, v), of_num * weight, of_num, *map(torch.add, *of_decays)

    @staticmethod
    def setup_context(ctx, inputs, output):
        to_mean, _, *others = inputs
        of_num = output[2]
        ctx.mark_non_differentiable(of_num)
        ctx.save_for_backward(of_num, to_mean, *others)

    @staticmethod
    def backward(ctx, weight_, v_, _, *decays_):
        of_num, to_mean, weight, v, mean, den, *decays = ctx.saved_tensors
        decays, decays_ = Decays(*decays), Decays(*decays_)
        to_num, to_den = _to_sums(to_mean, None, mean, den)
        changes, of_x, of_decays = [], [], []
        weight_v_ = torch.addcmul(weight_ * v, weight, v_)
        for x, x_, to in ((weight * v, weight_v_, to_num), (weight, weight_, to_den)):
            x, x_, to = (in_chunks(t, decays) for t in (x, x_, to))
            sums_, totals, totals_, _, found_ = _sums_(x, x_, decays, decays_)
            back_, to_found, to_found_, to_totals, to_totals_ = _sums_(
                to, None, decays.transposed(), decays_.transposed()
            )
            changes.append(out_of_chunks(sums_, weight))
            of_x.append(out_of_chunks(back_, weight))
            of_within, of_total = bmm(x_.mT, to), _product_(_row(to_totals), x, _row(to_totals_), x_)
            of_over, of_since = _product_(totals.mT, to_found, totals_.mT, to_found_), bmm(_row(found_), to)
            of_decays.append((of_within, of_total, of_over, of_since))
        (num_, den_), (of_weight_v, of_weight) = changes, of_x
        of_to_mean = torch.addcmul(num_, mean, den_, value=-1) / den
        of_weight = torch.addcmul(torch.addcmul(of_weight, of_weight_v, v), v_, of_num)
        of_v = torch.addcmul(of_weight_v * weight, weight_, of_num)
        of_mean, of_den = -(to_num * den_), -(to_num * of_to_mean)
        return of_to_mean, None, of_weight, of_v, of_mean, of_den, *map(torch.add, *of_decays)


def _to_sums(to_mean, to_den, mean, den):
    """What flows back into num, and into den: from the mean, and (to_den) from wherever else den was used."""
    to_num = to_mean / den
    return to_num, _sum(-(to_num * mean), to_den)


def _sums_(x, x_, decays, decays_):
    """How the decayed sums of chunks change when x changes by x_ (None: not) and the decays by decays_; and the totals,
    what each chunk finds, and how either changes."""
    totals, found = chunk_totals(x, decays)
    totals_ = _product_(x, decays.total.mT, x_, decays_.total.mT).view_as(totals)
    found_ = _product_(totals, decays.over, totals_, decays_.over)
    sums_ = torch.addcmul(_product_(x, decays.within, x_, decays_.within), _row(found_).mT, decays.since)
    return torch.addcmul(sums_, _row(found).mT, decays_.since), totals, totals_, found, found_


def _product_(a, b, a_, b_):
    """How a b changes when they change by a_ (None: it does not) and b_."""
    return bmm(a, b_) if a_ is None else torch.baddbmm(bmm(a_, b), a, b_)


def _row(of_chunks):
    """(D, ..., n) -> (D, 1, R)."""
    return of_chunks.view(len(of_chunks), 1, -1)


def _weighted_means(weight, v, past, valid, at_end, decays):
    if past is not None:
        return NotImplemented
    totals = [chunk_totals(in_chunks(x, decays), decays)[0] for x in (weight * v, weight)]
    end = torch.stack([bmm(t, at_end.mT)[..., 0] for t in totals], 1)
    return _WeightedMeans.apply(weight, v, valid, *decays)[0], end


class _NLL(_Lean):
    """Negative log-likelihood (N,) of `ids` (N,) under logits (N, C), and the probabilities as a second output, from
    which the gradient is formed: what flows back into them is the second derivative."""

    @staticmethod
    def forward(logits, ids):
        logs = torch.log_softmax(logits, -1)
        return -logs.gather(-1, ids[..., None])[..., 0], logs.exp_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output[1])
        ctx.set_materialize_grads(False)  # in a first derivative, nothing flows back into the probabilities

    @staticmethod
    def backward(ctx, g, g_probabilities):
        ids, probabilities = ctx.saved_tensors
        first = second = None
        if g is not None:
            first = (probabilities * g[..., None]).scatter_add_(-1, ids[..., None], -g[..., None])
        if g_probabilities is not None:
            second = torch._softmax_backward_data(g_probabilities, probabilities, -1, probabilities.dtype)
        return _sum(first, second), None


def _cross_entropy(logits, target, ignore_index, reduction, label_smoothing, **others):
    """For class indices; the classes are dimension 1 of the logits, or dimension 0 for a single item."""
    weighted = any(value is not None for value in others.values())  # by class, or an argument of older versions
    if weighted or label_smoothing or target.is_floating_point() or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    counted = target != ignore_index
    losses = _NLL.apply(logits.movedim(min(1, logits.ndim - 1), -1), target * counted)[0] * counted
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


class _LayerNorm(_Lean):
    """With n = (x - mean) / s for the input x (N, D), a = g weight and P(a) = a - mean(a) - n mean(a n), the gradients
    are P(a) / s for the input, the sum of g n for the weight, and the sum of g for the bias."""

    @staticmethod
    def forward(x, weight, bias, eps):
        return torch.native_layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _ = inputs
        _, mean, inverse = output
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, bias, mean, inverse)

    @staticmethod
    def backward(ctx, g, *_):
        return *_LayerNormGrads.apply(g, *ctx.saved_tensors), None


class _LayerNormGrads(_Lean):
    @staticmethod
    def forward(g, x, weight, bias, mean, inverse):
        return _layer_norm_backward(g, x, weight.shape, mean, inverse, weight, bias, [True, True, True])

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, x, weight, _, mean, inverse = inputs
        ctx.save_for_backward(g, x, weight, mean, inverse)

    @staticmethod
    def backward(ctx, of_x, of_weight, of_bias):
        g, x, weight, mean, inverse = ctx.saved_tensors

        def projected(v):  # P(v) / s
            return _layer_norm_backward(v, x, weight.shape, mean, inverse, None, None, [True, False, False])[0]

        def shared(v, w):  # - mean(v w) / s
            return torch.linalg.vecdot(v, w)[..., None] * (inverse / -x.shape[-1])

        n, a, p = (x - mean) * inverse, g * weight, projected(of_x)
        of_g = torch.addcmul(torch.addcmul(of_bias, n, of_weight), p, weight)
        of_n = torch.addcmul(torch.addcmul(g * of_weight, of_x, shared(a, n)), a, shared(of_x, n))
        second_x = torch.addcmul(projected(of_n), n, shared(p, a))  # P is symmetric: of_x P(a) = P(of_x) a
        return of_g, second_x, _over_rows(p * g), None, None, None


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if x.ndim < 2 or len(normalized_shape) != 1 or weight is None or bias is None or weight.dtype != x.dtype:
        return NotImplemented
    return _LayerNorm.apply(x, weight, bias, eps)[0]


_LEAN = {
    torch.square: _Square.apply,
    Tensor.square: _Square.apply,
    torch.pow: _power,
    Tensor.pow: _power,
    Tensor.__pow__: _power,
    squared_relu: lambda x: _SquaredRelu.apply(x)[0],
    interpolate: _interpolate,
    weighted_means: _weighted_means,
    F.cross_entropy: _cross_entropy,
    F.layer_norm: _layer_norm,
}
