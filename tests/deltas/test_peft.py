"""A delta merged into weights, and as a PEFT adapter: the same logits there and back."""

import copy
import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from checks import digest, ids_of, random_delta
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, Mamba2Config, Mamba2ForCausalLM, RwkvForCausalLM

from prosg_lib import files
from prosg_lib.backbones.hub_families import Mamba2
from prosg_lib.backbones.hub_transformer import CausalTransformer, TransformerConfig, new_llama
from prosg_lib.backbones.loading import save_model
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings(
        "ignore:(?s).*lora_bias|.*lora_B.bias:UserWarning"
    ),  # of an adapter that is refused here
]

VOCAB = 2048  # the project's tokenizer's
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ("rwkv4", "llama", "gpt2")
IDS = ids_of(2, 9)


@pytest.fixture
def pair(make_lm, tmp_path):
    """A kind of model -> ours, and the model of `transformers` that computes the same, loaded from a folder."""

    def make(kind):
        folder = tmp_path / kind
        if kind == "rwkv4":
            lm = make_lm()
            save_model(lm, folder, "transformers")
            return lm, RwkvForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(0)
        if kind == "llama":
            lm = new_llama(TransformerConfig("llama", VOCAB, width=16, layers=2, ffn=32, heads=2))
        else:
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            config = GPT2Config(**ends, vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
            lm = CausalTransformer(AutoModelForCausalLM.from_config(config))
        for name, weight in lm.named_parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim == 1 and name.endswith("weight")), std=0.3)
        lm.eval().requires_grad_(False).model.save_pretrained(folder)
        return lm, AutoModelForCausalLM.from_pretrained(folder).eval()

    return make


def delta_for(lm, ranks=(3,), batch=1):
    return random_delta(lm, batch, ranks).scaled(0.3)


def ours(lm, delta=None):
    """Logits with one change for all sequences."""
    return lm(IDS, delta=None if delta is None else delta.select([0] * len(IDS)))[0]


# --- in the weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_has_the_change_in_its_weights(pair, kind):
    """A new model with another fingerprint and the changed model's logits; the old one is unchanged, bit for bit."""
    lm, _ = pair(kind)
    before, delta = digest(lm), delta_for(lm, (3, 1))
    merged = delta.merged(lm)
    assert_close(merged(IDS)[0], ours(lm, delta), rtol=1e-4, atol=1e-4)
    assert (ours(lm, delta) - ours(lm)).abs().max() > 0.1
    assert merged.fingerprint() != lm.fingerprint()
    assert merged.tokenizer is lm.tokenizer
    for p in merged.parameters():
        p.zero_()
    assert digest(lm) == before
    assert delta.fingerprint == lm.fingerprint()


@torch.no_grad()
def test_one_change_of_this_model_is_merged_or_saved(lm, make_lm, tmp_path):
    """Also into half precision, rounded once."""
    delta, folder = delta_for(lm, batch=3), tmp_path / "adapter"
    for use in (lambda delta, lm: delta.merged(lm), lambda delta, lm: delta.save_peft(folder, lm)):
        with pytest.raises(UserError, match=r"has 3 changes, and weights can take one; select\(\[i\]\)"):
            use(delta, lm)
        with pytest.raises(UserError, match="made for model"):
            use(delta.select([0]), make_lm(seed=1))
    assert not folder.exists()
    half, name = make_lm(dtype=torch.bfloat16), "blocks.1.ffn.key"
    one = delta_for(half)
    (u,), (v,) = one.factors[name]
    expected = half.editable()[name].weight.float() + one.scale * u @ v.t()
    assert torch.equal(one.merged(half).editable()[name].weight, expected.bfloat16())


# --- adapters that we write ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
@pytest.mark.filterwarnings("error::UserWarning")  # as PEFT's are
def test_peft_loads_what_we_write(pair, tmp_path, kind, ranks):
    """PEFT's logits with the adapter on transformers' model are ours with the delta, and it warns of nothing."""
    lm, theirs = pair(kind)
    delta = delta_for(lm, ranks)
    delta.save_peft(tmp_path / "adapter", lm, base_model=str(tmp_path / kind))
    plain = theirs(IDS).logits
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = model(input_ids=IDS).logits
    assert_close(found, ours(lm, delta), **CLOSE)
    assert (found - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert_close(model(input_ids=IDS).logits, ours(lm), **CLOSE)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / kind)
    again = LowRankDelta.load_peft(tmp_path / "adapter", lm)
    assert_close(ours(lm, again), ours(lm, delta), **CLOSE)


