"""
Prose and code that read once: a docstring begins with what its object is or does ("Scores captions with images …"),
never with a fragment that has no noun of its own ("What …", "Of …", "Where …"), and everything public has one.
"""

import ast
from collections.abc import Iterator

import pytest
from places import ROOT

PACKAGE = ROOT / "src" / "unicoder_vl_hf"
FRAGMENTS = frozenset(
    "what of where as those that which why how from with without for in under over behind beside by on at to if when "
    "about anew see args: raises: returns: attributes:".split()
)
DOCUMENTED_ELSEWHERE = ["forward"]  # by PyTorch; where a model is a user's, `auto_docstring` writes it
AUTO_DOCSTRING = "auto_docstring"  # the decorator, which replaces the docstring of a class of models
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
MODULES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


def documented(node: ast.AST, name: str = "", public: bool = True) -> Iterator[tuple[str, ast.AST, bool]]:
    """The modules, classes and functions of a tree with their dotted names, and whether each is public."""
    if isinstance(node, DOCUMENTED):
        yield name or "<module>", node, public
    public = public and not isinstance(node, FUNCTIONS)  # a function inside a function is not
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DOCUMENTED):
            hidden = child.name.startswith("_") or child.name in DOCUMENTED_ELSEWHERE
            yield from documented(child, f"{name}.{child.name}".lstrip("."), public and not hidden)
        else:
            yield from documented(child, name, public)


def is_documented_by_decorator(node: ast.AST) -> bool:
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(text.split("(")[0] == AUTO_DOCSTRING for text in decorators)


def faults(source: str) -> list[str]:
    """One line for each public object without a docstring, and for each docstring that begins with a fragment."""
    found = []
    for name, node, public in documented(ast.parse(source)):
        docstring = ast.get_docstring(node)
        if docstring is None:
            if public and not is_documented_by_decorator(node):
                found.append(f"{name} has no docstring")
        elif docstring.split()[0].rstrip(",;").lower() in FRAGMENTS:
            found.append(f"{name} begins with a fragment: {docstring.splitlines()[0]}")
    return found


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.List) or isinstance(getattr(node, "value", None), str)


def is_truth(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare | ast.BoolOp) or ast.unparse(node).startswith(("not ", "bool("))


def riddles(source: str) -> list[str]:
    """Texts and lists times a truth value, assignments inside f-strings, and errors whose class is a conditional."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.BinOp(a, ast.Mult(), b) if (is_text(a) and is_truth(b)) or (is_truth(a) and is_text(b)):
                found.append(f"line {node.lineno}: text or list times a truth value")
            case ast.JoinedStr() if any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node)):
                found.append(f"line {node.lineno}: an assignment inside an f-string")
            case ast.Raise(ast.Call(ast.IfExp())):
                found.append(f"line {node.lineno}: an error whose class is a conditional")
    return found


SOURCES = [
    pytest.param(path.read_text(encoding="utf-8"), id=path.relative_to(ROOT).with_suffix("").as_posix())
    for path in MODULES
]


@pytest.mark.parametrize("source", SOURCES)
def test_docstrings_read_once(source):
    assert not faults(source)


@pytest.mark.parametrize("source", SOURCES)
def test_code_has_no_riddles(source):
    assert not riddles(source)


def test_faults_are_found():
    fragments = '''
"""See the others."""
class Public:
    """Of one kind."""
    @property
    def size(self): ...
    def _hidden(self): ...
    def forward(self):
        def inner(): ...
def _private():
    """What nobody calls."""
if True:
    def public(): ...
'''
    begin, lack = "begins with a fragment", "has no docstring"
    assert [fault.split(":")[0] for fault in faults(fragments)] == [
        f"<module> {begin}",
        f"Public {begin}",
        f"Public.size {lack}",
        f"_private {begin}",
        f"public {lack}",
    ]
    assert not faults('"""A module."""\ndef public():\n    """Scores captions with images."""')
    assert not faults('"""A module."""\n@auto_docstring(custom_intro="A model.")\nclass Model: ...')
    assert faults('"""A module."""\n@dataclass\nclass Plain: ...') == ["Plain has no docstring"]


@pytest.mark.parametrize(
    "source, count",
    [
        ("'s' * (count > 1)", 1),
        ("bool(found) * f'{x}'", 1),
        ("['…'] * (not rest)", 1),
        ("'#' * width", 0),
        ("f'{a if (b := c) else d}'", 1),
        ("raise (KeyError if a else ValueError)(text)", 1),
        ("raise ValueError(a if b else c)", 0),
    ],
)
def test_riddles_are_found(source, count):
    assert len(riddles(source)) == count
