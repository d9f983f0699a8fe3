"""Chat: answers are the model's own, both states go on, nothing grows, and whatever is typed, it ends kindly."""

import gc
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from prosg_lib import chat, cli
from prosg_lib.chat import Chat, converse
from prosg_lib.errors import UserError
from prosg_lib.generators.several_prompts import append_prompt, delta_of_prompts
from prosg_lib.generators.token_wise import TokenGenerator

TOKENS = 12
PROMPT, QUESTIONS = (
    "My home town is Oslo. Call me captain.",
    ["What is my home town?", "I like rain.", "Tell me my pet."],
)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model ends no answer by itself."""
    monkeypatch.setattr(chat, "_ANSWER_TOKENS", TOKENS)


@pytest.fixture
def generator(lm):
    torch.manual_seed(0)
    made = TokenGenerator(lm, 3, 24, ("att.output", "ffn.key"))
    for p in nn.ModuleList([made.heads, made.keys]).parameters():
        nn.init.normal_(p, std=0.5)
    return made.eval()


def talk(one, *lines):
    """What is written while these lines are typed."""
    out = io.StringIO()
    converse(one, io.StringIO("".join(line + "\n" for line in lines)), out)
    return out.getvalue()


def say(one, text):
    return "".join(one.answer(text))


# --- what is said -------------------------------------------------------------------------------------------------


def test_both_states_read_the_conversation(lm, generator):
    """Answers are what `generate` says from the state and the change so far; the plain model's from its own state."""
    one = Chat(lm, generator)
    one.remember(PROMPT)
    delta = generator.memorize(lm, [f"User: {PROMPT}\n"])
    state, plain = (lm.derive_state([f"User: {PROMPT}\n"], None, d) for d in (delta, None))
    different = 0
    for text in QUESTIONS:
        asked = f"User: {text}\nBot:"
        (expected,) = lm.generate([asked], state, delta, max_new_tokens=TOKENS)
        (without,) = lm.generate([asked], plain, max_new_tokens=TOKENS)
        assert say(one, text) == expected
        assert one.plain() == one.plain() == without
        state, plain = (lm.derive_state([f"{asked}{expected}\n"], s, d) for s, d in ((state, delta), (plain, None)))
        different += expected != without
    assert different
    for mine, theirs in ((one._state, state), (one._plain, plain)):
        assert_close(lm.state_features(mine), lm.state_features(theirs))
    assert one.far() == (sum(len(lm.tokenizer.encode(f"User: {q}\nBot:")) for q in QUESTIONS) + _answers(one),) * 2


def _answers(one):
    """Tokens of all that was read but the prompt and the questions."""
    count = one.lm.tokenizer.encode
    return one._read - len(count(f"User: {PROMPT}\n")) - sum(len(count(f"User: {q}\nBot:")) for q in QUESTIONS)


def test_what_is_remembered_adds_up(lm, generator):
    """More text goes on where the last ended; a refresh takes in what the user said; at scale 0 nothing is changed."""
    one = Chat(lm, generator)
    one.remember(PROMPT)
    say(one, QUESTIONS[1])
    one.remember("My pet is a parrot.")
    first = append_prompt(lm, generator, "My pet is a parrot.", append_prompt(lm, generator, PROMPT))
    assert_same(one.delta, delta_of_prompts(lm, generator, first))
    far = one.far()
    assert far[0] > far[1] == 0
    one.refresh()
    said = append_prompt(
        lm,
        generator,
        "My pet is a parrot.",
        append_prompt(lm, generator, QUESTIONS[1], append_prompt(lm, generator, PROMPT)),
    )
    assert_same(one.delta, delta_of_prompts(lm, generator, said))
    one.scale = 0.0
    (plain,) = lm.generate([f"User: {QUESTIONS[0]}\nBot:"], one._state, max_new_tokens=TOKENS)
    assert say(one, QUESTIONS[0]) == plain
    one.forget()
    assert (one.delta, one._state, one._plain, one.far()) == (None, None, None, None)


def assert_same(a, b):
    for name in b.factors:
        assert_close(a.factors[name].U, b.factors[name].U, rtol=1e-4, atol=1e-4)


def test_memory_is_refreshed_after_so_many_tokens(lm, generator):
    """Not before, and then with all that the user said; also where nothing was remembered at first."""
    one = Chat(lm, generator, refresh=10_000)
    say(one, QUESTIONS[0])
    assert one.delta is None
    one = Chat(lm, generator, refresh=1)
    say(one, QUESTIONS[0])
    assert_same(one.delta, delta_of_prompts(lm, generator, append_prompt(lm, generator, QUESTIONS[0])))
    with pytest.raises(UserError, match="refresh is 0"):
        Chat(lm, generator, refresh=0)


def test_a_drawn_answer(lm, generator):
    """The temperature reaches the model: torch's seed decides what is said."""
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(say(Chat(lm, generator, temperature=1.0), QUESTIONS[0]))
    assert said[0] == said[1] != said[2]
    with pytest.raises(UserError, match="temperature is -1"):
        Chat(lm, generator, temperature=-1.0)


def test_nothing_grows_with_the_conversation(lm, generator):
    """As many live tensors and bytes after 30 turns as after 3."""
    one, seen = Chat(lm, generator, refresh=50), []
    one.remember(PROMPT)
    for turn in range(1, 31):
        say(one, QUESTIONS[0])
        one.refresh()
        if turn in (3, 30):
            seen.append(live_bytes())
    assert seen[0] == seen[1]


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


# --- what is typed ------------------------------------------------------------------------------------------------


