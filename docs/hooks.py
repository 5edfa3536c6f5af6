"""Hooks of MkDocs: the site also has the pages and files of the repository that the pages in docs/ link to.

On the site, docs/ is the root, and every other file keeps its path in the repository. Links are written as they
work in the repository; `on_page_markdown` turns them into links of the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "examples/*", "tests/e2e/settings/*.txt")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that are part of the site."""
    for pattern in FROM_REPOSITORY:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file():
                name = file.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    in_repository = here if (ROOT / here).exists() and not (ROOT / "docs" / here).exists() else f"docs/{here}"

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link[1]))
        relative = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here) or ".")
        return f"]({relative}{link[2] or ''})"

    return LINK.sub(on_site, markdown)
