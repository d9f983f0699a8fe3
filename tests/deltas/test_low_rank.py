"""Gradient factors multiply to the gradient; a delta equals merged weights, and the weights are never written."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from checks import digest, full_change, ids_of, random_delta
from torch.testing import assert_close

from prosg_lib import files
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.gradient_factors import TokenFactors, best_rank, gradient_factors, spectrum
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import NotFinite, UserError

MAPS = ("blocks.0.att.output", "blocks.1.ffn.key", "blocks.2.ffn.value")

every_family = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


delta_for = functools.partial(random_delta, names=MAPS)


def merged(make_lm, lm, delta, row):
    """A copy of the model with row's change written into its weights."""
    other = make_lm(dtype=lm.emb.weight.dtype)
    with torch.no_grad():
        for name, (u, v) in delta.factors.items():
            other.editable()[name].weight += delta.scale * u[row] @ v[row].t()
    return other


# --- gradients ----------------------------------------------------------------------------------------------------


def loss_of(lm, ids):
    logits, _ = lm(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_factors_under_a_delta(make_lm, lm64):
    """The gradient at the changed weights is that of the merged model."""
    ids, delta = ids_of(1, 9), delta_for(lm64, 1)
    other = merged(make_lm, lm64, delta, 0)

    def changed():
        with applied(lm64, delta):
            return loss_of(lm64, ids)

    found = gradient_factors(lm64, list(MAPS), changed)
    for name in MAPS:
        grad = torch.autograd.grad(loss_of(other, ids), other.editable()[name].weight)[0]
        assert_close(found[name].grad_output.t() @ found[name].x, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [5, 40])
def test_spectrum_and_best_rank_are_those_of_the_full_matrix(tokens):
    """Eckart-Young: the truncated SVD, and an error of the spectrum's tail; few tokens and many."""
    g = torch.Generator().manual_seed(3)
    factors = TokenFactors(
        torch.randn(tokens, 12, generator=g, dtype=torch.float64),
        torch.randn(tokens, 7, generator=g, dtype=torch.float64),
    )
    full = factors.grad_output.t() @ factors.x
    u, s, vt = torch.linalg.svd(full, full_matrices=False)
    values = spectrum(factors)
    assert_close(values, s[: min(tokens, 7)], rtol=1e-10, atol=1e-10)
    for rank in range(1, min(tokens, 7) + 1):
        left, right = best_rank(factors, rank)
        assert_close(left @ right.t(), (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=1e-9, atol=1e-9)
        error = torch.linalg.matrix_norm(full - left @ right.t())
        assert_close(error, values[rank:].square().sum().sqrt(), rtol=1e-7, atol=1e-7)


# --- application --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shared", ["U", "V", "both"])
def test_shared_factors_are_one_for_all(lm64, shared):
    delta, ids = delta_for(lm64, 3), ids_of(3, 10)

    def cut(f, expand):
        u, v = (t[:1] if shared in (part, "both") else t for part, t in zip("UV", f, strict=True))
        return Factors(u.expand(3, -1, -1), v.expand(3, -1, -1)) if expand else Factors(u, v)

    small, large = (
        LowRankDelta({n: cut(f, e) for n, f in delta.factors.items()}, delta.fingerprint) for e in (False, True)
    )
    assert_close(lm64(ids, delta=small)[0], lm64(ids, delta=large)[0], rtol=1e-12, atol=1e-12)
    assert small.batch == (1 if shared == "both" else 3)
    # one change for all is a batch of one, and its only row is 0
    rows = [0, 0] if shared == "both" else [2, 0]
    chosen = [lm64(ids[:2], delta=d.select(rows))[0] for d in (small, large)]
    assert_close(*chosen, rtol=1e-12, atol=1e-12)


@every_family
def test_weights_are_never_written(lm):
    before, ids = digest(lm), ids_of(2, 6)
    plain = lm(ids)[0]
    for i in range(20):
        lm(ids, delta=delta_for(lm, 2, seed=i).scaled(100.0))

    def interrupted():
        with applied(lm, delta_for(lm, 2)):
            lm(ids)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    again = applied(lm, delta_for(lm, 2))
    changed = []
    for _ in range(2):
        with again:
            changed.append(lm(ids)[0])
        assert torch.equal(lm(ids)[0], plain)
    assert torch.equal(*changed)
    assert not torch.equal(changed[0], plain)
    list(lm.stream([[1], [2]], None, delta_for(lm, 2), 3, None))
    next(lm.stream([[1], [2]], None, delta_for(lm, 2), 3, None))  # abandoned half-way
    assert digest(lm) == before
    assert torch.equal(lm(ids)[0], plain)
    assert not any(m._forward_hooks for m in lm.modules())


# --- algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_sum_is_the_sum_of_changes(lm, shared):
    """With shared reading directions the rank of a sum stays that of one; `concatenated` never adds U."""
    several = [delta_for(lm, 2, seed=i).scaled(scale) for i, scale in enumerate((0.5, -2.0, 1.0))]
    if shared:
        own = {name: f.V for name, f in several[0].factors.items()}
        several = [replace(d, factors={n: Factors(f.U, own[n]) for n, f in d.factors.items()}) for d in several]
    total, apart = sum(several), functools.reduce(LowRankDelta.concatenated, several)
    for name in MAPS:
        expected = torch.stack([full_change(d, name) for d in several]).sum(0)
        for found in (total, apart):
            assert_close(full_change(found, name), expected, rtol=1e-5, atol=1e-6)
    assert (total.rank, apart.rank) == (2 if shared else 6, 6)
    ids = ids_of(2, 8)
    with applied(lm, several[0]), applied(lm, several[1]), applied(lm, several[2]):
        expected = lm(ids)[0]
    assert_close(lm(ids, delta=total)[0], expected, rtol=1e-3, atol=1e-4)
    assert sum(several[:1]) is several[0]
    with pytest.raises(TypeError):
        sum(several, 1)


def test_sums_with_other_maps_and_batches(lm):
    one, three = delta_for(lm, 1, seed=1, names=MAPS[:2]), delta_for(lm, 3, seed=2, names=MAPS[1:])
    total = one + three
    assert_close(full_change(total, MAPS[0]), full_change(one, MAPS[0]))
    assert_close(full_change(total, MAPS[1]), full_change(one, MAPS[1]) + full_change(three, MAPS[1]))
    assert_close(full_change(total, MAPS[2]), full_change(three, MAPS[2]))
    assert not full_change(three + three.scaled(-1.0), MAPS[2]).any()


def test_select_to_and_bytes(lm):
    delta = delta_for(lm, 3)
    rows = delta.select([2, 2])
    for name, f in delta.factors.items():
        assert torch.equal(rows.factors[name].U, f.U[[2, 2]])
        assert torch.equal(rows.factors[name].V, f.V[[2, 2]])
    # rank 2 of: output 16 x 16, ffn.key 32 x 16, ffn.value 16 x 32; 4 bytes each
    assert delta.nbytes() == 2 * 4 * (16 + 16 + 32 + 16 + 16 + 32) == 1024
    assert delta.to(torch.bfloat16).nbytes() == 512
    assert (delta.batch, delta.rank) == (3, 2)


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bit_for_bit(lm, tmp_path):
    delta = delta_for(lm, 3).scaled(0.3)
    delta.save(tmp_path / "d.safetensors")
    again = LowRankDelta.load(tmp_path / "d.safetensors")
    assert (again.fingerprint, again.scale) == (delta.fingerprint, delta.scale)
    assert again.factors.keys() == delta.factors.keys()
    for name, f in delta.factors.items():
        assert torch.equal(again.factors[name].U, f.U)
        assert torch.equal(again.factors[name].V, f.V)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a delta goes to where its model is
    ids = ids_of(3, 4).to(device)
    assert torch.equal(lm.to(device)(ids, delta=again)[0], lm(ids, delta=delta.to(device))[0])


def test_a_file_of_another_kind_is_refused(tmp_path):
    files.save_tensors(tmp_path / "d.safetensors", {"a": torch.zeros(1)}, {"kind": "lm"})
    with pytest.raises(UserError, match="holds a lm, not a delta"):
        LowRankDelta.load(tmp_path / "d.safetensors")


def changed(tensor, value):
    tensor.view(-1)[0] = value
    return tensor


U, V = (f"{MAPS[0]}.{part}" for part in "UV")


@pytest.mark.parametrize(
    ("edit", "header", "message"),
    [
        (lambda t: {U: None}, {}, r"unexpected or missing: blocks\.0\.att\.output\.U"),
        (lambda t: {"W": t[U]}, {}, "unexpected or missing: "),
        (lambda t: dict.fromkeys(t), {}, "needs at least one map"),
        (lambda t: {U: changed(t[U], math.nan)}, {}, r"blocks\.0\.att\.output have numbers that are NaN or infinite"),
        (lambda t: {V: changed(t[V], -math.inf)}, {}, "NaN or infinite"),
        (lambda t: {U: t[U].long()}, {}, r"are U \(3, 16, 2\) int64 and V \(3, 16, 2\) float32; .* floating point"),
        (lambda t: {V: t[V].to(torch.complex64)}, {}, "complex64"),
        (lambda t: {U: t[U][..., :0], V: t[V][..., :0]}, {}, "of one rank, none of them 0"),
        (lambda t: {U: t[U][:0]}, {}, "none of them 0"),
        (lambda t: {U: t[U][..., :1]}, {}, "of one rank"),
        (lambda t: {U: t[U][0]}, {}, r"should be \(batch, outputs, rank\)"),
        (lambda t: {U: t[U][:2]}, {}, "one size of batch .* batches of 2, 3"),
        (lambda t: {}, {"scale": None}, "scale should be a finite number"),
        (lambda t: {}, {"later": 5}, "later should be left out"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused_when_it_is_loaded(lm, tmp_path, edit, header, message):
    delta = delta_for(lm, 3)
    tensors = {f"{name}.{part}": t for name, f in delta.factors.items() for part, t in zip("UV", f, strict=True)}
    tensors |= edit(tensors)
    header = {"kind": "delta", "fingerprint": delta.fingerprint, "scale": 1.0} | header
    path = tmp_path / "d.safetensors"
    files.save_tensors(path, {name: t for name, t in tensors.items() if t is not None}, header)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}"):
        LowRankDelta.load(path)


def test_numbers_that_are_not_finite_are_neither_saved_nor_merged(lm, tmp_path):
    delta = delta_for(lm, 1)
    changed(delta.factors[MAPS[0]].U, math.nan)
    for keep in (delta.save, lambda path: delta.save_peft(path, lm), lambda path: delta.merged(lm)):
        with pytest.raises(NotFinite, match="NaN or infinite"):
            keep(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def random_factors(rows_of_x):
    return TokenFactors(torch.ones(5, 3), torch.ones(rows_of_x, 4))


def in_another_precision(lm, other):
    delta = delta_for(lm, 2)
    lm.bfloat16()(ids_of(2, 4), delta=delta)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda lm, other: lm(ids_of(2, 4), delta=delta_for(other, 2)), "made for model"),
        (in_another_precision, "made for model"),
        (
            lambda lm, other: lm(ids_of(2, 4), delta=on_map(lm, "blocks.9.att.output")),
            "blocks.9.att.output, which this",
        ),
        (lambda lm, other: lm(ids_of(2, 4), delta=on_map(lm, "head")), "changes head, which this model does not have"),
        (lambda lm, other: lm(ids_of(2, 4), delta=delta_for(lm, 3)), "2 sequences but a delta of batch 3"),
        (lambda lm, other: lm(ids_of(1, 4), delta=delta_for(lm, 3)), "1 sequences but a delta of batch 3"),
        (lambda lm, other: lm(ids_of(2, 4), delta=on_map(lm, MAPS[1])), "has 16 outputs and 16 inputs, here 32 and 16"),
        (lambda lm, other: delta_for(lm, 3) + delta_for(lm, 2), "batch 3 and 2"),
        (lambda lm, other: delta_for(lm, 1).scaled(math.nan), "scale of a delta cannot be nan"),
        (lambda lm, other: delta_for(lm, 1).scaled(1e39), r"scale of a delta cannot be 1e\+39"),
        (lambda lm, other: delta_for(lm, 1) + delta_for(other, 1), "derive both with the same model"),
        (lambda lm, other: best_rank(random_factors(5), 0), "rank 0 is not possible"),
        (lambda lm, other: best_rank(random_factors(5), 4), "rank 4 is not possible"),
        (lambda lm, other: spectrum(random_factors(4)), "one row per token"),
    ],
)
@torch.no_grad()
def test_mistakes_are_explained(lm, make_lm, mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(lm, make_lm(seed=1))
    assert not any(m._forward_hooks for m in lm.modules())


def on_map(lm, name):
    return LowRankDelta({name: delta_for(lm, 2).factors[MAPS[0]]}, lm.fingerprint())
