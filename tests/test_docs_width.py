"""No line of code on the site is cut at its right, on a screen that is wide enough for the site's full column."""

from pathlib import Path

import pytest

from test_docs import PAGES, blocks

#: The characters of code that a column of the site holds.
COLUMN = 88


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_code_fits_into_the_column(page: Path):
    code = [block for block in blocks(page) if not block.info.startswith("{")]
    assert [f"{b}: {line}" for b in code for line in b.text.splitlines() if len(line) > COLUMN] == []
