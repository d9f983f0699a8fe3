"""A tiny random model of every family that the project reads, for the tests of what all backbones promise.

Add a family of your own to `FAMILIES`, and all of that is tested for it.
"""

import copy

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from prosg_lib.backbones.hub_families import (
    LFM2,
    XLSTM,
    FalconH1,
    GraniteHybrid,
    Mamba,
    Mamba2,
    OlmoHybrid,
    QwenHybrid,
    RecurrentGemma,
)
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.hub_window import WindowTransformer
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.text.chat_template import ChatTemplate
from prosg_lib.text.tokenizer import load_tokenizer

VOCAB = 64
CLOSE = {"rtol": 1e-3, "atol": 5e-4}  # logits are of size 1 to 6
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def rwkv(kind, config):
    """A tiny random model of this project, every matrix large enough to matter."""
    torch.manual_seed(0)
    lm = kind(config)
    for p in lm.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=1.5 / p.shape[1] ** 0.5)
    return lm


def library(kind, **sizes):
    """A tiny random model of `transformers`, every part large enough to matter."""
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**ends | {"hidden_size": 32, "num_hidden_layers": 2} | sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim > 1 and "conv" not in name and "A_log" not in name:
            torch.nn.init.normal_(p, std=1.0 if "emb" in name else 1.5 / p.shape[-1] ** 0.5)
        elif name.endswith("bias") and "dt" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


MAMBA = {"state_size": 4, "time_step_rank": 4}
HEADS = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA_RULE = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OLMO = {n: v for n, v in DELTA_RULE.items() if n != "head_dim"} | {"linear_num_value_heads": 2}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

FAMILIES = {
    "rwkv4": lambda: rwkv(RWKV4, RWKV4Config(VOCAB, 32, 2, 64)),
    "rwkv7": lambda: rwkv(RWKV7, RWKV7Config(VOCAB, 32, 2, 64, 8, 4, 4, 4, 4)),
    "mamba": lambda: Mamba(library("Mamba", **MAMBA)),
    "falcon_mamba": lambda: Mamba(library("FalconMamba", **MAMBA)),
    "mamba2": lambda: Mamba2(library("Mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=8)),
    "recurrent_gemma": lambda: RecurrentGemma(
        library("RecurrentGemma", **HEADS, block_types=["recurrent", "attention"], attention_window_size=8)
    ),
    "xlstm": lambda: XLSTM(library("xLSTM", hidden_size=128, num_heads=2, chunk_size=8)),
    "qwen3_next": lambda: QwenHybrid(
        library(
            "Qwen3Next", **HEADS, **DELTA_RULE, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
    "qwen3_5": lambda: QwenHybrid(library("Qwen3_5Text", **HEADS, **DELTA_RULE)),
    "jamba": lambda: Mamba(
        library(
            "Jamba",
            **HEADS,
            **EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
        )
    ),
    "bamba": lambda: Mamba2(library("Bamba", **HEADS, **SSD, attn_layer_indices=[1])),
    "granite": lambda: GraniteHybrid(
        library(
            "GraniteMoeHybrid",
            **HEADS,
            **SSD,
            layer_types=["mamba", "attention"],
            num_local_experts=0,
            shared_intermediate_size=32,
            embedding_multiplier=3.0,
            logits_scaling=0.5,
        )
    ),
    "falcon_h1": lambda: FalconH1(
        library(
            "FalconH1", **HEADS, **SSD, head_dim=16, mamba_d_ssm=64, embedding_multiplier=3.0, lm_head_multiplier=0.5
        )
    ),
    "olmo_hybrid": lambda: OlmoHybrid(library("OlmoHybrid", **HEADS, **OLMO)),
    "lfm2": lambda: LFM2(library("Lfm2", **HEADS, **CONVOLUTION)),
    "lfm2_bias": lambda: LFM2(library("Lfm2", **HEADS, **CONVOLUTION, conv_bias=True)),
    "window": lambda: WindowTransformer(library("Llama", **HEADS), window=64),  # which all texts of the tests fit
    "short_window": lambda: WindowTransformer(library("Qwen3", **HEADS, head_dim=16), window=8, sinks=2),
    "llama": lambda: CausalTransformer(library("Llama", **HEADS)),
    "qwen3": lambda: CausalTransformer(library("Qwen3", **HEADS, head_dim=16)),
    "gpt2": lambda: CausalTransformer(library("GPT2", num_attention_heads=2, n_positions=64)),
}
if Version(transformers.__version__) < Version("5.23"):  # which keeps the states of its class elsewhere
    del FAMILIES["recurrent_gemma"]
if Version(transformers.__version__) < Version("5.23"):  # which had no such class, or one that is wrong about padding
    for name in ("olmo_hybrid", "lfm2", "lfm2_bias"):
        del FAMILIES[name]
RECURRENT = [name for name in FAMILIES if name not in ("llama", "qwen3", "gpt2")]
OWN = ("rwkv4", "rwkv7", "short_window")  # what is right is said by no class of `transformers`
OF_TRANSFORMERS = [name for name in RECURRENT if not name.startswith("rwkv") and not name.endswith("window")]


def rows_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=g).tolist() for n in lengths]


TEMPLATE = ChatTemplate(
    "{% for m in messages %}{% if loop.first %}Be kind.\n{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    {},
)


def causal():
    """A tiny transformer that sees everything, with the project's tokenizer."""
    lm = CausalTransformer(library("Llama", **HEADS, vocab_size=2048)).eval().requires_grad_(False)
    lm.tokenizer = load_tokenizer()
    return lm


def talking(window=200):
    """A tiny transformer with a window, the project's tokenizer and a chat template of its own."""
    lm = WindowTransformer(library("Llama", **HEADS, vocab_size=2048), window).eval().requires_grad_(False)
    lm.tokenizer = copy.copy(load_tokenizer())
    lm.tokenizer.template = TEMPLATE
    return lm
