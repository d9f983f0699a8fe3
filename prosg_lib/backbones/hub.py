"""The project's interface to a model of `transformers`: what recurrent classes and plain transformers share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prosg_lib import files
from prosg_lib.backbones.base import LanguageModel, as_tuple
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.errors import UserError, reason

_NOT_SIZES = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


class HubModel(LanguageModel):
    """A causal language model of `transformers`. Attention is eager, since fused attention has no second derivative.

    Attributes:
        model: the wrapped model.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        model.set_attn_implementation("eager")
        self.model = model
        self.ends = as_tuple(model.generation_config.eos_token_id)
        c = model.config
        self.config = TransformerConfig(
            c.model_type,
            c.vocab_size,
            c.hidden_size,
            c.num_hidden_layers,
            getattr(c, "intermediate_size", None) or 0,
            getattr(c, "num_attention_heads", None) or 0,
            json.dumps({k: v for k, v in c.to_diff_dict().items() if k not in _NOT_SIZES}, sort_keys=True, default=str),
        )

    def _apply(self, fn, recurse=True):
        """Called by `to`, `half` and `cuda`. Buffers that are not weights are moved but keep their precision: rotary
        positions with rounded frequencies would be wrong after some hundred tokens."""
        weights = self.state_dict().keys()
        kept = [(n, b) for n, b in self.named_buffers(remove_duplicate=False) if n not in weights]
        super()._apply(fn, recurse)
        for name, before in kept:
            module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(module, leaf, before.to(getattr(module, leaf).device))
        return self

    def read_out(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))  # Mamba's are float32 in a model of half precision

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def editable(self) -> dict[str, nn.Linear]:
        """Every linear map of the blocks, by its name in the wrapped model."""
        heads = (self.model.get_output_embeddings(),)
        return {
            name: module
            for name, module in self.model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module not in heads
        }

    @torch.no_grad()
    def check_read_out(self) -> None:
        """Raise a UserError if the class makes its logits in another way than `read_out`."""
        training = self.model.training
        self.model.eval()  # no dropout, and no kernels that only training uses
        ours, theirs = self.read_out(self.step_through(self._some_ids())[0]), self.model(self._some_ids()).logits
        self.model.train(training)
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            raise UserError(
                f"{type(self.model).__name__} does more to its logits than multiply by the output embedding; "
                f"{type(self).__name__} needs a read_out of its own"
            )

    def _some_ids(self) -> Tensor:
        return torch.arange(6, device=next(self.parameters()).device).view(2, 3) % self.config.vocab


def pretrained(folder: Path) -> PreTrainedModel:
    """The model in a folder that `save_pretrained` wrote, in float32. Code in the folder is never run.

    Raises:
        UserError: the class is unknown, or the files are damaged, incomplete or another model's.
    """
    for shard in folder.glob("*.safetensors"):
        files.verify(shard)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # its sizes, before they cost memory
            sizes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _check_weights(folder, dict(sizes.named_parameters()))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # the hub's, the HTTP client's and the operating system's errors have no common class
        raise UserError(
            f"{folder} could not be loaded ({reason(error)}); give a folder that `save_pretrained` wrote"
        ) from error
    # The library initialises missing weights at random, with no more than a warning.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the weights that its config.json describes ({', '.join(missing[:3])}); "
            "copy it again, or give the folder of a whole model"
        )
    return model.eval()


def _check_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    """Raise a UserError if the files cannot hold so many weights, or hold them as anything but floating-point numbers,
    which the library would convert without a word."""
    paths = [path for ending in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{ending}"))]
    count, size = sum(t.numel() for t in expected.values()), sum(path.stat().st_size for path in paths)
    if count > 2 * size:  # of at least 4 bits each
        raise UserError(
            f"{folder} could not be loaded: config.json describes {count:,} weights, and the files there have "
            f"{size:,} bytes; copy both from the same model"
        )
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if other := [f"{n} is {kind}" for n, kind in kinds.items() if n in expected and "F" not in kind]:
                raise UserError(f"{path}: {other[0]}; quantised weights cannot be read, take the float16 files")
