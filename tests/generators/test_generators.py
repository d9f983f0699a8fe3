"""Every generator: rank at most r, whatever the batch, the model is frozen; the token-wise one streams and adds."""

import pytest
import torch
from checks import assert_same_change, digest, full_change, ids_of
from families import FAMILIES, rows_of
from torch.testing import assert_close

from prosg_lib.errors import UserError
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.mend import TransformedGradient
from prosg_lib.generators.states import StateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator

ENDINGS = ("att.output", "ffn.key", "ffn.value")
MAKE = {
    "final": lambda lm, rank: FinalStateGenerator(lm, rank, 24, ENDINGS),
    "token": lambda lm, rank: TokenGenerator(lm, rank, 24, ENDINGS),
    "static": lambda lm, rank: StaticDelta(lm, rank, ENDINGS),
    "states": lambda lm, rank: StateGenerator(lm, rank, 24, ENDINGS, terms=5, size=6, ends=(7, 8)),
    "mend": lambda lm, rank: TransformedGradient(lm, rank, 5, ENDINGS, 0.2),
}

every_family = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
every_kind = pytest.mark.parametrize("kind", MAKE)


def make(kind, lm, rank=3, trained=True):
    """A generator; `trained`: with no parameter that is zero, as last layers are at first."""
    torch.manual_seed(0)
    generator = MAKE[kind](lm, rank)
    for p in generator.parameters():
        if trained and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return generator.to(lm.emb.weight.dtype).eval()


@every_family
@pytest.mark.parametrize("kind", ["final", "token", "states", "static"])
def test_no_effect_before_training(lm, prompts, kind):
    delta = make(kind, lm, trained=False).memorize(lm, prompts)
    ids = ids_of(4, 20)
    assert torch.equal(lm(ids, delta=delta)[0], lm(ids)[0])


@every_family
@every_kind
@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_is_at_most_r(lm64, prompts, kind, rank):
    delta = make(kind, lm64, rank).memorize(lm64, prompts)
    names = [f"blocks.{layer}.{ending}" for layer in range(3) for ending in ENDINGS]
    assert sorted(delta.factors) == sorted(names)
    for name in names:
        change = full_change(delta, name)
        assert change.shape == (4, *lm64.editable()[name].weight.shape)
        # the second prompt has one token, so a sum over those with a next one has no term
        expected = torch.full((4,), rank)
        expected[1] = 0 if kind in ("token", "mend") else rank
        assert torch.equal(torch.linalg.matrix_rank(change), expected)


@every_family
@every_kind
def test_a_padded_batch_is_one_at_a_time(lm64, prompts, kind):
    generator = make(kind, lm64)
    generator.fit_normaliser(lm64, *lm64.encode_prompts(prompts))
    together = generator.memorize(lm64, prompts)
    for row, prompt in enumerate(prompts):
        assert_same_change(together.select([row]), generator.memorize(lm64, [prompt]), rtol=1e-8, atol=1e-10)


@every_family
@every_kind
def test_only_the_static_delta_ignores_the_prompt(lm, prompts, kind):
    delta = make(kind, lm).memorize(lm, prompts)
    for name in delta.factors:
        change = full_change(delta, name)
        different = (change[0] - change[2]).norm() > 1e-3 * change[2].norm()
        assert different == (kind != "static")


def test_token_wise_is_the_sum_of_its_terms(lm64):
    """scale U V^T = scale sum_t g_t (V (V^T x_t + K z_t))^T, token by token, from a plain pass."""
    lm, ids = lm64, ids_of(1, 6)
    generator = make("token", lm)
    delta = generator.memorize(lm, ids.tolist())
    name = "blocks.1.ffn.key"
    inputs = []
    handle = lm.editable()[name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    hidden, _ = lm.step_through(ids, None, None)
    handle.remove()
    v = generator.V["blocks_1_ffn_key"]
    total = 0
    for t in range(5):
        token, label = lm.embed(ids)[0, t : t + 2]
        z = generator.mlp(torch.cat([hidden[0, t], token, label]))
        predicted, key = generator.heads["blocks_1_ffn_key"](z), generator.keys["blocks_1_ffn_key"](z)
        assert key.abs().max() > 1e-3
        total = total + predicted[:, None] * (v @ (v.t() @ inputs[0][0, t] + key))[None]
    assert_close(full_change(delta, name)[0], delta.scale * total, rtol=1e-10, atol=1e-12)


@every_family
@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 45, (44, 1), (1, 44), (7, 31, 2, 5), (32, 13)])
def test_token_wise_streams(lm, sizes):
    """A prompt read in pieces of any size gives the delta and the state of the whole."""
    generator, ids = make("token", lm), ids_of(2, 45)
    whole = generator.update(lm, ids)
    memory = None
    for piece in ids.split(list(sizes), 1):
        memory = generator.update(lm, piece, memory)
    assert_same_change(generator.delta_of(memory), generator.delta_of(whole))
    assert_close(lm.state_features(memory.state), lm.state_features(whole.state), rtol=1e-5, atol=1e-5)
    assert_same_change(generator.delta_of(whole), generator.memorize(lm, ids.tolist()))