def test_every_command(lm, generator):
    """Each does what /help says; what is wrong is said in brackets, and the chat goes on."""
    one = Chat(lm, generator)
    said = talk(
        one, "/far", "/plain", "/refresh", "/remember", "/remember My pet is a parrot.", "/far", "", "  ",
        "/scale 0.5", "/scale two", "/scale nan", "/scale", "/forgt", "/help", QUESTIONS[0], "/plain", "/far",
        "/refresh", "/quit", "/far",
    )  # fmt: skip
    for expected in (
        "/far\nNothing was remembered yet.\n",
        "/plain\n(nothing was asked yet)\n",
        "/refresh\n(there is nothing to refresh the memory with; say something first)\n",
        "/remember\n(there is nothing to remember: the text is empty)\n",
        "/remember My pet is a parrot.\nIt is in the weights now.\n",
        "/far\nThe prompt ended 0 tokens ago.\n",
        "/scale 0.5\nThe change in the weights counts 0.5 times.\n",
        "/scale two\n(/scale takes a number, as in /scale 0.5, not 'two')\n",
        "/scale nan\n(/scale takes a number, as in /scale 0.5, not 'nan')\n",
        "/scale\nThe change in the weights counts 0.5 times.\n",
        "/forgt\n(there is no /forgt; /help lists what there is)\n",
        f"User: {QUESTIONS[0]}\nBot:",
        f"/plain\nWithout the change:{one.plain()}\n",
        f"/far\nThe prompt ended {one.far()[0]} tokens ago.\n",
        "/refresh\nWhat you said since is in the weights, too.\n",
    ):
        assert expected in said
    listed = [line.split()[0] for line in said.splitlines() if line.startswith("/")]
    assert listed == ["/plain", "/far", "/remember", "/refresh", "/scale", "/forget", "/help", "/quit"]
    assert said.endswith("User: /quit\nGoodbye.\n")
    one.remember("I play the flute.")
    assert f"what was remembered last {one.far()[1]}." in talk(one, "/far")
    assert "All is forgotten" in talk(one, "/forget")
    assert one.delta is None


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
    assert talk(Chat(lm, generator)) == "User: \nGoodbye.\n"
    out = io.StringIO()
    converse(Chat(lm, generator), Interrupted("", at="line"), out)
    assert out.getvalue() == "User: \nGoodbye.\n"
    out = Interrupted("", at="answer")
    converse(Chat(lm, generator), io.StringIO("Hello\n"), out)
    assert out.getvalue() == "User: Hello\nBot:\nGoodbye.\n"


def test_a_terminal_shows_what_is_typed_itself(lm, generator):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = io.StringIO()
    converse(Chat(lm, generator), Terminal("/scale\n/quit\n"), out)
    assert out.getvalue() == "User: The change in the weights counts 1 times.\nUser: Goodbye.\n"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_shipped_model_keeps_what_it_is_told():
    """As a user would run it, with piped input: the prompt is known where the plain model has forgotten it."""
    lines = ["My garden is wet, and Ada's home town is Rome, and Boris has a cat, and the rain goes on all day."] * 20
    lines += ["What is my home town?", "/plain", "/far", "/remember My pet is a parrot.", "What is my pet?"]
    done = subprocess.run(
        [sys.executable, "-m", "prosg_lib.cli", "chat", "--remember", "You should know that my home town is Oslo."],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "rwkv4-dialogue, with rwkv4-dialogue-token. /help lists the commands.\nUser: My garden"
    )
    assert "User: What is my home town?\nBot: Oslo.\n" in done.stdout
    assert "User: /plain\nWithout the change: Oslo." not in done.stdout
    assert "User: What is my pet?\nBot: parrot.\n" in done.stdout
    assert done.stdout.endswith("User: \nGoodbye.\n")


def test_a_model_finds_its_own_generator(monkeypatch, capsys):
    """Also where the two are no RWKV's."""
    told = ("--remember", "You should know that my home town is Oslo.")
    code, shown = command(monkeypatch, capsys, "--model", "mamba2-dialogue", *told, typed="What is my home town?\n")
    assert code == 0
    assert shown.out.startswith("mamba2-dialogue, with mamba2-dialogue-token. /help")
    assert "Bot: Oslo.\n" in shown.out


def command(monkeypatch, capsys, *arguments, typed=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code = cli.main(["chat", *arguments])
    return code, capsys.readouterr()


def test_a_model_without_a_generator_is_explained(monkeypatch, capsys):
    """It can be talked to, and says what it cannot do and what to do about it."""
    code, shown = command(monkeypatch, capsys, "--model", "rwkv4-pairs", typed="Hello\n/remember I am Ada.\n/refresh\n")
    assert code == 0
    assert shown.out.startswith("rwkv4-pairs, plain. /help lists the commands.\nIt talks, and forgets: this model came")
    assert "\nBot:" in shown.out
    assert "(nothing can be remembered: this model came without a generator" in shown.out
    assert "(there is no memory to refresh: this model came without a generator" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--remember", " "], "nothing to remember: the text is empty"),
        (["--model", "rwkv4-pairs", "--generator", "rwkv4-dialogue-token"], "was trained for model"),
        (["--model", "rwkv4-pairs", "--remember", "I am Ada."], "nothing can be remembered: this model came without"),
        (["--model", "rwkv4-pairs", "--generator", "rwkv4-pairs-token-characters-lc"], "was trained on pairs"),
        (["--generator", "rwkv4-dialogue-final"], "is a FinalStateGenerator"),
        (["--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, said):
    """And exit code 2, before anything can be typed."""
    code, shown = command(monkeypatch, capsys, *arguments, typed="Hello\n")
    assert (code, shown.out) == (2, "")
    assert said in shown.err
    assert shown.err.startswith("prosg: ")
    assert shown.err.count("\n") == 1
