"""The cloze on WikiText: its answers, that only the passage has them, and the errors when there is no text."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prosg_lib.errors import UserError
from prosg_lib.tasks import wikitext as tasks_wikitext
from prosg_lib.tasks.pairs import Pair
from prosg_lib.tasks.wikitext import INSTRUCTION, LEAD, LONGEST, detokenised, named, wikitext
from prosg_lib.text.prose import SPLITS, text_lines

NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


pytestmark = pytest.mark.usefixtures("offline")


def passage(name):
    """Ordinary text with one answer that stands nowhere else: Mill<name>."""
    return f"The old road went down to the village of Mill{name}, and ended there. Nobody lived there but Anna."


def write_articles(path, numbers, paragraphs=2):
    """WikiText's form: titles, headings, empty lines, and tokenised paragraphs that name their article."""
    lines = []
    for n in numbers:
        lines += ["", f" = Town {n} = ", "", " = = History = = ", ""]
        for j in range(paragraphs):
            text = passage(f"{n}{j}").replace(",", " ,").replace(". ", " . ").removesuffix(".")
            lines.append(f" {text} . ")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def one(tmp_path, text):
    """The pairs of a text that stands between enough others."""
    others = [passage(n) for n in NUMBERS]
    for split in SPLITS:
        name = "valid" if split == "validation" else split
        (tmp_path / f"{name}.txt").write_text("\n".join([*others, text]), encoding="utf-8")
    return [p for p in wikitext("train", tmp_path) if p.context == text]


def real_folder():
    root = os.environ.get("PROSG_TEST_DATA")
    if not root:
        pytest.skip("PROSG_TEST_DATA is not set: no real WikiText")
    return Path(root) / "wikitext-2"


# Pairs


def test_a_passage_becomes_a_pair(tmp_path):
    """The query is the sentence up to a name that occurs in this passage only."""
    (pair,) = one(tmp_path, passage("Thirteen"))
    assert pair == Pair(passage("Thirteen"), f"{INSTRUCTION}The old road went down to the village of", "MillThirteen")


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("It was on the morning of 3 May 1871 that they left.", "3 May 1871"),
        ("It was ruled for years by King Olaf Ironside II, who lived there.", "King Olaf Ironside II"),
        ("It is said that the whole estate cost $4,250.50 at that time.", "$4,250.50"),
        ("It was in the war of 1807–14 that it burnt down.", "1807–14"),
        ("The wide river Skjern runs slowly south to Jean-Luc's house.", None),  # too early; and a possessive
        ("It was taken as a gift by Skjern <unk> in that year.", None),  # half of the name is not known
        ("It was taken by <unk> and given to Skjern in that year.", None),
        ("It was said by all of them: Skjern was the best.", None),
        ('It was said by all of them, "Skjern was the best".', None),
        ("It was ruled for years by Rudolf J. R. Skjern until then.", None),  # the name would be cut
        ("It was in the old Skjern days that they went to Skjern again.", "Skjern"),  # the first, not the second
        ("It is as long as the bridge (3.1 m; 1017 feet) was.", None),  # in brackets
        ("It was ruled for years by Ab Cd Ef Gh Ij until then.", None),  # too long
    ],
)
def test_which_names_are_answers(tmp_path, sentence, answer):
    """Whole names, dates and numbers, after enough words, where nothing around them is unreadable."""
    pairs = one(tmp_path, f"Here it begins. {sentence}")
    assert [p.answer for p in pairs] == ([] if answer is None else [answer])


def test_the_answer_cannot_be_known_otherwise(tmp_path):
    """A name that occurs in another passage, even inside a longer one or in other letters, is not an answer."""
    text = "Here it begins. They all went home to the city of Skjern in the end."
    assert len(one(tmp_path, text)) == 1
    for other in ("I saw New Skjern's church. It was good.", "SKJERN again. And again."):
        (tmp_path / "more").mkdir(exist_ok=True)
        for name in ("train", "valid", "test"):
            (tmp_path / "more" / f"{name}.txt").write_text("\n".join([passage("A"), text, other]))
        assert [p.answer for p in wikitext("train", tmp_path / "more")] == ["MillA"]


def test_practice_has_every_name(tmp_path):
    """One pair per name, not per passage; even for names that occur in another passage."""
    text = "The old road went down to the village of Ely, and ended there. In the year of the flood came Anna, too."
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("", encoding="utf-8")
    (tmp_path / "train.txt").write_text("\n".join([text, text.replace("road", "path")]), encoding="utf-8")
    pairs = named("train", tmp_path, words=50)
    assert [pair.answer for pair in pairs] == ["Ely", "Anna"] * 2
    assert [pair.query for pair in pairs[:2]] == [
        INSTRUCTION + "The old road went down to the village of",
        INSTRUCTION + "In the year of the flood came",
    ]
    with pytest.raises(UserError, match="no name or number that occurs in a single paragraph"):
        wikitext("train", tmp_path)