@torch.no_grad()
def test_a_folder_is_enough_for_peft(pair, tmp_path):
    """`AutoPeftModelForCausalLM` takes the model from where the adapter says that it is."""
    lm, _ = pair("llama")
    delta = delta_for(lm)
    delta.save_peft(tmp_path / "adapter", lm, base_model=str(tmp_path / "llama"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(model(input_ids=IDS).logits, ours(lm, delta), **CLOSE)
    for path in (tmp_path / "adapter", tmp_path / "adapter" / WEIGHTS):
        with pytest.raises(UserError, match=r"adapter is a PEFT adapter; read it with LowRankDelta\.load_peft"):
            LowRankDelta.load(path)


# --- adapters that PEFT writes ------------------------------------------------------------------------------------


def written_by_peft(model, folder, **config):
    """PEFT's own folder of an adapter whose every part has an effect; the model with it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("rwkv4", {"r": 4, "lora_alpha": 2, "target_modules": ["attention.output", "feed_forward.value"]}),
        ("rwkv4", {"r": 4, "lora_alpha": 2, "target_modules": ["key"], "use_rslora": True, "init_lora_weights": False}),
        ("llama", {"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "lora_dropout": 0.1}),
        (
            "llama",
            {
                "r": 2,
                "lora_alpha": 5,
                "target_modules": r".*\.(q_proj|down_proj)",
                "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "down_proj": 9},
            },
        ),
        ("gpt2", {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_we_load_what_peft_writes(pair, tmp_path, kind, config):
    """Ranks and scales of every map as PEFT has them, by its own logits; in float64, because float32 rounds either by
    nearly the tolerance."""
    lm, theirs = pair(kind)
    plain = theirs(IDS).logits
    model = written_by_peft(theirs, tmp_path / "adapter", **config).double()
    found = model(input_ids=IDS).logits
    delta = LowRankDelta.load_peft(tmp_path / "adapter", lm)
    assert_close(ours(lm.double(), delta), found, **CLOSE)
    assert (found - plain).abs().max() > 0.1
    assert delta.batch == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["ln_out"]}, r"modules_to_save = \['ln_out'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_modules": ["head"]}, "changes head, which this model does not let a delta change"),
        (
            {"target_modules": ["key", "embeddings"]},
            r"unexpected or missing: base_model\.model\.rwkv\.embeddings\.lora_embedding_A",
        ),
    ],
)
def test_what_is_more_than_a_low_rank_change_is_refused(pair, tmp_path, config, said):
    """Folders written by PEFT; one sentence names what is not low-rank."""
    lm, theirs = pair("rwkv4")
    written_by_peft(theirs, tmp_path / "adapter", **{"target_modules": ["key"], **config})
    with pytest.raises(UserError, match=said):
        LowRankDelta.load_peft(tmp_path / "adapter", lm)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_with(**more):
    return lambda folder: files.write_json(folder / CONFIG, json.loads((folder / CONFIG).read_text()) | more)


def factors_with(edit):
    """Both factors of one map made others, or None for none."""

    def damage(folder):
        own, names = files.load_foreign_tensors(folder / WEIGHTS), [f"{PREFIX}.lora_{part}.weight" for part in "AB"]
        own |= dict(zip(names, edit(*(own[name] for name in names)), strict=True))
        files.save_tensors(folder / WEIGHTS, {name: t for name, t in own.items() if t is not None}, None)

    return damage


PREFIX = "base_model.model.rwkv.blocks.1.attention.key"
ENDLESS = r"(([a-z.0-9]+)+)+!"


@pytest.mark.parametrize(
    ("damage", "sizes", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), {}, r"adapter_config\.json does not exist"),
        (lambda folder: (folder / WEIGHTS).unlink(), {}, r"adapter_model\.safetensors does not exist"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:2000]), {}, "cut short"),
        (config_with(peft_type="PROMPT_TUNING"), {}, "does not describe a LoRA adapter"),
        (config_with(a_later_invention=2), {}, "a_later_invention = 2"),
        (config_with(**{"\x1b[2J": 5000 * "x"}), {}, r"has .\[2J = 'xxx.* \.\.\. .*train it without that$"),
        (config_with(lora_alpha=None), {}, "lora_alpha should be a finite number"),
        (config_with(lora_alpha=1e300), {}, "NaN or infinite"),
        (
            config_with(r=4),
            {},
            r"A \(3, 16\) float32 and B \(16, 3\) float32; .* of rank 4 as adapter_config",
        ),
        (config_with(r=0), {}, "of rank 0"),
        (config_with(rank_pattern={"attention.key": 2}), {}, r"blocks\.0\.attention\.key .* of rank 2"),
        (config_with(rank_pattern={"key": None}), {}, r"rank_pattern\.key should be a whole number"),
        (config_with(alpha_pattern={"key": "2"}), {}, r"alpha_pattern\.key should be a finite number"),
        (config_with(alpha_pattern={"(": 2}), {}, r"not regular expressions.* '\('; give the modules' names"),
        (config_with(alpha_pattern={ENDLESS: 2}), {}, "more than 5 s to match"),
        (factors_with(lambda a, b: (a, None)), {}, r"missing: .*\.blocks\.1\.attention\.key\.lora_B"),
        (factors_with(lambda a, b: (a * math.nan, b)), {}, r"blocks\.1\.att\.key have numbers that are NaN"),
        (factors_with(lambda a, b: (a.long(), b)), {}, "int64"),
        (factors_with(lambda a, b: (a, b.to(torch.complex64))), {}, "complex64"),
        (factors_with(lambda a, b: (a[:2], b)), {}, r"A \(2, 16\) float32 and B \(16, 3\)"),
        (factors_with(lambda a, b: (a[0], b)), {}, r"should be \(rank, inputs\) and \(outputs, rank\)"),
        (factors_with(lambda a, b: (a[None], b)), {}, "should be"),
        (lambda folder: None, {"width": 8}, r"another model: there, .* has 16 outputs and 16 inputs, here 8 and 8"),
        (lambda folder: None, {"layers": 2}, r"changes rwkv\.blocks\.2\.attention\.key, .*does not let a delta change"),
    ],
)
def test_other_models_and_damaged_folders_are_refused(lm, make_lm, tmp_path, damage, sizes, message):
    delta_for(lm).save_peft(tmp_path / "adapter", lm)
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as refused:
        LowRankDelta.load_peft(tmp_path / "adapter", make_lm(**sizes))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 2000


@torch.no_grad()
def test_expressions_that_say_only_what_was_trained_are_never_run(lm, tmp_path):
    delta = delta_for(lm)
    delta.save_peft(tmp_path, lm)
    config_with(target_modules=ENDLESS, exclude_modules=ENDLESS, layers_pattern=ENDLESS)(tmp_path)
    assert_close(ours(lm, LowRankDelta.load_peft(tmp_path, lm)), ours(lm, delta), **CLOSE)


def test_maps_that_peft_refuses_are_refused_at_once(tmp_path):
    """PEFT would refuse them only when someone loads the adapter; the message offers `merged` instead."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1}
    config = Mamba2Config(vocab_size=50, **sizes)
    lm = Mamba2(Mamba2ForCausalLM(config)).eval()
    delta = delta_for(lm)
    with pytest.raises(UserError, match=r"no adapter on backbone.layers.0.mixer.out_proj of a Mamba2.*merged\(lm\)"):
        delta.save_peft(tmp_path / "all", lm)
    assert not (tmp_path / "all").exists()
    rest = {name: f for name, f in delta.factors.items() if "in_proj" in name}
    replace(delta, factors=rest).save_peft(tmp_path / "rest", lm)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path / "rest")
    with torch.no_grad():
        assert_close(theirs(IDS % 50).logits, lm(IDS % 50, None, replace(delta, factors=rest))[0], **CLOSE)
