"""Second derivatives with less arithmetic than PyTorch's own, for what is differentiated twice.

PyTorch derives most second derivatives step by step from the formula of the first; each step passes over the whole
input. Here they are written out, or led through what is cheap to differentiate twice.

Glossary of shapes: N any leading dimensions, D width, C classes; of WKV, see `wkv`.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, bmm
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from prosg_lib.backbones.rwkv import lerps, squared_relu
from prosg_lib.backbones.wkv import Decays, decayed_sums, in_chunks, levels, out_of_chunks, weighted_means

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


class LeanSecondDerivatives(TorchFunctionMode):
    """While it lasts, functions of PyTorch and of RWKV that have a lean second derivative here take it. Their values
    are the same, to rounding.

    It counts for what is calculated meanwhile, whenever that is differentiated. Calls of a form that is not here, as of
    a cross entropy with weights, and half precision are left to PyTorch.
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
    """What they have in common: torch.func.vmap can run them, and derivatives are made of the inputs."""

    generate_vmap_rule = True

    def __init_subclass__(cls):
        super().__init_subclass__()
        # PyTorch asks for it at every call; to work it out takes as long as the calculation of a small tensor.
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
        return _TwiceProduct.apply(*ctx.saved_tensors, g)


class _TwiceProduct(_Lean):
    """2 a b, in one pass."""

    @staticmethod
    def forward(a, b):
        return torch.addcmul(a.new_zeros(()), a, b, value=2)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return _TwiceProduct.apply(b, g), _TwiceProduct.apply(a, g)


def _power(x, exponent):
    return _Square.apply(x) if isinstance(exponent, int | float) and exponent == 2 else NotImplemented


class _SquaredRelu(_Lean):
    """The square, and the relu r, of which its slope 2 r g is made: that is zero where the relu is closed, only what
    flows back into r is not."""

    @staticmethod
    def forward(x):
        relu = torch.relu(x)
        return relu * relu, relu

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)  # at first nothing flows there

    @staticmethod
    def backward(ctx, g, of_relu):
        (relu,) = ctx.saved_tensors
        slope = None if g is None else _TwiceProduct.apply(relu, g)
        bent = None if of_relu is None else torch.ops.aten.threshold_backward(of_relu, relu, 0)
        return _both(slope, bent)


def _both(slope: Tensor | None, bent: Tensor | None) -> Tensor | None:
    return bent if slope is None else slope if bent is None else slope + bent


class _Mixes(_Lean):
    """start + apart weight, of each weight (D,)."""

    @staticmethod
    def forward(start, apart, *weights):
        return tuple(torch.addcmul(start, apart, weight) for weight in weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gs):
        if any(ctx.needs_input_grad[2:]):
            return _MixesSlopes.apply(*ctx.saved_tensors, *gs)
        _, *weights = ctx.saved_tensors
        return sum(gs[1:], gs[0]), _weighted(gs, weights), *(None for _ in weights)


class _MixesSlopes(_Lean):
    @staticmethod
    def forward(apart, *weights_and_gs):
        weights, gs = _halves(weights_and_gs)
        of_start = sum(gs[1:], gs[0].view_as(gs[0]))  # of a single one a view: an input itself may not be handed back
        return of_start, _weighted(gs, weights), *(_over_rows(g * apart) for g in gs)

    @staticmethod
    def backward(ctx, of_start, of_apart, *of_weights):
        apart, *weights_and_gs = ctx.saved_tensors
        weights, gs = _halves(weights_and_gs)
        of_gs = (
            torch.addcmul(torch.addcmul(of_start, of_apart, weight), apart, of_weight)
            for weight, of_weight in zip(weights, of_weights, strict=True)
        )
        return _weighted(gs, of_weights), *(_over_rows(g * of_apart) for g in gs), *of_gs


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


def _lerps(start, end, *weights):
    if start.ndim < 2 or start.shape != end.shape or any(w.shape != start.shape[-1:] for w in weights):
        return NotImplemented
    return iter(_Mixes.apply(start, end - start, *weights))


