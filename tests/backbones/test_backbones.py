"""Every backbone keeps the interface's promises: the numbers of its class, read alone, one token at a time, however it
is batched, padded, cut and changed. The families are in `families.py`.
"""

import copy
import inspect
from unittest import mock

import pytest
import torch
from checks import digest, random_delta
from families import (
    CLOSE,
    DEVICES,
    FAMILIES,
    HEADS,
    MAMBA,
    OF_TRANSFORMERS,
    OLMO,
    OWN,
    RECURRENT,
    library,
    rows_of,
)
from torch.testing import assert_close
from transformers import DynamicCache

from prosg_lib.backbones import hub_recurrent
from prosg_lib.backbones.hub import HubModel
from prosg_lib.backbones.hub_recurrent import Recurrent
from prosg_lib.backbones.loading import load_model, save_model
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.gradient_factors import captured_inputs, gradient_factors
from prosg_lib.errors import UserError

LENGTHS = (5, 1, 23, 11)  # more than a chunk of 8, more than a window of 8


@torch.no_grad()
def alone(lm, row, own):
    """Logits (T, vocab) of one text, one token at a time; by the class as it comes, unless the model is the project's
    own."""
    ids = torch.tensor([row], device=next(lm.parameters()).device)
    if own:
        logits, state = [], None
        for token in ids.split(1, 1):
            out, state = lm(token, state)
            logits.append(out[0])
        return torch.cat(logits)
    theirs = type(lm.model)(lm.model.config).eval().to(lm.model.dtype).to(ids.device)
    theirs.load_state_dict(lm.model.state_dict())
    takes = inspect.signature(theirs.forward).parameters
    if "cache_params" in takes:
        name, cache = "cache_params", None
    else:
        name, cache = "past_key_values", DynamicCache(config=theirs.config)
    logits = []
    for place, token in enumerate(ids.split(1, 1)):
        where = {"position_ids": ids.new_tensor([[place]])} if "position_ids" in takes else {}
        out = theirs(token, use_cache=True, **{name: cache}, **where)
        cache = getattr(out, name, cache)
        logits.append(out.logits[0])
    return torch.cat(logits)


class Case:
    """A family's model, some texts, and what its class says of each alone."""

    def __init__(self, name, device):
        self.name, self.device = name, device
        self.lm = self.make()
        self.rows = rows_of(LENGTHS)
        self.own = name in OWN
        self.expected = [alone(self.lm, row, self.own) for row in self.rows]

    def make(self):
        return FAMILIES[self.name]().to(self.device).eval().requires_grad_(False)


CASES = {}


@pytest.fixture(params=[(name, device) for name in FAMILIES for device in DEVICES], ids="-".join)
def case(request):
    if request.param not in CASES:
        CASES[request.param] = Case(*request.param)
    return CASES[request.param]


recurrent_only = pytest.mark.parametrize(
    "case", [(name, device) for name in RECURRENT for device in DEVICES], ids="-".join, indirect=True
)


def copied(state):
    return {name: t.clone() for name, t in state.tensors.items()}


def assert_rows_close(logits, expected, **tolerance):
    """Of a left-padded batch, the last tokens of each row."""
    for many, one in zip(logits, expected, strict=True):
        assert_close(many[len(many) - len(one) :], one, **tolerance or CLOSE)


# Padding, cuts, batches


@torch.no_grad()
def test_padding_changes_nothing(case):
    """Rows of different lengths in one batch, whatever stands in the padding, also one that is padding alone."""
    lm = case.lm
    assert case.expected[2].std() > 0.3
    ids, valid = lm.encode_prompts(case.rows)
    for fill in (0, 7):
        assert_rows_close(lm(torch.where(valid, ids, fill), valid=valid)[0], case.expected)
    empty = torch.zeros_like(ids[:1])
    logits, state = lm(torch.cat([ids, empty]), valid=torch.cat([valid, empty.bool()]))
    assert_rows_close(logits[:4], case.expected)
    assert_rows_close(lm(ids[3:, -11:], state.select([4]))[0], case.expected[3:])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(2, 1, 9, 4), (4, 0, 1, 10), (1, 1, 22, 3)], ids=str)