@torch.no_grad()
def test_memory_does_not_grow(lm):
    generator = make("token", lm)

    def size(memory):
        last = memory.last
        tensors = [*memory.sums.values(), *memory.state.tensors.values(), last.features, *last.reads.values()]
        return sum(t.numel() for t in tensors)

    short, long = generator.update(lm, ids_of(1, 2)), generator.update(lm, ids_of(1, 300))
    # sums: 9 maps of 24 x 3; state: 5 x 3 x 16; last token: 2 x 16 and 9 maps of 3
    assert size(short) == size(long) == 9 * 24 * 3 + 5 * 3 * 16 + 2 * 16 + 9 * 3
    deltas = [generator.delta_of(m).nbytes() for m in (short, long)]
    assert deltas[0] == deltas[1] == 3 * 3 * 4 * (16 + 16 + 32 + 16 + 16 + 32)


@every_family
@every_kind
def test_gradients_reach_the_generator_and_not_the_model(lm, kind):
    """From zero, the last layer learns first; after one step, everything does. The model's weights never do."""
    lm.requires_grad_(False)
    before = digest(lm)
    generator = make(kind, lm, trained=False)
    optimiser = torch.optim.SGD(generator.parameters(), lr=1.0)
    prompt, ids = ids_of(4, 12), ids_of(4, 8, seed=1)
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[1, :5] = False
    losses = []
    for _ in range(3):
        delta, _ = generator(lm, prompt, valid)
        logits, _ = lm(ids[:, :-1], delta=delta)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    for name, p in generator.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name
    assert losses[2] < losses[0]
    assert all(p.grad is None for p in lm.parameters())
    assert digest(lm) == before


@every_kind
def test_a_trainable_model_gets_no_gradient_through_the_prompt(lm, kind):
    """Even if the model is not frozen, no gradient goes through the reading of the prompt."""
    delta, _ = make(kind, lm)(lm, ids_of(2, 9))
    sum(f.U.sum() + f.V.sum() for f in delta.factors.values()).backward()
    assert all(p.grad is None for p in lm.parameters())


@every_kind
def test_another_model_is_refused(lm, make_lm, prompts, kind):
    generator, other = make(kind, lm), make_lm(seed=1)
    with pytest.raises(UserError, match="trained for model"):
        generator.memorize(other, prompts)
    delta, _ = generator(other, ids_of(1, 4))
    with pytest.raises(UserError, match="made for model"):
        other(ids_of(1, 4), delta=delta)


def padded_continuation(lm, prompts):
    generator, valid = make("token", lm), torch.ones(1, 3, dtype=torch.bool)
    generator.update(lm, ids_of(1, 3), generator.update(lm, ids_of(1, 3)), valid)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda lm, prompts: TokenGenerator(lm, 0, 8, ENDINGS), r"rank 0 asked for, but .* has rank 1 to \d+"),
        (lambda lm, prompts: TokenGenerator(lm, 10_000, 8, ENDINGS), "rank 10000 asked for"),
        (
            lambda lm, prompts: FinalStateGenerator(lm, 1, 8, ("att.output", "att.gate")),
            r"no linear map \.\.\.att\.gate",
        ),
        (lambda lm, prompts: make("token", lm).memorize(lm, [""]), "prompt 0 is empty"),
        (padded_continuation, "equal length"),
        (lambda lm, prompts: TransformedGradient(lm, 2, 0, ENDINGS, 0.1), "blocks of rank 0"),
        (lambda lm, prompts: TransformedGradient(lm, 2, 4, ENDINGS, -0.1), r"step size of -0\.1"),
    ],
)
def test_mistakes_are_explained(lm, prompts, mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(lm, prompts)


@every_family
def test_final_state_normaliser(lm, prompts):
    """Fitted on prompts, it gives the trunk unit features; and the delta depends on it."""
    generator = make("final", lm)
    before = generator.memorize(lm, prompts)
    ids, valid = lm.encode_prompts(prompts)
    generator.fit_normaliser(lm, ids, valid)
    features = lm.state_features(lm.derive_state(prompts))
    assert_close(generator.mean, features.mean(0), rtol=1e-4, atol=1e-5)
    assert_close(generator.std, torch.where(features.std(0) > 1e-6, features.std(0), 1.0), rtol=1e-4, atol=1e-5)
    name = generator.names[0]
    assert (full_change(before, name) - full_change(generator.memorize(lm, prompts), name)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "xlstm"])
@pytest.mark.parametrize("kind", [TokenGenerator, FinalStateGenerator])
def test_training_on_other_models(name, kind):
    """Each makes one change a prompt, without effect at first; a few steps lower the loss of what follows it."""
    torch.manual_seed(0)
    lm = FAMILIES[name]().requires_grad_(False)
    generator = kind(lm, 2, 16, ("out_proj",))
    ids, valid = lm.encode_prompts(rows_of((9, 4, 6)))
    then = torch.tensor(rows_of((5,) * 3, 1))
    if kind is FinalStateGenerator:
        generator.fit_normaliser(lm, ids, valid)
    assert torch.equal(lm(then, delta=generator.memorize(lm, rows_of((9, 4, 6))))[0], lm(then)[0])
    optimiser, losses = torch.optim.Adam(generator.parameters(), 1e-2), []
    for _ in range(4):
        delta, state = generator(lm, ids, valid)
        logits, _ = lm(then, state, delta)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), then[:, 1:].flatten()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 1e-3
