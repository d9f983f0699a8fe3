"""The sliders in a real browser: the form without a kernel from a file, and the live one in JupyterLab.

Skipped where there is no Chromium: `apt-get install chromium`, or Google's Chrome.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest

import prosg_lib as prosg
from prosg_lib import explorer, memories, widgets

CELLS = [
    "import prosg_lib as prosg\n"
    "from prosg_lib import explorer\n"
    "from prosg_lib.tasks.dialogue import Shape, load_dialogues\n"
    'lm = prosg.load_model("rwkv4-dialogue")\n'
    'generator = prosg.load_generator("rwkv4-dialogue-token", lm)\n'
    'data = load_dialogues("test", 0)\n'
    "item = data.item(0, Shape(3, 64, 3))\n"
    "box = explorer.own_prompt(lm, generator, data, item, (0, 64), 0, (0.0, 1.0, 2.0))\n"
    "box",
    "from prosg_lib import widgets\nwidgets.rank_slider([8, 4, 2, 1], (128, 512))",
    "from prosg_lib import memories\n"
    'common = generator.memorize(lm, ["User: My favourite colour is red.\\n"])\n'
    'memories.own_memories(lm, generator, ["My pet is a parrot.", "My home town is Oslo."], common)',
]


def contrast(page):
    """Of the summary's text against its ground (WCAG 2, 1.4.3)."""
    colours = page.evaluate(
        """() => ["color", "backgroundColor"].map((what) => getComputedStyle(document.querySelector(".prosg"))[what])"""
    )
    light = []
    for colour in colours:
        parts = np.array(re.findall("[0-9.]+", colour)[:3], dtype=float) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sliders_from_a_file(open_page, tmp_path, scheme):
    """Moved by keyboard, twice; words, picture and what a screen reader is told follow; readable in light and dark."""
    sliders = widgets.decay_slider(
        lambda w: np.tril(np.exp(-w * np.arange(40))[:, None] + np.zeros(40)), (0.1, 0.2, 0.5)
    )
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><title>decay</title>{sliders.html()}{sliders.html()}", encoding="utf-8")
    page = open_page(file.as_uri(), scheme)
    slider = page.get_by_label("decay w").first
    status, image = page.locator("[role=status]"), page.locator("image").first
    seen = [(status.first.inner_text(), image.get_attribute("href"))]
    for key in ("ArrowRight", "End"):
        slider.press(key)
        seen.append((status.first.inner_text(), image.get_attribute("href")))
    assert [words for words, _ in seen] == [sliders.page(decay).summary for decay in (0.2, 0.5, 0.5)]
    assert seen[0][1] != seen[1][1]
    assert slider.get_attribute("aria-valuetext") == "0.5"
    assert status.last.inner_text() == seen[0][0]  # the second one was not moved
    assert contrast(page) > 7
    ground = page.evaluate("() => getComputedStyle(document.querySelector('.prosg')).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 27, 27)"}[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_boxes_from_a_file(open_page, tmp_path, scheme):
    """Memories are ticked by mouse and by keyboard, twice; words and table follow, and the scale does."""
    lm = prosg.load_model("rwkv4-dialogue")
    generator = prosg.load_generator("rwkv4-dialogue-token", lm)
    texts = ["My pet is a parrot.", "My home town is Oslo."]
    common = generator.memorize(lm, ["User: My favourite colour is red.\n"])
    bank = memories.Bank.of(lm, generator, texts, [explorer.probes_in(text) for text in texts], common)
    boxes = bank.sliders([True, False])
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><title>memories</title>{boxes.html()}{boxes.html()}", encoding="utf-8")
    page = open_page(file.as_uri(), scheme)
    status, table = page.locator("[role=status]"), page.locator("table").first
    seen = [status.first.inner_text()]
    page.get_by_label("memory B").first.check()
    seen.append(status.first.inner_text())
    assert "B (in)" in table.inner_text()
    page.get_by_label("memory A").first.press("Space")
    seen.append(status.first.inner_text())
    page.get_by_label("scale of the sum").first.press("Home")
    seen.append(status.first.inner_text())
    settings = [(True, False, 1.0), (True, True, 1.0), (False, True, 1.0), (False, True, 0.0)]
    assert seen == [bank.page(a, b, True, scale).summary for a, b, scale in settings]
    assert "The model would name 1 of the 1 values that are in" in seen[0]
    assert status.last.inner_text() == seen[0]
    assert contrast(page) > 7
    if folder := os.environ.get("PROSG_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/memories-{scheme}.png", full_page=True)


@pytest.fixture
def lab(chromium, tmp_path):
    """The address of a JupyterLab that serves a notebook of `CELLS`; nothing of the user's own settings is read."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder = tmp_path / "served"
    folder.mkdir()
    nbformat.write(notebook, folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "spaces"),
    }
    here = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=log, stderr=log, env=os.environ | own | {"PYTHONPATH": here},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"{address}/lab/tree/explorer.ipynb?reset"
    finally:
        server.terminate()
        server.wait(30)


def test_explorer_in_jupyterlab(lab, open_page):
    """The notebook is run; sliders change what is shown, a prompt of one's own is read, and the console is clean."""
    page = open_page(lab)
    page.set_default_timeout(120_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    live = page.locator(".jp-OutputArea .prosg:not([data-prosg])", has_text="plain model would name")
    alone = page.locator("[data-prosg]")
    live.get_by_text("0 tokens after the prompt, the plain model would name 3 of 3 values").wait_for()
    scale = page.locator(".noUi-handle").nth(1)
    scale.focus()
    scale.press("ArrowRight")
    live.get_by_text("ProSG at scale 2").wait_for()
    page.locator(".noUi-handle").nth(0).focus()
    page.locator(".noUi-handle").nth(0).press("ArrowRight")
    live.get_by_text("64 tokens after the prompt").wait_for()
    page.get_by_label("prompt").last.fill("I live in Oslo.")
    page.get_by_role("button", name="remember it").click()
    live.get_by_text("64 tokens after the prompt, the plain model would name 1 of 1 values").wait_for()
    live.get_by_text("Oslo").first.wait_for()

    bank = page.locator(".jp-OutputArea .prosg", has_text="In the weights")
    bank.get_by_text("In the weights: A and B, at scale 1").wait_for()
    page.get_by_label("memory A").uncheck()
    bank.get_by_text("In the weights: B, at scale 1").wait_for()
    page.get_by_label("memories").fill("I live in Oslo.\nI play the lute.\nMy pet is a cat.")
    page.get_by_role("button", name="remember them").click()
    bank.get_by_text("In the weights: A, B and C, at scale 1").wait_for()

    alone.get_by_label("rank r").press("Home")
    assert "Rank 1 of 4" in alone.locator("[role=status]").inner_text()
    if folder := os.environ.get("PROSG_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/jupyterlab.png", full_page=True)
