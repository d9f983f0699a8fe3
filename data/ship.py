"""Copies trained checkpoints to data/checkpoints/, their numbers rounded to 16 bits, with their logs.

python data/ship.py rwkv7-open rwkv7-open-token     # a language model, and what was trained for it
python data/ship.py rwkv7-open-static               # later: for the language model as it was trained
python data/ship.py --eight smollm2-token           # matrices in 8 bits

A rounded language model is another one, and what was trained for it is written down as the rounded one's. So measure
after shipping. The provenance says how numbers are stored. Then run data/cards.py and `python data/build.py manifest`.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from prosg_lib import files
from prosg_lib.backbones.loading import load_model
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.training.checkpoints import in_eight_bits, kept, read, shipped
from prosg_lib.training.recipes import recipe, recipes

PROFILE = get_profile("cpu")

FINEST = 2e-3
"""Largest error of a tensor that rounding may make, relative to its norm."""


def rounded(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in 16 bits.

    Raises:
        UserError: that would change one of them by more than `FINEST`.
    """
    tensors, _ = read(path)
    found = {name: tensor.half() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        error = (found[name].float() - tensor).norm() / tensor.norm().clamp(min=1e-12)
        if not error <= FINEST:
            raise UserError(f"{path}: 16 bits would change {name} by {error:.1e} of its norm; copy the file as it is")
    return found


def ship(name: str, trained: Path, eight: bool = False) -> None:
    """One checkpoint; `trained`: where it is; eight: matrices in 8 bits."""
    tensors, meta = rounded(trained), files.load_meta(trained)
    meta["provenance"]["stored"] = "int8" if eight else "float16"
    tensors = in_eight_bits(tensors) if eight else tensors
    if (of := recipe(name, PROFILE).lm) in recipes(PROFILE):  # a model that others trained stays as it is
        if load_model(kept(of, PROFILE)).fingerprint() != meta["record"]["lm"]:
            raise UserError(f"{trained} was not trained for {kept(of, PROFILE)}")
        meta["record"]["lm"] = load_model(shipped(of)).fingerprint()
    files.save_tensors(shipped(name), tensors, meta)
    shutil.copyfile(trained.with_suffix(".jsonl"), shipped(name).with_suffix(".jsonl"))
    print(f"{shipped(name)}: {shipped(name).stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copies trained checkpoints to data/checkpoints/, rounded.")
    parser.add_argument("names", nargs="+", help="of recipes")
    parser.add_argument("--eight", action="store_true", help="matrices in 8 bits")
    options = parser.parse_args()
    try:
        for name in options.names:
            ship(name, kept(name, PROFILE), options.eight)
    except UserError as error:
        sys.exit(str(error))