def test_a_text_in_two_pieces_is_the_text(case, cuts):
    """Rows are cut at different places, so that both pieces have padding, the second behind states; a row whose first
    piece is empty starts blank, one whose second is empty keeps its state."""
    lm, place = case.lm, {"device": case.device}

    def padded(rows):
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], **place)
        return ids, torch.arange(longest, **place) >= longest - torch.tensor([[len(r)] for r in rows], **place)

    ids, valid = padded([row[:cut] for row, cut in zip(case.rows, cuts, strict=True)])
    first, state = lm(ids, valid=valid)
    before = copied(state)
    ids, valid = padded([row[cut:] for row, cut in zip(case.rows, cuts, strict=True)])
    second, after = lm(ids, state, valid=valid)
    assert_rows_close(first, [e[:c] for e, c in zip(case.expected, cuts, strict=True)])
    assert_rows_close(second, [e[c:] for e, c in zip(case.expected, cuts, strict=True)])
    assert all(torch.equal(t, before[name]) for name, t in state.tensors.items())
    more = rows_of((1,) * 4, seed=9)
    last = lm(torch.tensor(more, **place), after)[0]
    chosen = lm(torch.tensor([more[2], more[0]], **place), after.select([2, 0]))[0]
    assert_close(chosen, last[[2, 0]], **CLOSE)
    assert_close(last[0, 0], alone(lm, case.rows[0] + more[0], case.own)[-1], **CLOSE)


@torch.no_grad()
def test_one_token_at_a_time_is_the_text(case):
    """In a batch, every row from a state of its own; and from the blank state, which is no state."""
    lm = case.lm
    rows = torch.tensor([case.rows[2][:11], case.rows[3]], device=case.device)
    for state in (None, lm.blank_state(2)) if case.name in RECURRENT else (None,):
        logits = []
        for token in rows.split(1, 1):
            out, state = lm(token, state)
            logits.append(out)
        assert_rows_close(torch.cat(logits, 1), [case.expected[2][:11], case.expected[3]])


@torch.no_grad()
def test_going_on_twice_from_one_state_is_the_same_twice(case):
    """Not a bit differs, nor does a bit of the state change: one token, several, and a generation in between."""
    lm = case.lm
    state = lm.derive_state(case.rows)
    before = copied(state)
    more = torch.tensor(rows_of((6,) * 4, seed=3), device=case.device)
    for ids in (more, more[:, :1]):
        first, after = lm(ids, state)
        list(lm.stream(case.rows, state, max_new_tokens=3, stop=None))
        second, again = lm(ids, state)
        assert torch.equal(first, second)
        assert all(torch.equal(t, again.tensors[name]) for name, t in after.tensors.items())
        assert all(torch.equal(t, before[name]) for name, t in state.tensors.items())


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_whole_text(case):
    """Of a padded batch; each token is what the class, given all before it at once, says next."""
    lm = case.lm
    steps = torch.stack(list(lm.stream(case.rows, max_new_tokens=5, stop=None, ignore_eos=True)), 1).tolist()
    assert len({tuple(row) for row in steps}) > 1
    for row, new in zip(case.rows, steps, strict=True):
        ids = torch.tensor([row + new], device=case.device)
        logits = lm(ids)[0] if case.own else lm.model(ids).logits
        assert logits[0, len(row) - 1 : -1].argmax(-1).tolist() == new


