"""Run by mkdocs: writes the page of the command line from the commands themselves."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """The page api/cli.md, with every command and its options in place of the marker."""
    if page.file.src_uri != "api/cli.md":
        return markdown
    from typer import Context
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from uvg_engine.cli import app

    command = get_command(app)
    told = get_docs_for_click(obj=command, ctx=Context(command, info_name="uvg"), name="uvg", indent=1)
    return markdown.replace("<!-- docs/hooks.py writes the commands here -->", told)
