"""What MkDocs adds to the pages of this folder: config keys from configs.yaml, and files of the
repository outside this folder that pages link to.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FILES = "repository"  # folder of the site for files from outside docs/
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
CONFIG = """# Config keys

Every key with its default, as `configs.yaml` has it: `--key value` or `--group.key value` on the
command line. The sentences are the schema: values that they exclude are refused.
"""


def target(page: str, link: str) -> Path | None:
    """The file of the repository outside docs/ that ``link`` of the page ``page`` means; None for
    any other link.
    """
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = (DOCS / page).parent.joinpath(link).resolve()
    outside = path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
    return path if outside and path.is_file() else None


def config_page() -> str:
    """The defaults, a table for each group."""
    sys.path.insert(0, str(ROOT))
    import tools

    sentences, groups = tools.sentences(), {}
    for key, value in tools.load_config([], {}).flat().items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        sentence = sentences[f"defaults.{key}"].replace("|", "\\|")
        row = f"| `{key}` | {f'`{shown}`' if shown else ''} | {sentence} |"
        groups.setdefault(key.rpartition(".")[0], []).append(row)
    lines = [CONFIG]
    for name, rows in groups.items():
        title = f"`{name}`" if name else "The run"
        lines += [f"\n## {title}\n", "| key | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def presets_table() -> str:
    import tools

    rows = ["## All presets\n", "| preset | |", "|---|---|"]
    for name, sentence in tools.sentences().items():
        if "." not in name and name != "defaults":
            rows.append(f"| `{name}` | {sentence} |")
    return "\n".join(rows) + "\n"


def on_config(config):
    pages = [f"decisions/{path.name}" for path in sorted(DOCS.glob("decisions/*.md"))]
    for section in config.nav:
        for entry in section.get("Explanation", []) if isinstance(section, dict) else []:
            if isinstance(entry, dict) and "Decisions" in entry:
                entry["Decisions"] = pages
    return config


def on_files(files, config):
    files.append(File.generated(config, "config.md", content=config_page()))
    outside = set()
    for file in list(files.documentation_pages()):
        for link in LINK.findall(file.content_string):
            if path := target(file.src_uri, link):
                outside.add(path)
    for path in sorted(outside):
        name = f"{FILES}/{path.relative_to(ROOT)}"
        name += ".txt" if path.suffix == ".md" else ""  # as it is, not as a page of this site
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "presets.md":
        markdown += "\n" + presets_table()
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(match):
        path = target(page.file.src_uri, match[1])
        if path is None:
            return match[1]
        name = f"{FILES}/{path.relative_to(ROOT)}{'.txt' if path.suffix == '.md' else ''}"
        return posixpath.relpath(name, folder or ".")

    return LINK.sub(rewrite, markdown)
