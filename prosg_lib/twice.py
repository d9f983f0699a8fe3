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
        # WKV's comes from a transposed tensor; what is made of it in that order takes several times as long.
        of_above = _Ratio.apply(g.contiguous(), below)
        return of_above, -(of_above * ratio)


def _divided(x, other, rounding_mode=None):
    if rounding_mode is not None or not isinstance(other, Tensor) or (x.shape, x.dtype) != (other.shape, other.dtype):
        return NotImplemented
    return _Ratio.apply(x, other)


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
    torch.div: _divided,
    Tensor.div: _divided,
    F.cross_entropy: _cross_entropy,
    F.layer_norm: _layer_norm,
}
