"""Write a prompt into the weights of a recurrent language model, and measure that it is kept.

Data moves one way, and the folders stand in its order: text -> state -> delta -> generation -> recall -> claim.
"""

from importlib import import_module

_PUBLIC = {
    "load_model": "backbones.loading",
    "save_model": "backbones.loading",
    "load_generator": "training.checkpoints",
    "load_or_train": "training.load_or_train",
    "RecurrentState": "backbones.state",
    "LowRankDelta": "deltas.low_rank",
    "UserError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Imported on first use: whoever only reads claims or settings does not wait for torch.
    if name in _PUBLIC:
        return getattr(import_module(f"prosg_lib.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'prosg_lib' has no attribute {name!r}")
