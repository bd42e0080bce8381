"""HTML reports: one page that holds all it needs, opens from a file, and reads well on screens, phones and paper.

Knows nothing of what is reported. No script, nothing from a network, no clock: the same contents give the same bytes.
All text may come from strangers, and is escaped here and nowhere else.
"""

import base64
import html
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.output import check_output, write_output

THUMBNAIL_PX = 96
_NAME_LENGTH = 60
_PIXELATED_PX = 48  # images no larger are magnified, and then show their pixels sharp
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"<?xml": "image/svg+xml", b"<svg": "image/svg+xml"}
_NUMBER = ' class="number"'
# The policy holds whatever a page says: nothing is loaded and no script runs.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""
_STYLE = Path(__file__).with_suffix(".css")


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Bar:
    """A share of 1 in a table: drawn, with its interval if it has one, and written."""

    share: float
    text: str
    interval: tuple[float, float] | None = None


Cell = str | int | Bar


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; whole numbers stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture, PNG or SVG, and what it shows."""

    picture: bytes
    caption: str


@dataclass(frozen=True)
class Thumbnail:
    """A small picture over lines of text, the first of which is its name; none where there is no picture."""

    image: Image.Image | None
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Thumbnails, side by side as there is room."""

    thumbnails: Sequence[Thumbnail]


Block = str | Notice | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the page; a string among the blocks is a paragraph."""

    heading: str
    blocks: Sequence[Block]


def render_report(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """Make the page.

    Args:
        title: of the page.
        lead: what stands above the first section.
        sections: in order; one without blocks is left out.

    Returns:
        An HTML document.

    Raises:
        ValueError: a figure is neither PNG nor SVG, or a row does not fit its table.
    """
    parts = [f"<header>\n<h1>{escaped(title)}</h1>\n{_blocks(lead)}</header>\n"]
    parts += [
        f"<section>\n<h2>{escaped(each.heading)}</h2>\n{_blocks(each.blocks)}</section>\n"
        for each in sections
        if each.blocks
    ]
    return _PAGE.format(title=escaped(title), style=_STYLE.read_text(encoding="utf-8"), body="".join(parts))


def write_report(page: str, out: Path, *, overwrite: bool = False) -> None:
    """Write a page as a whole or not at all.

    Args:
        page: what `render_report` returns.
        out: the file.
        overwrite: replace an existing one.

    Raises:
        PipelineError: it exists, or cannot be written.
    """
    check_output(out, len(page), replaceable=overwrite)
    write_output(out, page.encode())


def escaped(text: str) -> str:
    r"""Make text of any origin harmless within an element or a quoted attribute.

    Characters of HTML become references; those that control, break lines or turn the direction of writing are shown as
    Python writes them, e.g. `\u202e`, and lone surrogates, which no file can hold, too.
    """
    return html.escape("".join(repr(each)[1:-1] if _is_unruly(each) else each for each in text))


def short_name(name: str) -> str:
    """Return what a page shows of a name of any origin: its first 60 characters."""
    name = name.strip() or "(no name)"
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _is_unruly(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


def _blocks(blocks: Sequence[Block]) -> str:
    return "".join(_block(each) + "\n" for each in blocks)


def _block(block: Block) -> str:
    if isinstance(block, Notice):
        return f'<p class="notice">{_prose(block.text)}</p>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Gallery):
        return f'<div class="gallery">\n{"".join(map(_thumbnail, block.thumbnails))}</div>'
    return f"<p>{_prose(block)}</p>"


def _prose(text: str) -> str:
    return escaped(text).replace(" %", "\u00a0%")  # no line begins with a unit


def _table(table: Table) -> str:
    rows = []
    for row in table.rows:
        cells = "".join(_cell(cell) for _, cell in zip(table.columns, row, strict=True))
        rows.append(f"<tr>{cells}</tr>\n")
    # A heading stands over its column as the cells do.
    numbers = [isinstance(cell, int) for cell in table.rows[0]] if table.rows else [False] * len(table.columns)
    head = "".join(
        f'<th scope="col"{_NUMBER if number else ""}>{escaped(column)}</th>'
        for column, number in zip(table.columns, numbers, strict=True)
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody>\n</table></div>'
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return f'<td class="bar">{_bar(cell)}<span>{escaped(cell.text)}</span></td>'
    if isinstance(cell, int):
        return f"<td{_NUMBER}>{cell:,}</td>"
    return f"<td><bdi>{_prose(cell)}</bdi></td>"


def _bar(bar: Bar) -> str:
    interval = ""
    if bar.interval is not None:
        low, high = bar.interval
        interval = f'<rect class="interval" x="{100 * low:.2f}" y="3" width="{100 * (high - low):.2f}" height="2"/>'
    # A picture, for browsers print no backgrounds.
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/>'
        f'<rect class="share" width="{100 * bar.share:.2f}" height="8"/>{interval}</svg>'
    )


def _figure(figure: Figure) -> str:
    kind = next((kind for start, kind in _KINDS.items() if figure.picture.startswith(start)), None)
    if kind is None:
        raise ValueError(f"a figure begins with {figure.picture[:8]!r}, expected PNG or SVG")
    # An SVG inside <img> can neither run a script nor load anything.
    image = f'<img src="{_inline(kind, figure.picture)}" alt="{escaped(figure.caption)}">'
    return f'<figure><div class="wide">{image}</div><figcaption>{escaped(figure.caption)}</figcaption></figure>'


def _thumbnail(thumbnail: Thumbnail) -> str:
    picture = '<span class="none">no picture</span>'
    if thumbnail.image is not None:
        image = thumbnail.image.convert("RGB")
        image.info = {}
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        kind = ' class="pixels"' if max(image.size) <= _PIXELATED_PX else ""
        content = io.BytesIO()
        image.save(content, "PNG", optimize=True)
        picture = f'<img{kind} src="{_inline("image/png", content.getvalue())}" alt="">'
    lines = "".join(f"<bdi>{escaped(line)}</bdi>" for line in thumbnail.lines)
    return f"<figure>{picture}<figcaption>{lines}</figcaption></figure>\n"


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