@torch.no_grad()
def test_texts_end_where_the_model_ends_them(case):
    """At what the class's generation would end them at; for the others of the batch nothing changes."""
    lm = case.make()
    free = torch.stack(list(lm.stream(case.rows, max_new_tokens=6, stop=None, ignore_eos=True)), 1).tolist()
    if isinstance(lm, HubModel):
        assert lm.ends == (1,)
    lm.ends = (free[0][1], free[1][3], free[2][1])
    cut = [next((n for n, token in enumerate(row) if token in lm.ends), 6) for row in free]
    steps = torch.stack(list(lm.stream(case.rows, max_new_tokens=6, stop=None)), 1).tolist()
    assert steps == [(row[:n] + [-1] * 6)[: len(steps[0])] for row, n in zip(free, cut, strict=True)]
    assert lm.generate(case.rows, max_new_tokens=6, stop=None) == [row[:n] for row, n in zip(free, cut, strict=True)]


# Changes of the weights


@torch.no_grad()
def test_a_delta_is_merged_weights(case):
    """On every editable map at once, one change a row: in a padded batch, from a state, and one token at a time."""
    lm, rows = case.lm, [case.rows[0], case.rows[3]]
    delta = random_delta(lm, 2)
    expected = []
    for number, row in enumerate(rows):
        other = copy.deepcopy(lm)
        for name, (u, v) in delta.factors.items():
            module, change = other.editable()[name], delta.scale * u[number] @ v[number].t()
            module.weight += change if isinstance(module, torch.nn.Linear) else change.t()
        expected.append(alone(other, row, case.own))
    ids, valid = lm.encode_prompts(rows)
    logits, _ = lm(ids, None, delta, valid)
    assert_rows_close(logits, expected)
    assert (logits - lm(ids, valid=valid)[0])[valid].abs().max() > 0.3
    state = lm.derive_state([row[:2] for row in rows], delta=delta)
    ids, valid = lm.encode_prompts([row[2:] for row in rows])
    logits, state = lm(ids[:, :-1], state, delta, valid[:, :-1])
    assert_rows_close(logits, [e[2:-1] for e in expected])
    assert_rows_close(lm(ids[:, -1:], state, delta)[0], [e[-1:] for e in expected])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_left_of_a_delta(case, dtype):
    """A zero change is none, to the bit. After 1,000 prompts with a change each, no bit of weights or logits is new."""
    lm = case.make().to(dtype)
    ids = torch.tensor(rows_of((7, 7)), device=case.device)
    before, plain = digest(lm), lm(ids)[0]
    delta = random_delta(lm, 2)
    assert torch.equal(lm(ids, delta=delta.scaled(0.0))[0], plain)
    delta = random_delta(lm, 200)
    for seed in range(5):
        list(lm.stream(rows_of((3,) * 200, seed), delta=delta.scaled(1.0 + seed), max_new_tokens=1, stop=None))
    assert digest(lm) == before
    assert torch.equal(lm(ids)[0], plain)


@torch.no_grad()
def test_editable_maps_get_every_token_of_every_sequence(case):
    """Once a pass, (B, T, in), also where padding or a state makes it several passes; so that a delta of each sequence,
    and a generator that reads the inputs, can be right."""
    lm = case.lm
    maps = lm.editable()
    assert len(maps) >= 4
    if isinstance(lm, HubModel):
        assert all(lm.model.get_submodule(name) is module for name, module in maps.items())
    state = lm.derive_state(case.rows)
    ids, valid = lm.encode_prompts(case.rows)
    if case.name in RECURRENT:
        with captured_inputs(lm, list(maps)) as inputs:
            lm(ids, state, valid=valid)
        assert {name: tuple(x.shape) for name, x in inputs.items()} == {
            name: (4, 23, m.in_features) for name, m in maps.items()
        }


# Gradients