def test_a_single_sentence_is_no_passage(tmp_path):
    """There the context would be nothing but the query and the answer; an abbreviation does not end a sentence."""
    assert not one(tmp_path, "They all went home to old Mr. Brown and the city of Skjern.")


def sentences_by_the_square(passage):
    """As the sentences were first found: every abbreviation since the last end is looked for again at each end."""
    start = 0
    for end in tasks_wikitext._SENTENCE_END.finditer(passage):
        found = tasks_wikitext._ABBREVIATION.finditer(passage, start, end.start() + 1)
        if not any(m.end() == end.start() + 1 for m in found):
            yield passage[start : end.end() - 1]
            start = end.end()
    yield passage[start:]


PIECES = ["St", "Mr", "Prof", "Capt", "A", "Ab", "vs", "c", "xc", "é", "É", "0"]
PIECES += [".", "!", '"', "(", "_", "-", "'", " ", ". "]


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_sentences_are_the_passage(passage):
    """Cut at single spaces, at the same ones as by the slow reference."""
    found = list(tasks_wikitext._sentences(passage))
    assert " ".join(found) == passage
    assert found == list(sentences_by_the_square(passage))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("A well @-@ known road , 1 @,@ 250 @.@ 5 km long .", "A well-known road, 1,250.5 km long."),
        ('He said : " Go ! " ( twice ) ; they went .', 'He said: "Go!" (twice); they went.'),
        ("Du Fu 's poems don 't rhyme , the ships ' guns do .", "Du Fu's poems don't rhyme, the ships' guns do."),
        ("A ' sea @-@ keeping ' ship in 1934 – 37 , at 3 : 09 .", "A 'sea-keeping' ship in 1934–37, at 3:09."),
        ("It cost $ 5 / km , or 4 % [ sic ] – so he said .", "It cost $5/km, or 4% [sic] – so he said."),
        ("Piz ’ s show , at 30 ° N , in B ♭ .", "Piz’s show, at 30° N, in B♭."),
        ("The <unk> 's sons , of <unk> .", "The <unk>'s sons, of <unk>."),
        ("'Twas said, 'Go . . . away / home', at 5 – 6.", "'Twas said, 'Go . . . away / home', at 5 – 6."),
    ],
)
def test_tokens_become_ordinary_text(tokens, text):
    """WikiText's tokens are joined as English is written; ordinary text stays as it is."""
    assert detokenised(tokens) == text


# Sources


def test_articles_are_not_divided(tmp_path):
    """Of files in WikiText's form every article is in one split, wherever it stands."""
    write_articles(tmp_path / "w" / "a.txt", NUMBERS[:7])
    write_articles(tmp_path / "w" / "b.txt", NUMBERS[7:])
    towns = {s: [p.answer.removeprefix("Mill")[:-1] for p in wikitext(s, tmp_path / "w")] for s in SPLITS}
    assert sum(map(len, towns.values())) == 24
    assert [len(set(towns[s])) for s in SPLITS] == [10, 1, 1]
    assert set.union(*map(set, towns.values())) == set(NUMBERS)
    assert towns["train"] == sorted(towns["train"], key=NUMBERS.index)


OWN = {"train": NUMBERS[:4], "valid": NUMBERS[4:5], "test": NUMBERS[5:]}


@pytest.mark.parametrize(
    "name", ["{}.txt", "wiki.{}.tokens", "wiki.{}.raw", "wiki.{}.txt", "wiki.{}.tokens.txt", "Wiki.{}.TXT"]
)
def test_the_official_splits_are_left_as_they_are(tmp_path, name):
    """Under the names of WikiText's archives, and under those that it may get when somebody renames its files."""
    for split, numbers in OWN.items():
        write_articles(tmp_path / name.format(split), numbers, paragraphs=1)
    assert [[p.answer for p in wikitext(split, tmp_path)] for split in SPLITS] == [
        [f"Mill{n}0" for n in numbers] for numbers in OWN.values()
    ]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["wiki.train.tokens"], "train.txt, valid.txt and test.txt"),
        (["wiki.valid.raw", "wiki.test.raw"], "has wiki.test.raw, wiki.valid.raw of WikiText"),
        (["train.txt", "test.txt"], "train.txt, valid.txt and test.txt"),
        (["train.txt", "valid.txt", "test.txt", "wiki.test.tokens"], "each once"),
    ],
)
def test_some_of_the_official_splits_are_never_mixed(tmp_path, names, missing):
    """One error; what it asks for works."""
    for name in names:
        write_articles(tmp_path / name, NUMBERS)
    with pytest.raises(UserError, match=missing):
        wikitext("train", tmp_path)
    for name in names:
        (tmp_path / name).unlink()
    for split, numbers in OWN.items():
        write_articles(tmp_path / f"{split}.txt", numbers)
    assert len(wikitext("validation", tmp_path)) == 2


