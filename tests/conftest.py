"""Shared by all tests: one thread, small models whose every part has an effect, and a small world to train in."""

import contextlib
import shutil
import socket

import pytest
import torch

from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.config import profiles
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.evaluation import memory_tests
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks import dialogue, open_world
from prosg_lib.text import chitchat
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import load_or_train, work

torch.set_num_threads(1)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

FRESH = {
    "rwkv4": lambda vocab, width, layers: RWKV4(RWKV4Config(vocab, width, layers, 2 * width)),
    "rwkv7": lambda vocab, width, layers: RWKV7(RWKV7Config(vocab, width, layers, 2 * width, 8, 4, 3, 2, 5)),
}


@pytest.fixture(autouse=True)
def _nothing_said():
    """What is said once a process is said once a test."""
    load_or_train._say_once.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    """No network."""

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def family() -> str:
    """Which models the others make; a test of what every family promises is parametrised with their names."""
    return "rwkv4"


@pytest.fixture
def make_lm(family):
    """Builds a small random RWKV with the project's tokenizer. A fresh model has zero layers; here none is zero."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3, width: int = 16) -> RWKV:
        tokenizer = load_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lm = FRESH[family](tokenizer.vocab, width, layers)
            for name, p in lm.named_parameters():
                if p.ndim == 2:
                    torch.nn.init.normal_(p, std=1.0 if "emb" in name else 1.5 / p.shape[1] ** 0.5)
                elif "ln" in name:
                    torch.nn.init.normal_(p, mean=1.0 if "weight" in name else 0.0, std=0.2)
                elif not p.any():
                    torch.nn.init.normal_(p, std=0.3)
        lm.tokenizer = tokenizer
        return lm.to(dtype).eval()

    return make


@pytest.fixture
def lm(make_lm) -> RWKV:
    return make_lm()


@pytest.fixture
def lm64(make_lm) -> RWKV:
    return make_lm(dtype=torch.float64)


@pytest.fixture
def prompts() -> list[list[int]]:
    """Token ids of very different lengths, one of them longer than two chunks."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 2000, (n,), generator=g).tolist() for n in (5, 1, 70, 33)]


@pytest.fixture(scope="session")
def small_world():
    """`with small_world(profile, runs):` the profile is called `tiny`, what is trained goes to the folder `runs`, and
    prose is a few sentences, enough for bodies of no tokens; afterwards nothing remembers it."""

    def forget():
        dialogue.load_dialogues.cache_clear()
        dialogue._prose.cache_clear()
        open_world.load_open_world.cache_clear()
        open_world._prose.cache_clear()

    @contextlib.contextmanager
    def world(profile, runs):
        prose = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:40]))
        with pytest.MonkeyPatch.context() as patch:
            for room in (dialogue, open_world, work, memory_tests):
                patch.setattr(room, "load_prose", lambda: prose)
            patch.setattr(chitchat, "source", lambda: None)
            patch.setenv("PROSG_RUNS", str(runs))
            patch.setitem(profiles.PROFILES, "tiny", profile)
            forget()
            yield
        forget()

    return world


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a page in light or dark; at the end of the test nothing may have gone wrong in its console."""
    errors, pages = [], []

    def opened(address, scheme="light"):
        page = chromium.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(address)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert not errors


_UNREADABLE = """() => {
  const parts = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number), scale = colour.startsWith("color(") ? 255 : 1;
    return [...found.slice(0, 3).map((part) => part * scale), found[3] ?? 1];
  };
  const over = (top, under) => top.slice(0, 3).map((part, i) => part * top[3] + under[i] * (1 - top[3]));
  const light = (colour) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!node.data.trim() || !seen || element.closest("script, style, svg")) continue;
    let [r, g, b, alpha] = parts(style.color);
    for (let up = element; up; up = up.parentElement) alpha *= getComputedStyle(up).opacity;
    const under = ground(element), lights = [light(over([r, g, b, alpha], under)), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (lights[0] + 0.05) / (lights[1] + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.push(`${node.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture
def unreadable():
    """Of a page: its texts whose contrast with their ground is below AA (WCAG 2, 1.4.3), each with its ratio."""
    return lambda page: page.evaluate(_UNREADABLE)


@pytest.fixture
def writing(lm) -> tuple[TokenGenerator, dialogue.Dialogues]:
    """A generator that changes something, and a data set to write about."""
    torch.manual_seed(1)
    generator = TokenGenerator(lm, 2, 8, ("att.output", "ffn.key"))
    for head in generator.heads.values():
        torch.nn.init.normal_(head.weight)
    prose = ProseTokens.of(Prose("own", {"test": own_sentences("test")}), "test", lm.tokenizer)
    return generator, dialogue.Dialogues(lm.tokenizer, prose, "test", seed=3)
