"""Pages of docs/ of which a part is written by a program: it lies between two marks and is replaced as a whole."""

from __future__ import annotations

from pathlib import Path

from uvg_engine.files import replacing


def write_part(path: Path, name: str, text: str) -> None:
    """`with_part` of the page at `path`, written whole or not at all."""
    page = with_part(path.read_text(), name, text)
    with replacing(path) as temporary:
        temporary.write_text(page)


def with_part(page: str, name: str, text: str) -> str:
    """The page with what stands between `<!-- name: begin -->` and `<!-- name: end -->` replaced by `text`.

    Raises ValueError where it has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"page must have the marks <!-- {name}: begin --> and end, got {page[:80]!r}")
    return f"{before}{begin}{text}\n{end}{after}"