class _WeightedMeans(_Lean):
    """num / den, the decayed sums of weight v and of weight (`wkv.weighted_means`). The slopes are made of den, too:
    what flows back into it is part of the second derivative."""

    @staticmethod
    def forward(weight, v, valid, *decays):
        num, den = (decayed_sums(x, Decays(*decays))[0] for x in (weight * v, weight))
        if valid is not None:  # so that mean and slopes are zero at padding
            den = den.masked_fill(~valid, torch.inf)
        return num / den, den

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, v, _, *decays = inputs
        ctx.save_for_backward(weight, v, *output, *decays)
        ctx.set_materialize_grads(False)  # at first nothing flows into den

    @staticmethod
    def backward(ctx, to_mean, to_den):
        weight, v, mean, den, *decays = ctx.saved_tensors
        # It comes from a transposed tensor; all that is made of it in that order would take several times as long.
        to_mean = torch.zeros_like(mean) if to_mean is None else to_mean.contiguous()
        if any(ctx.needs_input_grad[3:]):
            of_weight, of_v, _, *of_decays = _WeightedMeansSlopes.apply(to_mean, to_den, *ctx.saved_tensors)
            return of_weight, of_v, None, *of_decays
        of_num, of_den = (
            decayed_sums(to, Decays(*decays).transposed())[0] for to in _to_sums(to_mean, to_den, mean, den)
        )
        return torch.addcmul(of_den, of_num, v), of_num * weight, *(None for _ in ctx.needs_input_grad[2:])


class _WeightedMeansSlopes(_Lean):
    """In its derivative, a name with _ is the change of what has the name, when weight, v and the decays change by what
    flows back into their slopes."""

    @staticmethod
    def forward(to_mean, to_den, weight, v, mean, den, *decays):
        decays = Decays(*decays)
        of_sums, of_decays = [], []
        for x, to in zip((weight * v, weight), _to_sums(to_mean, to_den, mean, den), strict=True):
            of_x, to_found, to_totals = decayed_sums(to, decays.transposed())
            of_sums.append(of_x)
            x, to = in_chunks(x, decays), in_chunks(to, decays)
            totals, found = levels(x, decays)
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
    """What flows back into num, and into den: from the mean, and from where else it went."""
    to_num = to_mean / den
    return to_num, _both(-(to_num * mean), to_den)


def _sums_(x, x_, decays, decays_):
    """How the decayed sums of chunks change, with x by x_ (None: not) and their decays; and the totals, what the chunks
    find, and how each of them changes."""
    totals, found = levels(x, decays)
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


def _weighted_means(weight, v, past, valid, at_end, *decays):
    if past is not None:
        return NotImplemented
    totals = [levels(in_chunks(x, Decays(*decays)), Decays(*decays))[0] for x in (weight * v, weight)]
    end = torch.stack([bmm(t, at_end.mT)[..., 0] for t in totals], 1)
    return _WeightedMeans.apply(weight, v, valid, *decays)[0], end


class _NLL(_Lean):
    """Minus the logarithm of the probability that logits (N, C) give to `ids` (N,); and all probabilities, of which its
    derivative is made: what flows back into them is the second derivative."""

    @staticmethod
    def forward(logits, ids):
        logs = torch.log_softmax(logits, -1)
        return -logs.gather(-1, ids[..., None])[..., 0], logs.exp_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output[1])
        ctx.set_materialize_grads(False)  # at first nothing flows there

    @staticmethod
    def backward(ctx, g, of_probabilities):
        ids, probabilities = ctx.saved_tensors
        slope = bent = None
        if g is not None:
            slope = (probabilities * g[..., None]).scatter_add_(-1, ids[..., None], -g[..., None])
        if of_probabilities is not None:
            bent = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
        return _both(slope, bent), None


def _cross_entropy(logits, target, ignore_index, reduction, label_smoothing, **others):
    """Of class indices; the classes are dimension 1 of the logits, or 0 of a single item's."""
    weighted = any(value is not None for value in others.values())  # by class, or as it was said in older versions
    if weighted or label_smoothing or target.is_floating_point() or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    counted = target != ignore_index
    losses = _NLL.apply(logits.movedim(min(1, logits.ndim - 1), -1), target * counted)[0] * counted
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


class _LayerNorm(_Lean):
    """With n the input (N, D) less its mean, by its scale s, a = g weight, P(a) = a - mean(a) - n mean(a n): the slope
    of the input is P(a) / s, that of the weight the sum of g n, that of the bias the sum of g."""

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
        return *_LayerNormSlopes.apply(g, *ctx.saved_tensors), None


class _LayerNormSlopes(_Lean):
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

        n, a, straight = (x - mean) * inverse, g * weight, projected(of_x)
        of_g = torch.addcmul(torch.addcmul(of_bias, n, of_weight), straight, weight)
        of_n = torch.addcmul(torch.addcmul(g * of_weight, of_x, shared(a, n)), a, shared(of_x, n))
        bent_x = torch.addcmul(projected(of_n), n, shared(straight, a))  # P is symmetric: of_x P(a) = P(of_x) a
        return of_g, bent_x, _over_rows(straight * g), None, None, None


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
    lerps: _lerps,
    weighted_means: _weighted_means,
    F.cross_entropy: _cross_entropy,
    F.layer_norm: _layer_norm,
}
