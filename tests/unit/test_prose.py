"""The documentation, comments, docstrings and messages are plain English: no phrase of PHRASES occurs in them.

`python -m tests.unit.test_prose` lists every occurrence as file:line and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/*", "docs/**/*.md", "jobs/*", "ray_soup/**/*.py",
    "ray_soup/**/*.jinja", "tests/**/*.py",
)  # fmt: skip

# A phrase is a regular expression without case; a space stands for any white space, line breaks included.
PHRASES: dict[str, str] = {
    # resuming and repeating
    r"(goes|go|going|gone|went) on": "rerun the same command to resume; continues",
    r"with the same bits": "is bit-identical",
    r"anew": "recomputed, re-estimated, re-created",
    r"(asks?|asked) again": "retried with exponential backoff",
    r"(lost|tried) again and again": "gave up after 5 attempts",
    r"growing pauses": "exponential backoff",
    r"(makes?|made|making) (it|them|(the|this) (model|soup)) again": "recreates it, rebuilds it",
    r"the model again": "rebuild the model",
    r"no run\.json of one": "No run.json found. Rerun the command that creates it",
    # comparing
    r"(is|are|be|was|were|been) held against": "is compared with; baseline",
    r"hold(s|ing)? (\w+ ){0,6}against": "compares with, checks that they match",
    r"(held|holds?) to (agree|the)": "must agree with",
    # life and death of processes and storage
    r"signs? of life": "heartbeat",
    r"no sign for": "no heartbeat for",
    r"is dead, and": "is presumed dead and",
    r"its place is (taken|another's)|(took|takes?|taken) its place": "may be taken over, has been taken over",
    r"taken for dead": "presumed dead",
    r"at work": "running, using, current",
    r"(in|on|from|to|what) a storage(?! (account|backend|class|error|location|service|system|URI|volume))": "remote storage",
    r"a storage (drops|loses)": "failed requests",
    r"(strikes?|struck) (\w+ )?faults": "injects faults",
    # existence
    r"(is|are|was|were|that's) not there": "is missing, unavailable",
    r"where there (is|are|was|were) (none|no|one|several|a|an|not)": "if there is one, if available",
    r"has not (the|a|an) ": "has no",
    r"of (its|their) own folder": "relative to the recipe file",
    r"seen from": "relative to the recipe file",
    r"of one's own|of old": "your own; former",
    # quantities
    r"(\d|million|thousand|bytes of|count of|largest|its|of|in) numbers (each|in a (row|tensor|chunk)|of (a|the|an)"
    r" (block|direction|ingredient|model|parameter|tensor|vector))": "parameters, elements",
    r"[\d,]+ numbers": "parameters, elements",
    r"size in numbers|numbers a step|KB of numbers": "parameters, elements",
    r"so many": "N, that many",
    r"less than (two|three|four|five)": "fewer than",
    r"one a line|a line each": "one per line",
    r"gains the sums?": "incremented by the sums",
    r"as many of the best": "Repeat without the N best ingredients",
    r"(a|one) (column|figure|GPU|line|panel|process|row|shard|token|worker) an? \w+": "one line per method",
    r"(GB|KB|MB) an (actor|image)|a step and actor": "per actor",
    # results
    r"knows how sure": "points on the dotted line are perfectly calibrated",
    r"figures flatter|would flatter": "figures are optimistic",
    r"steer(s|ed) nothing": "was used for reporting only",
    r"came on top of": "time beyond the steps that all methods share",
    r"holds 0|proves nothing": "contains 0; the difference is not significant",
    r"best single (on|there)": "best single ingredient",
    # syntax and words
    r"(whole|complete|all of it) or (not at all|nothing)": "atomically",
    r"(is|are) told|told (about|what)": "is called with",
    r"tell whether": "Return whether",
    r"what (a|an|each|the) (actor|ingredient|method|model|run)s? (did|do|does|says)": "result, outcome, report",
    r"give (a|an|another|arrays|more|the checkpoint)": "use, specify, add",
    r"correct (the|it)": "fix, check",
    r"as (it is|they are)": "unchanged",
    r"of (no|a) known kind": "not supported",
    r"(gives?|had|has|have) the same bits": "is bit-identical",
    r"is at fault": "is wrong",
    r"still to come": "still starting",
    r"likewise": "say it",
    r"(is|are|was|were) asked of": "operations on, requirements of",
    r"depends on its arguments": "stateless apart from `begin` and `use`",
    r"(lies|lie|lay) (beside|at|there)": "is stored beside, is in",
    r"over again": "duplicates",
    r"in small": "at small scale",
    r"mend (it|them|these|this)": "fix",
    r"is no more": "has ended",
    r"what came of it|nothing came of it": "was not used",
}  # fmt: skip

OLD_NAMES: dict[str, str] = {
    "Actors": "RayPool",
    "Asked": "StepPool",
    "Bench": "Session",
    "LocalActors": "InProcessPool",
    "Made": "Mixture",
    "Ready": "SetupInfo",
    "Taken": "StoreInfo",
    "Watch": "ProgressCallback",
    "watch": "progress",
}
"""Names in Python code."""


@dataclass(frozen=True)
class Text:
    """A piece of prose in a file."""

    line: int
    text: str
    exact: bool = True
    """False if lines of the text are not lines of the file, as in a string that is put together from several."""


def prose_of_python(source: str) -> Iterator[Text]:
    """Strings (parts that Python joins count as one) and comments (lines that follow each other count as one)."""
    inner: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):  # parents come before their children
        if isinstance(node, ast.JoinedStr):
            inner.update(node.values)
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            text = node.value
        else:
            continue
        yield Text(node.lineno, text, text.count("\n") == (node.end_lineno or node.lineno) - node.lineno)
    lines: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != last + 1:
                yield Text(last - len(lines) + 1, "\n".join(lines))
                lines = []
            lines.append(token.string.lstrip("#"))
            last = token.start[0]
    if lines:
        yield Text(last - len(lines) + 1, "\n".join(lines))


def faults_of(name: str, content: str) -> list[tuple[int, str, str]]:
    """Line, phrase and what to write instead, for every occurrence in a file."""
    python = name.endswith(".py")
    uncommented = re.sub(r"^\s*#+", lambda mark: " " * len(mark[0]), content, flags=re.MULTILINE)
    texts = prose_of_python(content) if python else iter([Text(1, content if name.endswith(".md") else uncommented)])
    found = []
    for text in texts:
        for phrase, instead in PHRASES.items():
            pattern = r"\b(?:" + phrase.replace(" ", r"\s+") + ")" + ("" if phrase.endswith(" ") else r"\b")
            for hit in re.finditer(pattern, text.text, re.IGNORECASE):
                line = text.line + text.text.count("\n", 0, hit.start()) if text.exact else text.line
                found.append((line, " ".join(hit[0].split()), instead))
    if python:
        for token in tokenize.generate_tokens(io.StringIO(content).readline):
            if token.type == tokenize.NAME and token.string in OLD_NAMES:
                found.append((token.start[0], token.string, OLD_NAMES[token.string]))
    return sorted(found)


def all_faults() -> list[str]:
    """Every occurrence in the repository, a line of text for each."""
    files = sorted({file for pattern in FILES for file in ROOT.glob(pattern) if file.is_file()} - {Path(__file__)})
    return [
        f"{file.relative_to(ROOT)}:{line}: {phrase!r}; write: {instead}"
        for file in files
        for line, phrase, instead in faults_of(file.name, file.read_text())
    ]


@pytest.mark.slow
def test_the_repository_is_written_in_plain_english() -> None:
    faults = all_faults()
    assert not faults, f"{len(faults)} phrases to rewrite:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.md", "One.\nThe run goes\non from there.", [(2, "goes on")]),
        ("a.yaml", "key: value\n# gives a sign of\n# life", [(2, "sign of life")]),
        ("a.py", '"""Text.\n\nComputed anew.\n"""', [(3, "anew")]),
        ("a.py", 'x = ("it is held "\n     "against it")', [(1, "is held against")]),
        ("a.py", 'x = f"{1} goes {2} " f"goes on"', [(1, "goes on")]),
        ("a.py", "x = 1\n# it is not\n# there\n", [(2, "is not there")]),
        ("a.py", "x = 1  # it is not\n\n# there\n", []),
        ("a.py", "def anew(bench: Bench) -> None: ...", [(1, "Bench")]),
        ("a.py", 'likewise = "Made by hand"', []),
    ],
)
def test_phrases_are_found_across_lines_and_only_in_prose(name: str, content: str, expected: list[tuple[int, str]]) -> None:
    assert [(line, phrase) for line, phrase, _ in faults_of(name, content)] == expected


def main() -> int:
    """Print every occurrence; the exit code is 1 if there is one."""
    faults = all_faults()
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