def test_a_byte_order_mark_is_no_text(tmp_path):
    """The first title of a file that a Windows program saved is a title."""
    write_articles(tmp_path / "a.txt", NUMBERS)
    text = (tmp_path / "a.txt").read_bytes().lstrip()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text)
    for split in SPLITS:
        assert wikitext(split, tmp_path / "b.txt") == wikitext(split, tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text",
    [
        "St. A. " * 40_000,
        "Ab Cd " * 40_000 + "Ab-. Here it ends.",
        "It was not there, " * 15_000 + "Anna. " + "It was. " * 9,
    ],
    ids=["abbreviations", "names", "words"],
)
def test_long_paragraphs_take_no_longer_than_many_short_ones(tmp_path, text):
    """A quarter of a million characters in one paragraph; it took an hour when time grew with the square."""
    start = time.process_time()
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{passage('One')}\n{text}")
    for words in (10**6, 50):
        assert wikitext("train", tmp_path, words)[0].answer == "MillOne"
    assert time.process_time() - start < 15


def test_ordinary_text_without_titles(tmp_path):
    """Of three files or more each is in one split; of fewer the paragraphs are divided, and none is left out."""
    for n in NUMBERS:
        (tmp_path / f"{n}.txt").write_text(f"{passage(n + 'a')}\n{passage(n + 'b')}")
    books = {s: [p.answer.removeprefix("Mill")[:-1] for p in wikitext(s, tmp_path)] for s in SPLITS}
    assert [len(set(books[s])) for s in SPLITS] == [10, 1, 1]
    single = tmp_path / "single"
    single.write_text("\n".join(passage(n) for n in NUMBERS))
    answers = [p.answer for s in SPLITS for p in wikitext(s, single)]
    assert sorted(answers) == sorted(f"Mill{n}" for n in NUMBERS)


def test_from_the_hub(monkeypatch):
    """Its own splits, headings left out, tokens made ordinary text."""
    import datasets

    def load(*_):
        heading = " = A heading that is longer than the shortest paragraph = \n"
        tokens = [" " + passage(n).replace(",", " ,") + " \n" for n in NUMBERS]
        return {s: {"text": ["", heading, *tokens[i::3]]} for i, s in enumerate(SPLITS)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [p.context for p in wikitext("test")] == [passage(n) for n in NUMBERS[2::3]]


def test_real_wikitext():
    """WikiText-2's validation and test files: answers are in the passage, in no other, and no word of one in its query;
    no article is in two splits."""
    folder = real_folder()
    pairs = {split: wikitext(split, folder) for split in SPLITS}
    assert [len(pairs[s]) > n for s, n in zip(SPLITS, (500, 50, 40), strict=True)] == [True] * 3
    contexts = [{p.context for p in part} for part in pairs.values()]
    assert len(set.union(*contexts)) == sum(map(len, contexts))
    for part in pairs.values():
        for pair in part:
            start = pair.query.removeprefix(INSTRUCTION)
            assert pair.context.count(f"{start} {pair.answer}") == 1
            assert not set(pair.answer.lower().split()) & set(start.lower().split())
            assert "<unk>" not in pair.query + pair.answer
            assert len(start.split()) >= LEAD
            assert len(pair.answer.split()) <= LONGEST
            assert sum(pair.answer in p.context.split() for p in part) <= 1


def test_real_tokens_are_joined():
    """No token of WikiText's own is left, nor a space before a comma."""
    lines = [detokenised(line) for file in real_folder().glob("*.txt") for line in text_lines(file)]
    text = "\n".join(line for line in lines if not line.startswith("= "))
    assert not any(mark in text for mark in (" @-@ ", " @,@ ", " @.@ ", " , ", " ; "))


# What is refused


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: None, r"shelf does not exist"),
        (lambda f: f.mkdir(), r"no \.txt files in .*shelf"),
        (lambda f: f.write_bytes(b"abc\xff"), r"shelf is not UTF-8 text \(byte 3\)"),
        (lambda f: f.write_text(""), "the train split of .*shelf has 0 paragraphs"),
        (
            lambda f: f.write_text("\n".join("it was so. it was not." for _ in range(9))),
            "but no name or number that occurs in a single paragraph",
        ),
    ],
    ids=["missing", "empty folder", "encoding", "empty", "nothing to ask"],
)
def test_a_source_that_cannot_be_used(tmp_path, prepare, message):
    """One error each, which names the source and a remedy."""
    prepare(tmp_path / "shelf")
    with pytest.raises(UserError, match=message):
        wikitext("train", tmp_path / "shelf")
