"""
What the site has beside docs/: README as its first page, the other pages of the root, files that pages link to, and a
page of the API for each room, of the names in its stub. Links that work on GitHub are made to work here.
"""

import ast
import functools
import importlib
import inspect
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "unicoder_vl_hf"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {"SECURITY.md": "security.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
IN_DOCSTRING = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
TYPE = re.compile(r"^( *[\w, *]+ \()(.+?)(?=\):)", re.MULTILINE)  # of an argument: shown as code, default beside it
NAMES = re.compile(r"^ +\w+(?:, \w+)+(?=(?: \(.+\))?: )", re.MULTILINE)  # several arguments of one description
NOT_OF_TYPE = re.compile(r"[`*]|, defaults? to.*")
RAISED = re.compile(r"^( +)`(\w+)`(?=: )", re.MULTILINE)
# transformers completes these docstrings when they are imported, with a line or two that say nothing here.
WRITTEN = re.compile(r"(unicoder_vl_hf\.(?:configuration|modeling)_unicoder_vl)\.(UnicoderVL\w+(?:\.forward)?)")
NOT_OURS = re.compile(
    r"^This is the configuration class.*?\n\n|^The \[.*?special method\.\s*<Tip>.*?</Tip>\s*", re.DOTALL
)


def rooms() -> dict[str, list[str]]:
    """Gives the names that each room offers first: one that the package offers is not told again."""
    told, found = set(), {}
    for stub in sorted(PACKAGE.rglob("__init__.pyi"), key=lambda path: (len(path.parts), path)):
        imports = [node for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in imports if node.module for alias in node.names if alias.name not in told]
        told |= set(names)
        found[".".join(stub.parent.relative_to(PACKAGE.parent).parts)] = [n for n in names if not n.startswith("__")]
    return {room: names for room, names in found.items() if names}


def in_site(path: str) -> str:
    """Gives the place in the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    place = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}.md"
    return f"{place}/index.md" if (ROOT / path).is_dir() else place


def in_repository(page: File) -> str:
    """Gives the file of the repository that a page of the site is made of."""
    return {place: path for path, place in PAGES.items()}.get(page.src_uri, f"docs/{page.src_uri}")


def on_config(config):
    """Names the pages of the API, which no list has to be kept of."""
    (reference,) = [entry for entry in config.nav[-1]["Reference"] if isinstance(entry, dict)]
    reference["API"] = [f"api/{room}.md" for room in rooms()]


def on_files(files, config):
    """Adds the pages that docs/ does not have."""
    pages = [(f"docs/{page.src_uri}", page.content_string) for page in files.documentation_pages()]
    pages += [(path, (ROOT / path).read_text("utf-8")) for path in PAGES]
    contents = {PAGES[path]: text for path, text in pages if path in PAGES}
    for path, text in pages:
        for target in LINK.findall(text):
            linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if (ROOT / linked).is_dir():
                names = sorted(file.name for file in (ROOT / linked).iterdir())
                contents[in_site(linked)] = f"# {linked}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
            elif not linked.startswith("docs/") and linked not in PAGES:
                language = "python" if linked.endswith(".py") else "text"
                contents[in_site(linked)] = f"# `{linked}`\n\n```{language}\n{(ROOT / linked).read_text('utf-8')}```\n"
    for room, names in rooms().items():
        entries = "\n\n".join(f"::: {room}.{name}" for name in names)
        contents[f"api/{room}.md"] = f"# {room}\n\n{inspect.cleandoc(docstring_of(room))}\n\n{entries}\n"
    for place, content in contents.items():
        files.append(File.generated(config, place, content=content))
    return files


def docstring_of(room: str) -> str:
    """Gives what a room's module says of itself."""
    path = PACKAGE.parent.joinpath(*room.split("."), "__init__.py")
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def on_page_markdown(markdown, page, config, files):
    """Leads links to where the pages of the repository are in the site."""
    folder = posixpath.dirname(in_repository(page.file))

    def lead(match: re.Match) -> str:
        target = in_site(posixpath.normpath(posixpath.join(folder, match[1])))
        return f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}"

    return markdown if page.file.generated_by and page.file.src_uri not in PAGES.values() else LINK.sub(lead, markdown)


class Docstrings(griffe.Extension):
    """Takes docstrings in the manner of transformers, and those of models and configuration as it completes them."""

    def on_object(self, *, obj, **_):
        if found := WRITTEN.fullmatch(obj.path):
            whole = functools.reduce(getattr, found[2].split("."), importlib.import_module(found[1]))
            text = NOT_OURS.sub("", inspect.cleandoc(whole.__doc__ or ""))
            options = {"warnings": False}
            obj.docstring = griffe.Docstring(text, parent=obj, parser="google", parser_options=options)
        if obj.docstring is not None:
            text = TYPE.sub(lambda match: match[1] + NOT_OF_TYPE.sub("", match[2]), obj.docstring.value)
            text = NAMES.sub(lambda match: match[0].replace(", ", ",\u00a0"), text)  # a name ends at the first blank
            text = RAISED.sub(r"\1\2", text).replace("](../", "](https://huggingface.co/docs/transformers/")
            obj.docstring.value = IN_DOCSTRING.sub(self._link, text)

    def _link(self, match: re.Match) -> str:
        room = public().get(match[1].partition(".")[0])
        return f"[`{match[1]}`][{room}.{match[1]}]" if room else f"`{match[1]}`"


@functools.cache
def public() -> dict[str, str]:
    return {name: room for room, names in rooms().items() for name in names}
