"""Makes `data/open_values.json`: the values of the open world's facts, thousands a split, none of them in two splits.

python data/open_values.py      # writes the same bytes anywhere
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from itertools import product, zip_longest

from prosg_lib import files
from prosg_lib.paths import data_dir
from prosg_lib.text.tokenizer import load_tokenizer

FILE = "open_values.json"

MOST = {"train": 1500, "validation": 300, "test": 500}
"""Values of one type in a split, at most."""

LONGEST = 5  # tokens of the project's tokenizer, in which a digit is one

_ONSETS = "b br c cl d dr f fl g gr h j k l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea io".split()
_CODAS = "l n r s t d m rn ld nt x ck".split()
_PERSON_ENDS = "a an ard el en er ia in is o on or us y".split()
_PLACE_ENDS = "bourne bury by cliff dale field ford gate ham haven ley mere mouth port stead stow ton wick".split()
_WORD_ENDS = "a ak el ex im ix o ock om on oo ul um y".split()
_ADJECTIVES = (
    "amber ancient big black blue bold brass bright broken brown cheap clean cold crooked dark dry dusty empty fat flat "
    "fresh golden green grey heavy hollow hot huge iron large light little long loud lucky narrow new odd old open pale "
    "pink plain purple quick quiet red rough round rusty salty sharp short shy silent silver slow small smooth soft sour "
    "square steel sticky striped strong sweet tall tame thick thin tiny velvet warm wet white wide wild wooden yellow"
).split()
_NOUNS = (
    "apple arrow badger bagpipe bamboo barrel basket bean beaver beetle bell bench berry blossom boot bottle bread brick "
    "bridge broom brush bucket button cabbage cactus camel candle canoe carrot castle cherry chisel clover coat cobra "
    "cookie copper coral cotton cricket crow cushion daisy desk dolphin donkey dragon drum duck eagle engine falcon fan "
    "feather fern ferret fiddle fig flute fox frog garlic ginger goat goose grape guitar hammer hamster harp hedgehog "
    "heron honey horn horse ivory jasmine jelly kettle kite ladder lantern lemon lily lion lizard lobster magnet mango "
    "maple marble melon mirror mole mushroom needle nettle nut oak olive onion orchid otter owl oyster paddle pancake "
    "panda parrot peach pear pearl pebble pepper piano pickle pigeon pillow plum pony poppy potato pumpkin puppet rabbit "
    "radish raven ribbon rice robin rocket rope rose saddle salmon sandal seal shell shovel skate sledge snail spider "
    "spoon squirrel stove swan syrup tiger toad tomato tractor trumpet tulip turnip turtle violin walnut wasp whale wheat "
    "whistle willow wolf zebra"
).split()
_MONTHS = "January February March April May June July August September October November December".split()


def _names(ends: Iterable[str]) -> Iterator[str]:
    """Made-up words of two or three syllables."""
    short = (a + b + e for a, b, e in product(_ONSETS, _CODAS_BETWEEN, ends))
    long = (a + v + c + e for a, v, c, e in product(_ONSETS, _VOWELS, _CODAS, ends))
    yield from short
    yield from long


_CODAS_BETWEEN = [v + c for v in "aeiou" for c in "b d g k l m n p r t v".split()]


def _candidates() -> dict[str, list[str]]:
    """Type of value -> all that there could be."""
    return {
        "person": [n.capitalize() for n in _names(_PERSON_ENDS)],
        "place": [n.capitalize() for n in _names(_PLACE_ENDS)],
        "thing": [*_NOUNS, *(f"{a} {n}" for a, n in product(_ADJECTIVES, _NOUNS))],
        "word": list(_names(_WORD_ENDS)),
        "number": [str(n) for n in range(10, 10_000)],
        "code": [f"{c}{n}" for c in "ABCDEFGHJKLMNPQRSTUVWXYZ" for n in range(1, 100)],
        "date": [f"{d} {m}" for m in _MONTHS for d in range(1, 29)],
        "time": [f"{h}:{m:02d}" for h in range(24) for m in range(60)],
    }


def split_of(value: str) -> str:
    """The only split that a value is in: 7 in 10 are for training, 1 for validation, 2 for the test."""
    number = int(hashlib.sha256(value.lower().encode()).hexdigest(), 16) % 10
    return "train" if number < 7 else "validation" if number < 8 else "test"


def values() -> dict[str, dict[str, list[str]]]:
    """Type -> split -> values, of up to `LONGEST` tokens each."""
    encode, made = load_tokenizer().encode, {}
    for kind, candidates in _candidates().items():
        unique = sorted(set(candidates))
        random.Random(f"open values, {kind}").shuffle(unique)
        longest = LONGEST if kind == "time" else LONGEST - 1
        made[kind] = {}
        for split, most in MOST.items():
            by_length = [[] for _ in range(longest)]  # so that each length has its share, where there are enough
            for value in unique:
                if (tokens := len(encode(" " + value))) <= longest and split_of(value) == split:
                    by_length[tokens - 1].append(value)
            turns = [v for values in zip_longest(*by_length) for v in values if v is not None]
            made[kind][split] = sorted(turns[:most])
    return made


if __name__ == "__main__":
    files.write_json(data_dir() / FILE, values())
