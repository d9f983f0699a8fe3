"""What a model with a window still answers about prompts that have left it: as people write them, and others.

python docs/natural_prompts.py                                           # the plain model: in view, and gone
python docs/natural_prompts.py --window 0 --methods base                 # everything in view
python docs/natural_prompts.py --generator smollm2-token --distance 0 512 2048
python docs/natural_prompts.py --generator smollm2-token --about values          # open-world dialogues, new values
python docs/natural_prompts.py --generator smollm2-token --about passages        # XQuAD's, in PROSG_TEST_DATA

Every answer is kept in runs/natural.jsonl.gz, and the losses of prose behind each prompt, and of conversation where
chitchat-dataset is installed, in runs/natural_losses.jsonl.gz (--out). The split is the validation one unless you say
otherwise: what is chosen on the test split means nothing there.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from prosg_lib import files
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.precision import in_fastest_precision
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import conversation_recall, predictions
from prosg_lib.tasks import conversations
from prosg_lib.tasks.conversations import READING, Conversation
from prosg_lib.text import chitchat
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.training.checkpoints import load_generator

PROFILE = get_profile("cpu")
WINDOW = PROFILE.conversations.window
PLAIN, WITH = ("none", "base", "repeated"), ("prosg-token", "wrong", "alone", "wrong-alone")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall of prompts that have left a window, by method and distance.")
    parser.add_argument("--model", default="smollm2", help="as load_model takes it (default: smollm2)")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"tokens that it sees; 0: all (default: {WINDOW})")
    parser.add_argument("--generator", help="token-wise: a shipped name or a file")
    parser.add_argument("--static", help="the control: a shipped name or a file")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--about", default="natural", choices=conversations.SOURCES, help="(default: natural)")
    parser.add_argument("--prompts", type=int, default=120, help="at most (default: 120)")
    parser.add_argument("--distance", type=int, nargs="+", default=[0, 512], help="tokens of filler (default: 0 512)")
    parser.add_argument("--filler", default="prose", choices=("prose", "conversation"), help="(default: prose)")
    parser.add_argument("--methods", nargs="+", help="default: all that the generators allow")
    parser.add_argument("--chat", action="store_true", help="in the model's chat template (default: Text, Question)")
    parser.add_argument("--prose", type=int, default=256, help="tokens that losses are measured on; 0: none")
    parser.add_argument("--out", default="runs/natural", help="begins the files' names (default: runs/natural)")
    return parser.parse_args()


def said_of(chosen: argparse.Namespace, lm: LanguageModel) -> list[Conversation]:
    """What is asked about. A plain model has to see a passage, the examples and the question at once."""
    tokenizer = lm.needed_tokenizer()
    found = conversations.load(chosen.about, chosen.split, tokenizer, PROFILE)
    if chosen.about == "passages":
        room = WINDOW - len(tokenizer.encode(READING.opening))
        found = (one for one in found if conversations.fits(one, tokenizer, READING, room))
    return list(islice(found, chosen.prompts))


def main() -> None:
    chosen = options()
    files.check_writable(Path(chosen.out).parent, "--out")
    lm = load_model(chosen.model, chosen.window or None)
    lm = in_fastest_precision(lm if chosen.window else lm.with_kv_cache()).requires_grad_(False)
    trained = {"token": chosen.generator, "static": chosen.static}
    generators = {kind: load_generator(name, lm) for kind, name in trained.items() if name}
    methods = [*PLAIN, *(WITH if chosen.generator else ()), *(("static",) if chosen.static else ())]
    methods = chosen.methods or methods
    texts = {"prose": load_prose()}
    if chosen.filler == "conversation" or chitchat.source():
        texts["conversation"] = chitchat.load_conversations()
    texts = {kind: ProseTokens.of(text, chosen.split, lm.needed_tokenizer()) for kind, text in texts.items()}
    form, said = conversations.chat(lm.needed_tokenizer()) if chosen.chat else READING, said_of(chosen, lm)
    common = {"about": chosen.about, "form": "chat" if chosen.chat else "reading", "window": chosen.window}

    rows = conversation_recall.answers(lm, generators, methods, said, texts[chosen.filler], chosen.distance, form)
    predictions.write_rows(f"{chosen.out}.jsonl.gz", rows.assign(filler=chosen.filler, **common).to_dict("records"))
    print(conversation_recall.table(conversation_recall.judged(rows)).round(3).to_markdown(index=False))
    kept = []
    for method in methods if chosen.prose else ():
        for kind, text in texts.items():
            losses = conversation_recall.prose_losses(lm, generators, method, said, text, chosen.prose, form)
            kept.append({"method": method, "text": kind, **common, "losses": losses.round(4).tolist()})
            print(f"perplexity of {kind}, {method}: {np.exp(losses.mean()):.2f}", flush=True)
    if kept:
        predictions.write_rows(f"{chosen.out}_losses.jsonl.gz", kept)
    if chosen.prose and len(texts) == 1:
        print(f"perplexity of conversation: not measured; {chitchat.INSTALL}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
