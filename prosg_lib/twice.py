"""Second derivatives with less arithmetic than PyTorch's own, for what is differentiated twice.

PyTorch derives most second derivatives step by step from the formula of the first; each step passes over the whole
input. Here they are written out, or led through what is cheap to differentiate twice.

Glossary of shapes: N any leading dimensions, D width, C classes.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from prosg_lib.backbones.rwkv import lerps, squared_relu
from prosg_lib.backbones.wkv import in_chunks, out_of_chunks, weighted_means

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


class _Ratio(_Lean):
    @staticmethod
    def forward(above, below):
        return above / below

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx, g):
        below, ratio = ctx.saved_tensors
        of_above = _Ratio.apply(g, below)
        return of_above, -(of_above * ratio)


def _divided(x, other, rounding_mode=None):
    if rounding_mode is not None or not isinstance(other, Tensor) or (x.shape, x.dtype) != (other.shape, other.dtype):
        return NotImplemented
    return _Ratio.apply(x, other)


class _WeightedMeans(_Lean):
    """num / den, the decayed sums of weight v and of weight (D, B, T), of which they have been made in two levels
    (`wkv.weighted_means`). The slopes are made of den, too: what flows back into it is part of the second derivative.
    """

    @staticmethod
    def forward(weight, v, valid, within, total, over, since):
        sums = []
        for x in (weight * v, weight):
            rows = in_chunks(x, within)
            _, found = _found(rows, total, over)
            y = torch.addcmul(rows @ within, _before(found), since)
            sums.append((out_of_chunks(y, x), found[..., -1].clone()))
        (num, end_num), (den, end_den) = sums
        den = den if valid is None else den.masked_fill(~valid, torch.inf)
        return num / den, end_num, end_den, den

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, v, _, *decays = inputs
        mean, _, _, den = output
        ctx.save_for_backward(weight, v, mean, den, *decays)
        ctx.set_materialize_grads(False)  # at first nothing flows into den

    @staticmethod
    def backward(ctx, to_mean, to_end_num, to_end_den, to_den):
        weight, v, mean, den, *decays = ctx.saved_tensors
        to_mean = torch.zeros_like(weight) if to_mean is None else to_mean.contiguous()  # it was transposed
        ends = [torch.zeros_like(weight[..., 0]) if to is None else to for to in (to_end_num, to_end_den)]
        if any(ctx.needs_input_grad[3:]):
            of = _WeightedMeansSlopes.apply(to_mean, *ends, to_den, *ctx.saved_tensors)
            return *of[:2], None, *of[3:]
        to_num = _Ratio.apply(to_mean, den)
        to_den = _both(-(to_num * mean), to_den)
        of_num, of_den = (_back(to, end, *decays) for to, end in zip((to_num, to_den), ends, strict=True))
        return torch.addcmul(of_den, of_num, v), of_num * weight, None, None, None, None, None


class _WeightedMeansSlopes(_Lean):
    """In its derivative, a name with _ is the change of what has the name, when weight, v and the decays change by what
    flows back into their slopes."""

    @staticmethod
    def forward(to_mean, to_end_num, to_end_den, to_den, weight, v, mean, den, *decays):
        within, total, over, since = decays
        to_num = to_mean / den
        to_den = _both(-(to_num * mean), to_den)
        of_x, of_decays = [], []
        for x, to, to_end in ((weight * v, to_num, to_end_num), (weight, to_den, to_end_den)):
            of_x.append(_back(to, to_end, *decays))
            x, to = in_chunks(x, within), in_chunks(to, within)
            totals, found = _found(x, total, over)
            to_totals, to_found = _to_totals(to, to_end, over, since)
            of_decays.append((x.mT @ to, to_totals.mT @ x, totals.mT @ to_found, _before(found).mT @ to))
        of_num, of_den = of_x
        return torch.addcmul(of_den, of_num, v), of_num * weight, of_num, *map(torch.add, *of_decays)

    @staticmethod
    def setup_context(ctx, inputs, output):
        to_mean, to_end_num, to_end_den, _, *others = inputs
        of_num = output[2]
        ctx.mark_non_differentiable(of_num)
        ctx.save_for_backward(of_num, to_mean, to_end_num, to_end_den, *others)

    @staticmethod
    def backward(ctx, weight_, v_, _, within_, total_, over_, since_):
        of_num, to_mean, to_end_num, to_end_den, weight, v, mean, den, within, total, over, since = ctx.saved_tensors
        weight_, v_ = weight_.contiguous(), v_.contiguous()
        to_num = to_mean / den
        of_sums, of_ends, of_x, of_decays = [], [], [], []
        for x, x_, to, to_end in (
            (weight * v, torch.addcmul(weight_ * v, weight, v_), to_num, to_end_num),
            (weight, weight_, -(to_num * mean), to_end_den),
        ):
            x, x_, to = in_chunks(x, within), in_chunks(x_, within), in_chunks(to, within)
            totals, found = _found(x, total, over)
            totals_ = _product_(x, total.mT, x_, total_.mT).view_as(totals)
            found_ = _product_(totals, over, totals_, over_)
            sums_ = torch.addcmul(_product_(x, within, x_, within_), _before(found_), since)
            of_sums.append(out_of_chunks(torch.addcmul(sums_, _before(found), since_), weight))
            of_ends.append(found_[..., -1])

            to_totals, to_found = _to_totals(to, to_end, over, since)
            to_found_ = F.pad((to @ since_.mT).view_as(totals), (0, 1))
            to_totals_ = _product_(to_found, over.mT, to_found_, over_.mT).view_as(to_totals)
            back_ = torch.addcmul(to @ within_.mT, to_totals_, total)
            of_x.append(out_of_chunks(torch.addcmul(back_, to_totals, total_), weight))
            of_within, of_total = x_.mT @ to, _product_(to_totals.mT, x, to_totals_.mT, x_)
            of_over, of_since = _product_(totals.mT, to_found, totals_.mT, to_found_), _before(found_).mT @ to
            of_decays.append((of_within, of_total, of_over, of_since))
        (num_, den_), (of_weight_v, of_weight) = of_sums, of_x
        of_to_mean = torch.addcmul(num_, mean, den_, value=-1) / den
        of_weight = torch.addcmul(torch.addcmul(of_weight, of_weight_v, v), v_, of_num)
        of_v = torch.addcmul(of_weight_v * weight, weight_, of_num)
        of_mean, of_den = -(to_num * den_), -(to_num * of_to_mean)
        return of_to_mean, *of_ends, None, of_weight, of_v, of_mean, of_den, *map(torch.add, *of_decays)


def _found(x, total, over):
    """The totals of chunks x (D, R, C), (D, B, n), and what each of them finds, and the end, (D, B, n + 1)."""
    totals = (x @ total.mT).view(len(x), -1, over.shape[1])
    return totals, totals @ over


def _before(found):
    return found[..., :-1].reshape(len(found), -1, 1)


def _to_totals(to_sums, to_end, over, since):
    """What flows back into the totals, (D, R, 1), and into what the chunks find."""
    to_found = (to_sums @ since.mT).view(len(to_sums), -1, over.shape[1])
    to_found = torch.cat([to_found, to_end[..., None]], -1)
    return (to_found @ over.mT).view(len(to_sums), -1, 1), to_found


def _back(to_sums, to_end, within, total, over, since):
    """What flows back into that which is added up, (D, B, T)."""
    to = in_chunks(to_sums, within)
    to_totals, _ = _to_totals(to, to_end, over, since)
    return out_of_chunks(torch.addcmul(to @ within.mT, to_totals, total), to_sums)


def _product_(a, b, a_, b_):
    """How a b changes when they change by a_ and b_."""
    return torch.baddbmm(a_ @ b, a, b_)


def _weighted_means(weight, v, past, valid, within, total, over, end, since):
    if past is not None:
        return NotImplemented
    mean, *ends, _ = _WeightedMeans.apply(weight, v, valid, within, total, torch.cat([over, end.mT], -1), since)
    return mean, torch.stack(ends, 1)


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
    torch.div: _divided,
    Tensor.div: _divided,
    F.cross_entropy: _cross_entropy,
    F.layer_norm: _layer_norm,
}