@recurrent_only
@pytest.mark.parametrize("last", [1, 6])
def test_the_gradient_goes_through_the_state(case, last):
    """Of the last tokens' loss, by the embeddings and by a map of the first layer: a text in two pieces has the
    gradient of the text. By the state itself: finite, and not zero for any layer."""
    lm = case.make()
    ids = torch.tensor([case.rows[2], rows_of((23,), 4)[0]], device=case.device)
    leaves = [next(p for n, p in lm.named_parameters() if "emb" in n), next(iter(lm.editable().values())).weight]
    for leaf in leaves:
        leaf.requires_grad_()
    whole = torch.autograd.grad(lm(ids)[0][:, -last:].square().sum(), leaves)
    _, state = lm(ids[:, :-last])
    pieces = torch.autograd.grad(lm(ids[:, -last:], state)[0].square().sum(), leaves)
    for one, other in zip(whole, pieces, strict=True):
        assert_close(other, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())

    for leaf in leaves:
        leaf.requires_grad_(False)
    state = RecurrentState(
        {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in state.tensors.items()}
    )
    moved = {name: t for name, t in state.tensors.items() if t.requires_grad}
    loss = lm(ids[:, -last:], state)[0].square().sum()
    slopes = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    for name, slope in zip(moved, slopes, strict=True):
        if name.rpartition(".")[2] not in ("m", "scale"):  # a gauge, of which nothing depends
            assert torch.isfinite(slope).all()
            assert slope.abs().max() > 0, name


def test_gradients_of_a_padded_batch_are_those_of_each_alone(case):
    lm = case.make()
    weight = next(iter(lm.editable().values())).weight.requires_grad_()
    ids, valid = lm.encode_prompts(case.rows)
    (together,) = torch.autograd.grad((lm(ids, valid=valid)[0].square().sum(-1) * valid).sum(), weight)
    single = 0
    for row in case.rows:
        loss = lm(torch.tensor([row], device=case.device))[0].square().sum()
        single = single + torch.autograd.grad(loss, weight)[0]
    assert_close(together, single, rtol=1e-3, atol=1e-4 * single.abs().max().item())


def test_gradient_factors_are_the_gradient(case):
    """delta^T x of every editable map is its weight's gradient, also of a text that is read in pieces."""
    lm = case.make()
    ids = torch.tensor(rows_of((9, 9)), device=case.device)
    names = list(lm.editable())

    def loss_of():
        first, state = lm(ids[:, :4])
        return torch.cat([first, lm(ids[:, 4:], state)[0]], 1).square().mean()

    factors = gradient_factors(lm, names, loss_of)
    weights = [lm.editable()[name].weight.requires_grad_() for name in names]
    slopes = torch.autograd.grad(loss_of(), weights)
    for name, slope in zip(names, slopes, strict=True):
        found = factors[name].grad_output.t() @ factors[name].x
        slope = slope if isinstance(lm.editable()[name], torch.nn.Linear) else slope.t()
        assert_close(found, slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())


def test_a_kernel_without_a_gradient_is_said(monkeypatch):
    """Where a package is installed whose step by one token has none: an error, but only if there would be one."""
    lm = FAMILIES["mamba2"]().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    state = lm.derive_state(ids.tolist())
    wanted = RecurrentState({name: t.clone().requires_grad_() for name, t in state.tensors.items()})
    monkeypatch.setattr("prosg_lib.backbones.hub_recurrent.find_spec", lambda name: name == "mamba_ssm")
    with pytest.raises(UserError, match="one token from a state has no gradient with the kernels of mamba_ssm; read"):
        lm(ids[:, :1], wanted)
    lm(ids[:, :1], state)
    lm(ids, wanted)
    lm.requires_grad_()
    with pytest.raises(UserError, match=r"or under torch\.no_grad"):
        lm(ids[:, :1], state)
    with torch.no_grad():
        lm(ids[:, :1], wanted)


# Numbers


