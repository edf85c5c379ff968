"""Programs write their own part of a page and nothing else."""

import pytest

from bench.pages import with_part, write_part

PAGE = "one\n<!-- a: begin -->\nold\n<!-- a: end -->\ntwo\n<!-- b: begin -->\nkept\n<!-- b: end -->\n"


def test_only_the_part_that_is_named_is_written_anew():
    assert with_part(PAGE, "a", "new") == PAGE.replace("old", "new")
    assert with_part(PAGE, "b", "new") == PAGE.replace("kept", "new")


@pytest.mark.parametrize("page", ["one", PAGE.replace("<!-- a: end -->", ""), ""])
def test_a_page_without_the_marks_is_refused(page):
    with pytest.raises(ValueError, match=r"^page must have the marks <!-- a: begin --> and end, got "):
        with_part(page, "a", "new")


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_part(page, "a", "new")
    assert page.read_text() == PAGE.replace("old", "new")
    with pytest.raises(ValueError, match="page must have the marks"):
        write_part(page, "c", "new")
    assert page.read_text() == PAGE.replace("old", "new") and list(tmp_path.iterdir()) == [page]
