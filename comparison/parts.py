"""Parts of pages: what a section is made of, and one look for all pages of this project."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as iio
import jinja2
import numpy as np


@dataclass
class Table:
    """Cells are text; the first column names the row. ``prose``: cells are sentences that wrap."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    prose: bool = False


@dataclass
class Strip:
    """Rows of small pictures, all with as many tiles, and what each row and column is."""

    title: str
    rows: list[tuple[str, str]]  # label, data URI
    columns: list[str] = field(default_factory=list)
    tiles: int = 1
    note: str = ""


@dataclass
class Section:
    """Paragraphs, then warnings, lists, figures (inline SVG), strips and tables. ``folded``: only
    its title shows at first.
    """

    title: str
    text: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pre: list[str] = field(default_factory=list)
    folded: bool = False


def render(
    kind: str,
    title: str,
    headline: str,
    legend: Mapping[str, str],
    sections: Sequence[Section],
) -> str:
    """The page as "html", which opens offline and asks for nothing else, or as "md".

    legend: {name: colour}.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: "html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(f"page.{kind}")
    return page.render(title=title, headline=headline, legend=legend, sections=sections)


def png(image: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI."""
    return (
        "data:image/png;base64,"
        + base64.b64encode(iio.imwrite("<bytes>", image, extension=".png")).decode()
    )
