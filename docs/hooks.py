"""What the site adds to the pages in this folder, so that these can be read as they are, on GitHub too.

* Pages from elsewhere in the repository (README.md is the first page), and the reference (reference.py).
* A page for each file of source code that a page links to.
* Links between all of these, which in the files are relative to their places in the repository.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Places in the repository, and those in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(\]\()(?!https?:|mailto:)([^)#\s]+)((?:#[^)]*)?\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in this folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    reference = importlib.import_module("reference")
    for place, text in reference.pages().items():
        files.append(File.generated(config, place, content=text))
    todo = [
        *ELSEWHERE,
        *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None),
    ]
    done: dict[str, str] = {}
    while todo:
        path = todo.pop()
        if site_place(path) not in done:
            done[site_place(path)] = path
            if not path.startswith("docs/"):
                files.append(File.generated(config, site_place(path), content=text_of(path)))
            todo += [target for target in linked(path) if not target.startswith("docs/")]
    config["extra"]["sources"] = done
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where their targets are in the site."""
    path = config["extra"]["sources"].get(page.file.src_uri)
    if path is None:
        return markdown
    if "\n## " not in markdown:  # the room of a table of contents is for the page's tables
        page.meta["hide"] = ["toc"]
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        place = site_place(target_of(path, link[2]))
        return f"{link[1]}{posixpath.relpath(place, here or '.')}{link[3]}"

    return LINK.sub(moved, unescaped(deeper(markdown)))


def target_of(path: str, link: str) -> str:
    """The file that a link in the file `path` leads to; of a folder its README, if it has one."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    inside = f"{target}/README.md"
    return inside if (ROOT / inside).is_file() else target


def linked(path: str) -> list[str]:
    """The files and folders that the page `path` links to."""
    if not path.endswith(".md"):
        return []
    return [target_of(path, link) for _, link, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8"))]


def site_place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return ELSEWHERE.get(path) or f"source/{path.removesuffix('.md')}.md"


def text_of(path: str) -> str:
    """The page of a file or folder outside of docs/."""
    file = ROOT / path
    if path.endswith(".md"):
        return file.read_text(encoding="utf-8")
    hidden = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if file.is_dir():
        return hidden + "".join(
            f"* `{inside.name}`\n" for inside in sorted(file.iterdir()) if inside.name[0] not in "_."
        )
    return hidden + f"``````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}``````\n"


def unescaped(markdown: str) -> str:
    """In the code of a table a bar stands for itself here; GitHub wants a backslash before it."""
    code = re.compile(r"`[^`\n]+`")
    rows = (code.sub(lambda found: found[0].replace("\\|", "|"), line) for line in markdown.split("\n"))
    return "\n".join(rows)


def deeper(markdown: str) -> str:
    """What belongs to an item of a numbered list indented by four spaces, as the site's Markdown wants it.

    On GitHub three are enough; nor does an item need an empty line before it there, as it does here after a table.
    """
    lines: list[str] = []
    inside = False
    for line in markdown.split("\n"):
        if line and not line.startswith(" "):
            item = re.match(r"\d+\. ", line) is not None
            if inside and item and lines[-1]:
                lines.append("")
            inside = item
        lines.append(f" {line}" if inside and line.startswith("   ") else line)
    return "\n".join(lines)
