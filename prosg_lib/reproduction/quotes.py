"""Numbers in texts, each beside the name of its claim: `NUMBER<!--claim PROFILE NOTEBOOK NAME-->`.

Where a benchmark measured it (`benchmarks/result.py`), the word `benchmark` stands for the profile, and the benchmark's
name for the notebook's.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prosg_lib import paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims

# A number, an optional percent sign, optional closing emphasis, and the comment right behind.
_QUOTE = re.compile(
    r"(?:(?P<number>[-+\u2212]?\d[\d,]*(?:\.\d+)?)(?P<percent>[ \u00a0\u202f]?%)?[*_]*)?"
    r"<!--\s*claim\b(?P<claim>.*?)-->",
    re.DOTALL,
)
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class QuoteProblem:
    """A quoted number that the ledger does not bear out."""

    file: str
    line: int
    quoted: str
    claim: str
    ledger: float | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: quotes {self.quoted or 'no number'} for `{self.claim}`: {self.reason}"


def check_quotes(root: Path | None = None) -> list[QuoteProblem]:
    """Compares every `NUMBER<!--claim PROFILE NOTEBOOK NAME-->` of a checkout's texts with the ledger's reference.

    A quote is right when it differs by no more than half a unit of its last digit; `97 %` quotes 0.97. Fenced code is
    no quote. Looks at README.md, data/*.md and the Markdown cells of notebooks/*.ipynb.

    Args:
        root: the checkout; this one where None.
    Returns:
        What is wrong, in the order of the files; empty when every quote is right.
    """
    root = Path(root) if root is not None else paths.repo_root()
    problems = []
    for name, first_line, text in _texts(root):
        blanked = _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence.group()), text)
        for match in _QUOTE.finditer(blanked):
            line = first_line + blanked.count("\n", 0, match.start())
            problems += _check_quote(root, name, line, match)
    return problems


def _texts(root: Path) -> Iterable[tuple[str, int, str]]:
    """(file or file and cell, number of the first line, text) of everything that may quote."""
    for path in [root / "README.md", *sorted((root / "data").glob("*.md"))]:
        if path.is_file():
            yield str(path.relative_to(root)), 1, path.read_text(encoding="utf-8")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "markdown":
                yield f"{path.relative_to(root)}, cell {index}", 1, "".join(cell["source"])


def _check_quote(root: Path, file: str, line: int, match: re.Match[str]) -> list[QuoteProblem]:
    number, percent, claim = match["number"], match["percent"] or "", match["claim"].strip()

    def problem(reason: str, ledger: float | None = None) -> list[QuoteProblem]:
        return [QuoteProblem(file, line, (number or "") + percent, claim, ledger, reason)]

    words = claim.split()
    if len(words) != 3:
        return problem("a quote's comment is `claim PROFILE NOTEBOOK NAME`")
    if number is None:
        return problem("no number stands directly before the comment")
    profile, notebook, name = words
    try:
        entry = claims.expected_claims(notebook, profile, root / "expected").get(name)
    except UserError as error:
        return problem(str(error))
    if entry is None or "reference" not in entry:
        return problem(f"expected/{notebook}.{profile}.json has no reference value of that name")
    scale = 100 if percent else 1
    digits = number.replace(",", "").replace("\u2212", "-")
    half_unit = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    reference = scale * entry["reference"]
    if abs(float(digits) - reference) > half_unit * (1 + 1e-9) + 1e-12 * abs(reference):
        shown = f"{reference:.6g}{' %' if percent else ''}"
        return problem(f"the ledger has {shown}; correct the text, or measure again", entry["reference"])
    return []
