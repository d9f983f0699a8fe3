"""Writes a model card beside every shipped checkpoint, and Croissant metadata for the dialogue data.

Everything in them is read from where it stands: the checkpoint's header, the table of recipes, the ledger, the data.

python data/cards.py          # write checkpoints/*.md and croissant.json
python data/cards.py check    # exit code 1 if they are not what would be written
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jinja2

from prosg_lib import files, paths
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger, links
from prosg_lib.tasks import open_world
from prosg_lib.training.checkpoints import STEP, header_of
from prosg_lib.training.recipes import Recipe, recipes

CHECKPOINTS, CROISSANT = "checkpoints", "croissant.json"
PROFILE = get_profile("cpu")

_FAR = (0, 256, 1024, 4096)
MEASURED = {
    "rwkv4-dialogue": [
        *(("06_forgetting_evaluation", f"recall/base@{d}") for d in _FAR),
        ("02_prompt_forgetting", "perplexity/base"),
    ],
    "rwkv4-dialogue-token": [
        *(("06_forgetting_evaluation", f"recall/prosg-token@{d}") for d in _FAR),
        ("06_forgetting_evaluation", "locality/competing"),
        ("06_forgetting_evaluation", "locality/perplexity"),
    ],
    "rwkv4-dialogue-final": [("06_forgetting_evaluation", f"recall/prosg-final@{d}") for d in _FAR],
    "rwkv4-dialogue-static": [("06_forgetting_evaluation", f"recall/static@{d}") for d in _FAR],
    "rwkv4-dialogue-adapter": [("07_gradient_as_prompt", "dialogue/adapter@512")],
    "rwkv7-open": [("06d_what_a_sceptic_asks", f"{level}/base@0") for level in ("known", "values", "slots", "all")],
    "rwkv7-open-token": [
        ("06d_what_a_sceptic_asks", f"{level}/prosg-token@{d}")
        for level in ("known", "values", "slots", "all")
        for d in (0, 4096)
    ],
    "smollm2-token": [
        *(("10_a_model_that_others_trained", f"{about}/alone@512") for about in ("natural", "values", "passages")),
        *(("10_a_model_that_others_trained", f"locality/{text}") for text in ("prose", "conversation")),
    ],
    "mamba2-dialogue": [("08_pretrained_models", f"recall/base@{d}") for d in (0, 1024)],
    "mamba2-dialogue-token": [("08_pretrained_models", "recall/prosg-token@1024")],
    "llama-pairs": [("07_gradient_as_prompt", f"right/{task}/prompted") for task in ("characters", "reversal")],
    "llama-pairs-weights-characters-lc": [("07_gradient_as_prompt", "here/characters/LC")],
    "llama-pairs-weights-1-characters-lc": [("07_gradient_as_prompt", "start/rank-1-of-all")],
}
"""The claims that are about a checkpoint: (notebook, claim), of the profile cpu."""

DTYPES = {"I8": "int8", "F16": "float16", "F32": "float32"}

DATA = {
    "dialogues": "constructed dialogues, training split (hash `{hash}`)",
    "open": "dialogues of the open world, training split (hash `{hash}`)",
    "pairs": "contexts and queries, training split (hash `{hash}`)",
    "problems": "the established memory tests, training split",
    "conversations": "prompts as people write them, dialogues of the open world, passages with questions, sentences to "
    "complete; training split",
}
PROSE = {"books": "19 public-domain books", "own": "the project's own sentences"}


def card(path: Path) -> str:
    """The card of a checkpoint.

    Raises:
        UserError: the checkpoint is damaged, is of no recipe, or a claim in `MEASURED` is not in the ledger.
    """
    from safetensors import safe_open

    header = header_of(files.load_meta(path), path)
    record, provenance = header.record, header.provenance
    made = recipes(PROFILE).get(record.recipe)
    if made is None or made.name != path.stem:
        raise UserError(f"{path.stem} is of the recipe {record.recipe!r}; a shipped file has its recipe's name")
    with safe_open(path, framework="pt") as opened:
        slices = [opened.get_slice(name) for name in opened.keys() if not name.endswith(STEP)]  # noqa: SIM118
        weights = sum(_product(one.get_shape()) for one in slices)
        dtypes = {one.get_dtype() for one in slices}
    facts = {
        "recipe": f"`{made.name}`",
        "module": _settings(record.module),
        "for": f"{_model(made.lm)}, fingerprint `{record.lm}`" if made.lm else None,
        "data": DATA[made.data].format(hash=record.data)
        + f"; {PROSE[provenance['prose']]} as prose{_talk(provenance)}",
        "training": _settings(record.training),
        "course": _settings(record.course),
        "but": provenance.get("schedule"),
        "seed": record.seed,
        "device": f"{provenance['device']}, {provenance['seconds'] / 60:.1f} minutes",
        "versions": ", ".join(f"{n} {v}" for n, v in provenance["versions"].items() if v != "unknown"),
        "commit": f"`{provenance['commit']}`",
    }
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(files.read_text(Path(__file__).with_name("card.md.jinja"))).render(
        name=path.stem,
        license=_license(),
        about=made.about[:1].upper() + made.about[1:],
        weights=weights,
        dtype=" and ".join(name for key, name in DTYPES.items() if key in dtypes),
        bytes=path.stat().st_size,
        lm=made.lm,
        record=record,
        conversations=made.data == "conversations",
        split="validation" if made.data == "conversations" else "test",
        facts={key: value for key, value in facts.items() if value not in (None, "")},
        code=_code(path.stem, made),
        command=f"prosg train {made.name} --retrain",
        rows=list(_measured(path.stem)),
    )


def _talk(provenance: dict) -> str:
    return f", and conversations of {provenance['conversations']}" if "conversations" in provenance else ""


def _measured(name: str) -> Iterator[tuple[str, str, str]]:
    for notebook, claim in MEASURED.get(name, []):
        entry = ledger.expected_claims(notebook, PROFILE.name).get(claim)
        if entry is None:
            raise UserError(f"the ledger of {notebook} has no claim {claim}; correct MEASURED in data/cards.py")
        yield notebook, claim, ledger.number_text(ledger.reference(entry)["reference"])


def _code(name: str, made: Recipe) -> str:
    if made.lm is None:
        return f'import prosg_lib as prosg\n\nlm = prosg.load_model("{name}")'
    if made.kind in ("weights", "maps"):  # which make no delta
        return (
            "from prosg_lib.config import get_profile\nfrom prosg_lib.training.load_or_train import load_or_train\n\n"
            f'step = load_or_train("{made.name}", get_profile("cpu"))'
        )
    window = f", window={made.window}" if made.window else ""
    return (
        f'import prosg_lib as prosg\n\nlm = prosg.load_model("{made.lm}"{window})\n'
        f'generator = prosg.load_generator("{name}", lm)'
    )


def _model(name: str) -> str:
    """A model by name, with a link to its card if it is shipped."""
    return f"[`{name}`]({name}.md)" if name in recipes(PROFILE) else f"`{name}`"


def _settings(settings: dict) -> str:
    shown = {key: value for key, value in settings.items() if value not in ("", [], 0, [""])}
    return ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in shown.items())


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _license() -> str:
    project = tomllib.loads(files.read_text(paths.repo_root() / "pyproject.toml"))["project"]
    return project["license"].lower()


def croissant() -> str:
    """Croissant metadata (ML Commons, version 1.0) of the dialogue data sets, as JSON."""
    data = paths.data_dir()
    values = files.read_json(data / "open_values.json")
    sample, natural, listed = "open_sample.jsonl", "natural_prompts.jsonl", "open_values.json"
    described = {
        sample: "Dialogues of the open world, of every split and level, one JSON object a line.",
        natural: "Prompts that are no templates, with questions; all were written by a language model, none by people.",
        listed: "Values of the open world's facts, by type and split; none is in two splits.",
    }
    made = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "prosg-open-world",
        "description": (
            "Constructed dialogues that measure what a language model still knows of its prompt: facts, "
            "instructions and corrections in a prompt, other text, then questions about it, with values and "
            "wordings that nobody trained on. The file of dialogues is a sample; the library draws any number "
            "from a seed. data/DATASHEET.md says how all of it was made and what it cannot show."
        ),
        "version": f"{open_world.VERSION}.0.0",
        "datePublished": "2026-11-30",
        "license": "https://www.apache.org/licenses/LICENSE-2.0",
        "url": links.address(),
        "citeAs": f"The ProSG notebooks authors, {links.address()}",
        "inLanguage": "en",
        "isLiveDataset": False,
        "rai:dataCollection": (
            "Dialogues and values are drawn by a program from lists of words and sentences written for it. "
            "The natural prompts, their questions and answers were written by a language model under instructions."
        ),
        "rai:dataLimitations": (
            "Template English, as stiff as it sounds; a new value is a new string and nothing has to be understood "
            "about it. A result on the natural prompts is no result on real users' prompts."
        ),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "description": text,
                "contentUrl": name,
                "encodingFormat": "application/jsonlines" if name.endswith("l") else "application/json",
                "sha256": hashlib.sha256((data / name).read_bytes()).hexdigest(),
            }
            for name, text in described.items()
        ],
        "recordSet": [
            _records(
                "dialogues",
                sample,
                "One dialogue. A model reads before, prompt and body in this order, then it is asked the probes.",
                {
                    "split": "train, validation or test",
                    "new": "*what is new in it: values, slots, wordings; nothing in training",
                    "before": "text in front of the prompt",
                    "prompt": "what is to be remembered",
                    "body": "text between the prompt and the questions",
                    "probes": {
                        "question": "about the prompt",
                        "answer": "the right one, with the instructed words around it",
                        "value": "the right one alone",
                        "kind": "fact, update (corrected), other (somebody else's), query (asked by the word "
                        "that the prompt set for it) or unknown (never said)",
                    },
                },
            ),
            _records(
                "natural_prompts",
                natural,
                "One prompt with questions about it.",
                {
                    "id": "of the prompt",
                    "split": "train, validation or test",
                    "kind": "of text; system prompt, instructions, notes, persona, story or correction where measured",
                    "text": "the prompt",
                    "questions": {
                        "question": "about the prompt",
                        "answer": "the right one, which stands in the prompt",
                        "accept": "*what is accepted in its place",
                    },
                    "values": {
                        "value": "a string of the text that another of its kind could stand for; training only",
                        "kind": "person, place, word, number, code, date or time",
                    },
                },
            ),
            {
                "@type": "cr:RecordSet",
                "@id": "values",
                "name": "values",
                "description": "One record: the lists of values of every type and split.",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"values/{kind}_{split}",
                        "name": f"{kind}_{split}",
                        "description": f"values of type {kind} of the {split} split",
                        "dataType": "sc:Text",
                        "repeated": True,
                        "source": {"fileObject": {"@id": listed}, "extract": {"jsonPath": f"$.{kind}.{split}"}},
                    }
                    for kind, by_split in values.items()
                    for split in by_split
                ],
            },
        ],
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _records(name: str, file: str, description: str, columns: dict) -> dict:
    """A set of records from a file of JSON lines; columns: name -> description, with a * for a list, or a dict."""

    def field(at: str, column: str, about: str | dict) -> dict:
        made = {"@type": "cr:Field", "@id": f"{at}/{column}", "name": f"{at}/{column}"}
        source = {"fileObject": {"@id": file}, "extract": {"column": at.partition("/")[2] or column}}
        if isinstance(about, dict):
            inner = [field(f"{at}/{column}", key, text) for key, text in about.items()]
            for one in inner:
                one["source"]["transform"] = {"jsonPath": one["name"].rpartition("/")[2]}
            return made | {"description": f"list of {', '.join(about)}", "repeated": True, "subField": inner}
        plain = {"description": about.removeprefix("*"), "dataType": "sc:Text", "source": source}
        return made | plain | ({"repeated": True} if about.startswith("*") else {})

    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": [field(name, column, about) for column, about in columns.items()],
    }


_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def pages() -> dict[Path, str]:
    """Every file that this script writes, and its text."""
    folder = paths.data_dir() / CHECKPOINTS
    made = {path.with_suffix(".md"): card(path) for path in sorted(folder.glob("*.safetensors"))}
    return made | {paths.data_dir() / CROISSANT: croissant()}


def main(arguments: list[str]) -> int:
    try:
        if arguments not in ([], ["check"]):
            raise UserError(f"unknown arguments {' '.join(arguments)!r}; use none, or `check`")
        stale = [path for path, text in pages().items() if not path.is_file() or files.read_text(path) != text]
        if arguments:
            for path in stale:
                print(f"{path.name} is not what `python data/cards.py` writes", file=sys.stderr)
            return 1 if stale else 0
        for path, text in pages().items():
            files.write_text(path, text)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
