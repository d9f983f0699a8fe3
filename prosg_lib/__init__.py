"""Write a prompt into the weights of a recurrent language model, and measure that it is kept.

Data moves one way: prompt -> state -> delta -> generation -> recall -> claim; the modules stand in that order.
"""

from importlib import import_module

_PUBLIC = {
    "load_model": "models",
    "save_model": "models",
    "load_generator": "stages",
    "load_or_train": "stages",
    "RecurrentState": "state",
    "LowRankDelta": "lowrank",
    "UserError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Loaded when asked for: `import prosg_lib.claims` should not wait for torch.
    if name in _PUBLIC:
        return getattr(import_module(f"prosg_lib.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'prosg_lib' has no attribute {name!r}")
