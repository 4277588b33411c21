"""Reports: a few lines for the terminal, and one HTML file with tables and pictures inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from pangu_tiny.workdir import write_atomically


class Report(NamedTuple):
    """What a stage tells: facts, on the terminal and on a page, and sections of the page alone.

    Attributes:
      facts: what they are of → what they are.
      warnings: whole lines.
      sections: HTML.
    """

    title: str
    facts: dict[str, str]
    warnings: Sequence[str] = ()
    sections: Sequence[str] = ()

    def text(self) -> str:
        """A line for each fact and warning."""
        width = max(12, *map(len, self.facts))
        return "\n".join(
            [*(f"  {name:<{width}} {fact}" for name, fact in self.facts.items()), *self.warnings]
        )

    def write(self, folder: epath.Path) -> None:
        """Writes report.html."""
        told = (table(self.facts.items()), *map(paragraph, self.warnings), *self.sections)
        write_atomically(folder / "report.html", page(self.title, *told))


def page(title: str, *sections: str) -> str:
    """A whole HTML page."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto;
  padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .2rem 1rem .2rem 0; vertical-align: top; text-align: left }}
pre {{ background: #f4f4f4; padding: 1rem; white-space: pre-wrap }}
img, svg {{ max-width: 100%; height: auto }}
</style>
<h1>{html.escape(title)}</h1>
{"".join(sections)}
</html>
"""


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it, in HTML."""
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table of cells, written as they print."""

    def line(cells: Sequence[object], kind: str) -> str:
        written = (f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)
        return f"<tr>{''.join(written)}</tr>"

    lines = [line(head, "th")] if head else []
    return f"<table>{''.join(lines + [line(row, 'td') for row in rows])}</table>"


def picture(figure: Figure, description: str) -> str:
    """A figure as a PNG inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def vector(figure: Figure) -> str:
    """A figure as SVG, the same text each time it is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": "pangu_tiny", "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]
