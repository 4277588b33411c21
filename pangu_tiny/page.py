"""Reports as one HTML file each, with tables and pictures inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure


def page(title: str, *sections: str) -> str:
    """A whole HTML page."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem 1rem .2rem 0; vertical-align: top; text-align: left }}
pre {{ background: #f4f4f4; padding: 1rem; white-space: pre-wrap }} img {{ max-width: 100% }}
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