@torch.no_grad()
def test_bfloat16(case):
    """Near the float32 model of the same weights, whole and in pieces; sums over many tokens are kept in float32."""
    exact = case.make().to(torch.bfloat16).float()
    lm = case.make().to(torch.bfloat16)
    ids, valid = lm.encode_prompts(case.rows)
    logits, state = lm(ids, valid=valid)
    expected = exact(ids, valid=valid)[0]
    assert torch.isfinite(logits[valid]).all()

    def off(a, b):
        return ((a.float() - b).square().mean().sqrt() / b.std()).item()

    assert off(logits[valid], expected[valid]) < 0.1
    sums = [t for name, t in state.tensors.items() if name.rpartition(".")[2] in ("state", "num", "wkv", "matrix")]
    assert all(t.dtype == torch.float32 for t in sums)
    assert sums or case.name not in RECURRENT or case.name.startswith(("window", "short_window", "lfm2"))
    weights = lm.state_dict().keys()  # rotary frequencies and the like are none, and need their digits
    kept = {name: t for name, t in case.lm.named_buffers() if name not in weights}
    assert all(torch.equal(t, kept[name]) for name, t in lm.named_buffers() if name in kept)
    more = torch.tensor(rows_of((5,) * 4, 8), device=case.device)
    assert off(lm(more, state)[0], exact(more, exact.derive_state(case.rows))[0]) < 0.15


@torch.no_grad()
def test_a_models_own_embedding_and_blocks(case):
    """`embed` is what the first block gets; `step_through` leads to `read_out` as `forward` does."""
    lm = case.lm
    ids = torch.tensor(case.rows[3:], device=case.device)
    got = []
    blocks = next(m for m in lm.modules() if isinstance(m, torch.nn.ModuleList))
    handle = blocks[0].register_forward_pre_hook(lambda module, args: got.append(args[0]))
    hidden, _ = lm.step_through(ids)
    handle.remove()
    embedded = lm.embed(ids)
    if case.name != "gpt2":  # whose blocks get a learned position besides
        assert_close(torch.cat(got, 1), embedded)
    assert embedded.shape == hidden.shape == (1, 11, lm.config.width)
    assert_close(lm.read_out(hidden)[0], case.expected[3], **CLOSE)


# The state


BYTES = {  # of one sequence, by hand: 4 bytes x layers x numbers
    "rwkv4": 4 * 2 * 5 * 32,
    "rwkv7": 4 * 2 * (2 * 32 + 4 * 8 * 8),
    "mamba": 4 * 2 * 64 * (4 + 4),
    "falcon_mamba": 4 * 2 * 64 * (4 + 4),
    "mamba2": 4 * 2 * ((64 + 2 * 2 * 8) * 4 + 4 * 16 * 8),
    "xlstm": 4 * 2 * 2 * (32 * 64 + 32 + 1),
    "window": 4 * 2 * 63 * 2 * 16 + 8,
    "short_window": 4 * 2 * 7 * 2 * 16 + 8,
}
KEYS = {"recurrent_gemma": 2 * 16, "falcon_h1": 2 * 2 * 16}  # numbers a token; 2 x 16 in the other hybrids


@recurrent_only
def test_bytes(case):
    """The same however long the text was; only keys and values grow, by what they are, and to the window if there is
    one. `grows` says so."""
    lm = case.lm
    one, some, many = (lm.derive_state([row]).nbytes() for row in rows_of((1, 6, 41)))
    if lm.state_grows:
        token = 4 * KEYS.get(case.name, 2 * 16)
        assert some - one == 5 * token
        assert many - some == token * (35 if case.name != "recurrent_gemma" else 1)
        assert lm.blank_state(3).nbytes() == one - token
    else:
        assert one == some == many == lm.blank_state(3).nbytes() == BYTES[case.name]


@recurrent_only
@torch.no_grad()
def test_features(case):
    """Of one size whatever was read, finite, different for different texts, the same in a batch as alone, and half
    precision does not change what they are."""
    lm = case.lm
    features = lm.state_features(lm.derive_state(case.rows))
    assert torch.isfinite(features).all()
    for number, row in enumerate(case.rows):
        assert_close(features[[number]], lm.state_features(lm.derive_state([row])), **CLOSE)
    apart = torch.cdist(features, features) + 10 * torch.eye(4, device=case.device)
    assert apart.min() > 0.05
    blank = lm.state_features(lm.blank_state(2))
    assert blank.shape == (2, features.shape[1])
    assert torch.isfinite(blank).all()
    assert not torch.equal(blank[0], features[0])


