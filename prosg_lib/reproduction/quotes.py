"""Numbers in texts, each beside the name of its claim: `NUMBER<!--claim PROFILE NOTEBOOK NAME-->`.

Where a benchmark measured it (`benchmarks/result.py`), the word `benchmark` stands for the profile, and the benchmark's
name for the notebook's.
"""

import functools
import re
from collections.abc import Callable
from itertools import chain

from prosg_lib import paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger, notebook_files

# A number, an optional percent sign, optional closing emphasis, and the comment directly after it.
_QUOTE = re.compile(
    r"(?:(?P<number>[-+\u2212]?\d[\d,]*(?:\.\d+)?)(?P<percent>[ \u00a0\u202f]?%)?[*_]*)?"
    r"<!--\s*claim\b(?P<claim>.*?)-->",
    re.DOTALL,
)
_PAGES = ("README.md", "docs/*.md", "data/*.md", "notebooks/*.ipynb")


def check_quotes() -> list[str]:
    """Compares every `NUMBER<!--claim PROFILE NOTEBOOK NAME-->` of the checkout's texts with the ledger's reference.

    That is what the project's own prose gave, or the books where a claim needs them. A quote is right when it differs
    by no more than half a unit of its last digit; `97 %` quotes 0.97. Fenced code is no quote. Looks at README.md,
    docs/*.md, data/*.md and the Markdown cells of notebooks/*.ipynb.

    Returns:
        What is wrong, one sentence each, in the order of the files; empty when every quote is right.
    """
    expected = functools.cache(ledger.expected_claims)
    problems, root = [], paths.repo_root()
    pages = [page for pattern in _PAGES for page in sorted(root.glob(pattern))]
    for file, text in chain.from_iterable(map(notebook_files.texts, pages)):
        blanked = notebook_files.FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence.group()), text)
        for match in _QUOTE.finditer(blanked):
            if problem := _problem(match, expected):
                line = 1 + blanked.count("\n", 0, match.start())
                quoted = (match["number"] or "no number") + (match["percent"] or "")
                problems.append(f"{file}, line {line}: quotes {quoted} for `{match['claim'].strip()}`: {problem}")
    return problems


def _problem(match: re.Match[str], expected: Callable[[str, str], dict[str, ledger.Row]]) -> str | None:
    words = match["claim"].split()
    if len(words) != 3:
        return "a quote's comment is `claim PROFILE NOTEBOOK NAME`"
    if match["number"] is None:
        return "no number stands directly before the comment"
    profile, notebook, name = words
    try:
        entry = expected(notebook, profile).get(name)
    except UserError as error:
        return str(error)
    if entry is None:
        return f"expected/{notebook}.{profile}.json has no claim of that name"
    reference = (100 if match["percent"] else 1) * ledger.reference(entry)["reference"]
    digits = match["number"].replace(",", "").replace("\u2212", "-")
    half_unit = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    if abs(float(digits) - reference) > half_unit * (1 + 1e-9) + 1e-12 * abs(reference):
        return f"the ledger has {reference:.6g}{match['percent'] or ''}; correct the text, or measure again"
    return None
