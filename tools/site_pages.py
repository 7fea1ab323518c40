"""Pages of the site from outside docs/: the README as its first page, the commands' help, and files that pages link to.

A hook of MkDocs (`hooks` in mkdocs.yml). Pages link to each other, and to other files, as they lie in the repository.
This module turns links that leave docs/ into links of the site, and puts the files they name into it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Pages of the site that lie outside of docs/.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
COMMANDS = "reference/commands.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS, content=help_of_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    from mkdocs.structure.files import File

    def add(path: str) -> None:
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))

    return with_links_of_the_site(markdown, page.file.src_uri, add)


def with_links_of_the_site(markdown: str, page: str, add: Callable[[str], None]) -> str:
    """A page's text, with its links rewritten for the site.

    Args:
        page: path of the page in the site.
        add: called with every file of the repository that the page links to and that is not in docs/.
    """
    sources = {place: name for name, place in PAGES.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif target in PAGES:
            place = PAGES[target]
        else:
            place = target
            add(target)
        return posixpath.relpath(place, posixpath.dirname(page) or ".")

    return LINK.sub(moved, markdown)


def help_of_commands() -> str:
    """The help of every command as a page."""
    from logo.cli.app import app

    made: str = app.generate_docs(output_format="markdown", recursive=True)
    return made.replace("#logo-install-completion", "#logo---install-completion")  # as the site calls that heading
