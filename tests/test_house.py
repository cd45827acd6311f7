"""The shape of the code, counted, so that it stays: files, imports, constructors, `Any`, comments.

Three bounds are ratchets: lower `MOST_ANY` and `MOST_NESTED`, and raise `LEAST_COMMENTS`, when the code gets better.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_rlhf"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

MOST_LOOSE_FILES = 8
MOST_ARGUMENTS = 12
MANY_ARGUMENTS, MOST_WITH_MANY = 10, 3
MOST_POSITIONAL = 4

MOST_ANY = 145
"""Uses of the name `Any`."""
MOST_NESTED = 0.14
"""Comprehensions that hold another one, or have two ``for``, per 100 lines of code."""
LEAST_COMMENTS = 4.4
"""Lines of comment per 100 lines of code."""


@dataclass(frozen=True)
class Source:
    """A file of the package or of callbacks/.

    Args:
        path: relative to the root of the project.
        module: name under which it is imported.
        text: its content.
        tree: its syntax tree.
    """

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is an ``__init__.py``."""
        return self.path.endswith("__init__.py")


@cache
def sources() -> list[Source]:
    """Files of the package and of callbacks/, which the package holds as a link."""
    own = [path for path in PACKAGE.rglob("*.py") if not any(part.is_symlink() for part in (path, *path.parents))]
    found = []
    for path in sorted(own) + sorted((ROOT / "callbacks").rglob("*.py")):
        relative = path.relative_to(ROOT)
        parts = relative.with_suffix("").parts
        if parts[0] == "callbacks":
            parts = ("lightning_rlhf", *parts)
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Source(str(relative), module, text, ast.parse(text)))
    return found


def test_few_files_lie_loose_in_the_package() -> None:
    loose = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(loose) <= MOST_LOOSE_FILES, f"{len(loose)} loose files, at most {MOST_LOOSE_FILES}: {', '.join(loose)}"


def test_modules_do_not_import_in_circles() -> None:
    known = {source.module for source in sources()}
    circles = cycles({source.module: imports_of(source, known) for source in sources()})
    assert not circles, "import circles: " + "; ".join(" <-> ".join(circle) for circle in circles)


def test_constructors_have_few_arguments() -> None:
    counts = dict(constructors())
    long = {name: count for name, count in counts.items() if count > MOST_ARGUMENTS}
    assert not long, f"constructors with more than {MOST_ARGUMENTS} arguments: {long}"
    many = {name: count for name, count in counts.items() if count > MANY_ARGUMENTS}
    assert len(many) <= MOST_WITH_MANY, f"constructors with more than {MANY_ARGUMENTS} arguments: {many}"


def test_constructors_hand_arguments_over_by_name() -> None:
    found = []
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
                positional = sum(not isinstance(argument, ast.Starred) for argument in node.args)
                if positional > MOST_POSITIONAL:
                    found.append(f"{source.path}:{node.lineno}")
    assert not found, f"super().__init__ with more than {MOST_POSITIONAL} positional arguments: {', '.join(found)}"


def test_any_becomes_rarer() -> None:
    counts: Counter[str] = Counter()
    for source in sources():
        counts[source.path] = sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(source.tree))
    assert counts.total() <= MOST_ANY, f"{counts.total()} uses of Any, at most {MOST_ANY}; most in {top(counts)}"


def test_nested_comprehensions_become_rarer() -> None:
    counts: Counter[str] = Counter()
    for source in sources():
        counts[source.path] = sum(is_nested(node) for node in ast.walk(source.tree))
    share = 100 * counts.total() / sum(map(lines_of_code, sources()))
    assert share <= MOST_NESTED + 0.005, (
        f"{share:.2f} nested comprehensions per 100 lines of code, at most {MOST_NESTED}; most in {top(counts)}"
    )


def test_comments_become_more() -> None:
    comments = {source.path: lines_of_comment(source) for source in sources()}
    code = {source.path: lines_of_code(source) for source in sources()}
    ratio = 100 * sum(comments.values()) / sum(code.values())
    bare = Counter({path: lines for path, lines in code.items() if not comments[path]})
    assert ratio >= LEAST_COMMENTS - 0.05, (
        f"{ratio:.1f} lines of comment per 100 lines of code, at least {LEAST_COMMENTS}; none in {top(bare)}"
    )


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert sorted(cycles(graph)) == [["a", "b", "c"], ["e", "f"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# -- counting ----------------------------------------------------------------------------------------------------------


def top(counts: Counter[str]) -> str:
    """The five files with the largest counts."""
    return ", ".join(f"{path} ({count})" for path, count in counts.most_common(5))


def constructors() -> Iterator[tuple[str, int]]:
    """Constructors and their numbers of arguments."""
    for source in sources():
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                    arguments = member.args.posonlyargs + member.args.args + member.args.kwonlyargs
                    yield f"{source.path}:{node.name}", len(arguments) - 1


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension has two ``for`` or holds another comprehension."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS) and child is not node]
    return bool(inner) or len(node.generators) > 1


def lines_of_comment(source: Source) -> int:
    """Lines that are a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    return sum(token.type == tokenize.COMMENT and token.line.strip().startswith("#") for token in tokens)


def lines_of_code(source: Source) -> int:
    """Lines without docstrings, comments and empty lines."""
    docstrings: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(map(str.strip, source.text.split("\n")), 1)
    return sum(bool(line) and not line.startswith("#") and number not in docstrings for number, line in lines)


def imports_of(source: Source, known: set[str]) -> set[str]:
    """Modules of ours that a module imports, also inside functions; ``if TYPE_CHECKING`` is left out."""
    skipped: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(child) for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = source.module.split(".")
                above = parents[: len(parents) - node.level + source.is_package]
                base = ".".join([*above, base]).strip(".")
            for alias in node.names:
                # ``from package import module`` or ``from module import name``
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return {module for module in found if module in known and module != source.module}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted({node} | {other for other in reach[node] if node in reach[other]}))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Nodes at the end of a path from a node."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(graph[node])
    return found
