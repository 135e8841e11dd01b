"""What the documentation shows runs, and what it links to is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    (f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 2}", match[1])
    for page in PAGES
    for match in re.finditer(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
]


def test_there_are_snippets():
    assert {"README.md", "api.md"} <= {place.split(":")[0] for place, _ in SNIPPETS}


@pytest.mark.parametrize("code", [pytest.param(code, id=place) for place, code in SNIPPETS])
def test_snippets_run(code):
    if "from transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(((?!https?:)[^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_picture_is_what_the_package_gives():
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_dynamic_mask.py"))
    assert drawing["PICTURE"].read_text() == drawing["picture"]()