def test_another_batch_is_refused(case):
    state = case.lm.derive_state(case.rows)
    with pytest.raises(UserError, match="2 sequences but a state of batch 4"):
        case.lm(torch.ones(2, 1, dtype=torch.long, device=case.device), state)


# Files


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("rwkv") and not n.endswith("window")])
def test_a_saved_folder_loads_to_the_same_model(name, tmp_path):
    """By `save_model`; and in half precision, which comes back as float32, as the class's own `save_pretrained`."""
    lm = FAMILIES[name]().eval()
    save_model(lm, tmp_path / "ours", "transformers")
    again = load_model(tmp_path / "ours")
    assert type(again) is type(lm)
    assert again.config == lm.config
    assert again.fingerprint() == lm.fingerprint()
    assert not again.training
    lm.to(torch.bfloat16).model.save_pretrained(tmp_path / "half")
    again = load_model(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    ids = torch.tensor(rows_of((9, 9)))
    assert torch.equal(again(ids)[0], lm.float()(ids)[0])


# Classes of one's own


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_the_adapters_claims_are_checked(name):
    FAMILIES[name]().eval().check()


def test_claims_that_are_wrong_are_found():
    """Mamba's class is wrong for several tokens from a state, RecurrentGemma's for any; both as they come."""

    class Bold(Recurrent):
        continues_from_state = True

    with pytest.raises(UserError, match=r"Bold is wrong by .* for several tokens .*`continues_from_state` False"):
        Bold(library("Mamba", **MAMBA)).eval().check()
    Recurrent(library("Mamba", **MAMBA)).eval().check()

    class Padded(Recurrent):
        handles_padding = True

        def _where(self, ids, state, valid, cache):
            return {}, {}

    with pytest.raises(UserError, match=r"Padded is wrong by .* for padding .*`handles_padding` False"):
        Padded(library("Mamba", **MAMBA)).eval().check()

    class Capped(Recurrent):
        pass

    with pytest.raises(UserError, match="more to its logits than multiply by the output embedding; Capped needs"):
        Capped(library("RecurrentGemma", **HEADS, block_types=["recurrent", "attention"]))


@torch.no_grad()
def test_the_example_of_a_class_of_ones_own(tmp_path, monkeypatch):
    """The code that `register` shows, as it stands, on a class as if the project did not know it: right however it is
    batched, padded and cut, and with a change of the weights."""
    monkeypatch.chdir(tmp_path)
    library("OlmoHybrid", **HEADS, **OLMO).save_pretrained(tmp_path / "olmo-hybrid")
    _, _, example = inspect.getdoc(hub_recurrent.register).partition("::\n")
    scope = {}
    with mock.patch.dict(hub_recurrent.ADAPTERS):
        del hub_recurrent.ADAPTERS["olmo_hybrid"]
        with pytest.raises(UserError, match="OlmoHybridForCausalLM does not read padded text as a plain transformer"):
            load_model("olmo-hybrid")
        exec(compile(inspect.cleandoc(example), "hub_recurrent.register", "exec"), scope)
    lm = scope["lm"]
    rows = rows_of((5, 9))
    expected = [alone(lm, row, own=False) for row in rows]
    ids, valid = lm.encode_prompts(rows)
    assert_rows_close(lm(ids, valid=valid)[0], expected)
    state = lm.derive_state([row[:3] for row in rows])
    ids, valid = lm.encode_prompts([row[3:] for row in rows])
    assert_rows_close(lm(ids, state, valid=valid)[0], [e[3:] for e in expected])
