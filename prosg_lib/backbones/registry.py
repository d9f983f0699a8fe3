"""Which adapter reads which class of `transformers`, by the model_type that a folder's config.json has."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from prosg_lib.errors import UserError

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel
    from prosg_lib.backbones.hub_recurrent import Recurrent

LOADERS: dict[str, Callable[[Path], LanguageModel]] = {}
"""model_type -> what makes a model of a folder."""


def register(*kinds: str) -> Callable[[type[Recurrent]], type[Recurrent]]:
    """Class decorator: from now on, `load_model` reads these model types with that adapter. For instance::

    import prosg_lib as prosg
    from prosg_lib.backbones.hf import Recurrent
    from prosg_lib.backbones.registry import register

    @register("olmo_hybrid")
    class OlmoHybrid(Recurrent):
        reads_on = pads = True  # what its class does right; without this line slower, and just as right

    lm = prosg.load_model("olmo-hybrid")  # a folder, or a hub id
    lm.check()  # against the class itself, one sequence and one token at a time
    """

    def remember(adapter: type[Recurrent]) -> type[Recurrent]:
        LOADERS.update(dict.fromkeys(kinds, adapter.from_folder))
        return adapter

    return remember


def loader(kind: str | None) -> Callable[[Path], LanguageModel]:
    """What makes a model of a folder of that type.

    Raises:
        UserError: nobody has registered the type.
    """
    import_module("prosg_lib.backbones.hub_families")  # registers those that the project has
    if kind not in LOADERS:
        raise UserError(
            f"no recurrent model of type {kind!r} is known; there are {', '.join(sorted(LOADERS))}. README shows how "
            "to bring a class of your own; prosg_lib.backbones.hub_transformer.load_transformer takes attention models"
        )
    return LOADERS[kind]
