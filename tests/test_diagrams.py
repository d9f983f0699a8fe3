"""Drawings: what they name is what the model has."""

from matplotlib.figure import Figure

from prosg_lib import diagrams
from prosg_lib.backbones.rwkv4 import RWKV4, STATE_NAMES
from prosg_lib.config import get_profile
from prosg_lib.config.sizes import RWKV4Config


def test_a_block_has_these_maps_and_this_state():
    """Every map and state vector of a block is in the drawing and its alt text; the edited maps are the filled ones."""
    ax = Figure().subplots()
    diagrams.rwkv4_block(ax)
    drawn = {text.get_text(): text.get_weight() for text in ax.texts}
    block = RWKV4(RWKV4Config(vocab=8, width=4, layers=1, ffn=8))
    maps = {name.removeprefix("blocks.0.") for name in block.editable()}
    assert maps == {name for name in drawn if name.startswith(("att.", "ffn."))}
    assert {name for name, weight in drawn.items() if weight == "bold"} - {"time mix", "channel mix"} == set(
        get_profile("cpu").token.maps
    )
    words = " ".join(drawn).replace(",", "").split()
    assert set(STATE_NAMES) <= set(words)
    assert all(name in diagrams.RWKV4_BLOCK_ALT for name in (*maps, *STATE_NAMES))
