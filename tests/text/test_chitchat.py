"""Real conversations: from the package's file to lines that two people say, by split; its code is never run."""

import json

import pytest

from prosg_lib.errors import UserError
from prosg_lib.text import chitchat
from prosg_lib.text.chitchat import load_conversations
from prosg_lib.text.prose import SPLITS, ProseTokens
from prosg_lib.text.tokenizer import load_tokenizer

FILE = "chitchat_dataset/dataset.json"


def message(sender, *parts):
    return [{"text": text, "timestamp": "2018-04-20T01:57:41", "sender": sender} for text in parts]


def talk(i, count=6):
    """A conversation whose every message names it."""
    return {"messages": [message(f"person {k % 2}", f"Message {k} of talk {i}.") for k in range(count)]}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of that name, whose code must not run, with a data file of this content."""

    def made(content):
        for file, text in {
            "chitchat_dataset/__init__.py": "raise RuntimeError('the code was run')",
            "chitchat_dataset-7.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: chitchat-dataset\nVersion: 7.0\n",
            FILE: content if isinstance(content, str | None) else json.dumps(content),
        }.items():
            if text is not None:
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    return made


def test_a_conversation_is_in_one_split(install):
    """All of it, whatever the order of the file; the source has the package's version."""
    talks = {f"id {i}": talk(i) for i in range(20)}
    install(talks)
    found = load_conversations()
    assert found.source == chitchat.source() == "chitchat-dataset 7.0"
    names = {s: {line.partition("talk ")[2].strip(".\n") for line in found.paragraphs[s]} for s in SPLITS}
    assert [len(names[s]) for s in SPLITS] == [16, 2, 2]
    assert len(set.union(*names.values())) == 20
    assert sum(map(len, found.paragraphs.values())) == 6 * 20
    install(dict(reversed(talks.items())))
    assert load_conversations().sha256 == found.sha256


def test_how_it_reads(install):
    """A line a message, with who says it, and an empty line behind a conversation."""
    messages = [message("x", "Hello ", "are you\nthere?"), *(message("yx"[k % 2], f"Yes {k}") for k in range(5))]
    install({f"id {i}": {"messages": messages} for i in range(3)})
    found = load_conversations()
    assert found.paragraphs["test"] == [
        "A: Hello are you there?",
        *("BABA"[k] + f": Yes {k}" for k in range(4)),
        "B: Yes 4\n",
    ]
    tokenizer = load_tokenizer()
    assert tokenizer.decode(ProseTokens.of(found, "test", tokenizer).ids).endswith("A: Yes 3\nB: Yes 4\n\n")


@pytest.mark.parametrize(
    "text",
    [
        "look at https://a.org/b",
        "www.a.org",
        "write to me@a.org please",
        "call (808) 555-1557",
        "call 808 555 1557",
        "a" * 41,
        "no no no No no no no no no",
        " ",
    ],
)
def test_messages_that_are_left_out(install, text):
    """What belongs to somebody, and what nobody would read; the rest of the conversation stays."""
    odd = talk(0, 7)
    odd["messages"][3] = message("person 1", text)
    install({"id 0": odd, "id 1": odd, "id 2": odd})
    lines = load_conversations().paragraphs["train"]
    assert [line[:12] for line in lines] == [f"{'AB'[k % 2]}: Message {k}"[:12] for k in (0, 1, 2, 4, 5, 6)]


@pytest.mark.parametrize(
    "text", ["I have 403902930493 words", "awww. That's sweet", "me @ home", "no no no, not at all", "3.14159265358979"]
)
def test_messages_that_stay(install, text):
    install({f"id {i}": {"messages": [*talk(0)["messages"], message("person 0", text)]} for i in range(3)})
    assert load_conversations().paragraphs["train"][-1] == f"A: {text}\n"


def test_conversations_that_are_left_out(install):
    """Short ones, monologues, and those of three people; they take their place in a split."""
    monologue = {"messages": [message("x", f"Is anyone there? {k}") for k in range(9)]}
    three = {"messages": [message("xyz"[k % 3], f"Hello {k}") for k in range(9)]}
    left_out = {"short": talk("short", 5), "monologue": monologue, "three": three}
    install({f"id {i}": talk(i) for i in range(40)} | left_out)
    lines = [line for lines in load_conversations().paragraphs.values() for line in lines]
    assert len(lines) == 6 * 40
    assert all("of talk" in line and "short" not in line for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"dataset\.json does not exist\."),
        ("", r"dataset\.json, line 1: not JSON"),
        ('{"a": {"mess', r"dataset\.json, line 1: not JSON"),
        ({}, r"dataset\.json holds too few conversations for 3 splits\."),
        ({"a": talk(0), "b": talk(1)}, r"dataset\.json holds too few conversations"),
        ([talk(0)], r"dataset\.json is not in the package's format\."),
        ({"a": {"text": []}}, r"dataset\.json is not in the package's format\."),
        ({"a": {"messages": ["Hello"]}}, r"dataset\.json is not in the package's format\."),
        ({"a": {"messages": [[{"text": 1, "sender": "x"}]]}}, r"dataset\.json is not in the package's format\."),
    ],
)
def test_a_package_that_cannot_be_read(install, content, message):
    """One sentence on what is wrong with its file, and one on what to do."""
    install(content)
    with pytest.raises(
        UserError, match=message + r".* Install the package again: pip install chitchat-dataset --force"
    ):
        load_conversations()


def test_without_the_package(monkeypatch):
    def absent(name):
        raise chitchat.PackageNotFoundError(name)

    monkeypatch.setattr(chitchat, "distribution", absent)
    assert chitchat.source() is None
    with pytest.raises(UserError, match=r"package chitchat-dataset, which is not installed; pip install chitchat-d"):
        load_conversations()


def test_what_the_datasheet_says():
    """The numbers of the real package."""
    if chitchat.source() != "chitchat-dataset 0.9.0":
        pytest.skip(f"chitchat-dataset 0.9.0 is not installed; {chitchat.INSTALL}")
    paragraphs = load_conversations().paragraphs
    assert [sum(line.endswith("\n") for line in paragraphs[s]) for s in SPLITS] == [2359, 294, 310]
    assert [len(paragraphs[s]) for s in SPLITS] == [105_971, 13_114, 13_414]
    assert [sum(map(len, paragraphs[s])) for s in SPLITS] == [9_606_936, 1_235_180, 1_173_268]
