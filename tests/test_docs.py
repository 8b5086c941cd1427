"""The documentation: its code runs, its links lead somewhere, it names all that is public."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from inputs import extended
from test_structure import SOURCES

import sanm_kernels
import sanm_train
from sanm_kernels import compat

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
SITE = ROOT / "build/docs/html"
#: Those of training.md register a recipe: tests/train/test_recipes.py runs them.
WITH_CODE = [p for p in PAGES if "```python\n" in p.read_text() and p.name != "training.md"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_code_runs(page: Path) -> None:
    """The blocks of a page one after another: later ones may use names of earlier ones."""
    names = {"__name__": "docs"}
    for block in code(page):
        exec(compile(block, relative(page), "exec"), names)


def test_there_is_code_to_run() -> None:
    found = {page.name: len(code(page)) for page in WITH_CODE}
    assert found["README.md"] >= 2 and found["index.md"] >= 4


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(<?([^()\s>]+)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """What the page's headings are called in links, on the forge and by MyST."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", t).strip().lower() for t in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def assert_well_formed(link: str) -> None:
    parts = urlsplit(link)
    assert parts.scheme in ("https", "mailto"), link
    assert parts.scheme == "mailto" or re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_the_sources_lead_somewhere(page: Path) -> None:
    """As the forge shows them. Links to elsewhere are not followed: they are well formed."""
    for link in links(page):
        if urlsplit(link).scheme:
            assert_well_formed(link)
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}: {relative(target)} has {anchors(target)}"


def test_there_are_links_to_follow() -> None:
    found = [link for page in PAGES for link in links(page)]
    assert len(found) > 20 and any("#" in link for link in found)


class Page(HTMLParser):
    """What a built page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" or "src" in given:
            self.loads.append(given.get("src") or given.get("href", ""))


@pytest.mark.skipif(not SITE.is_dir(), reason="the pages are not built: make docs")
def test_built_pages_lead_somewhere_and_load_nothing_from_elsewhere() -> None:
    pages = {path: Page(path) for path in SITE.rglob("*.html")}
    assert {"index.html", "api.html", "method.html"} <= {path.name for path in pages}
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                assert link in page.links, f"{path.name} loads {link}"
                assert_well_formed(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", sheet.read_text()), sheet


def public_names() -> Iterator[str]:
    for module in (sanm_kernels, sanm_train):
        yield from module.__all__
    yield compat.__name__  # as a whole


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_api_page_has_every_public_name(name: str) -> None:
    text = (DOCS / "api.md").read_text()
    assert re.search(rf"^\.\. (auto\w+|py:data):: {re.escape(name)}(\(\))?$", text, re.M)


def test_cited_sections_are_headings_of_the_method() -> None:
    headings = set(re.findall(r"^## (\d+)\. ", (DOCS / "method.md").read_text(), re.M))
    text = "".join(path.read_text() for path in SOURCES if path.suffix != ".md")
    cited = set(re.findall(r"\b[Ss]ections? (\d+)", text))
    cited |= set(re.findall(r"\b[Ss]ections \d+(?:–| to | and )(\d+)", text))
    assert len(cited) > 5 and cited <= headings, cited - headings


def made_table(command: str) -> list[list[str]]:
    """The cells of the rows that a program with `command` in its name made for backends.md."""
    page = (DOCS / "backends.md").read_text()
    found: list[list[str]] = runpy.run_path(str(DOCS / "tables.py"))["rows"](page, command)
    return found


def launches(backend: str) -> dict[str, set[int]]:
    """Operator → how many launches a call of it takes, as backends.md says."""
    page = (DOCS / "backends.md").read_text()
    section = page.partition(f"## The {backend}")[2].partition("\n## ")[0]
    table = section.partition("| operator | launches | notes |")[2].partition("\n\n")[0]
    result: dict[str, set[int]] = {}
    for line in table.splitlines()[2:]:
        ops, count = line.split("|")[1:3]
        start = 10 if "`max_iter`" in count else 0  # its default
        numbers = {start + int(n) for n in re.findall(r"\d+", count)}
        result |= dict.fromkeys(re.findall(r"`(\w+)`", ops), numbers)
    return result


def test_the_tables_of_cuda_kernels_have_those_of_the_code() -> None:
    text = "".join(p.read_text() for p in (ROOT / "csrc/cuda").iterdir())
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(", text)
    assert len(kernels) > 20
    assert {row[0] for row in made_table("benchmarks.kernels")} == set(kernels)
    served = set(re.findall(r'm\.impl\("(\w+)\.cuda"', text)) - {"op"}  # of a comment
    assert set(launches("CUDA library")) == served
    counted = made_table("benchmarks.roofline")
    assert len(counted) > 10
    for call, number, *_ in counted:
        op = call.split()[0] + "_backward" * call.endswith(", backward")
        assert int(number) in launches("CUDA library")[op], call


def test_a_table_is_made_anew_by_the_command_before_it() -> None:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    page = "a\n\n<!-- python -m {} -->\n\n| old |\n|---|\n| x |\n\nb\n"
    command = "platform"  # prints a line, which is no table
    page = page.format(command)
    assert tables["rows"](page, command) == [["x"]]
    assert tables["remake"](page, ["another"]) == page
    assert tables["remake"](page, []) == "a\n\n<!-- python -m platform -->\n\n\nb\n"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "benchmarks.md"], ids=relative)
def test_tables_of_times_are_those_of_the_result_files(page: Path) -> None:
    remake = runpy.run_path(str(DOCS / "tables.py"))["remake"]
    text = page.read_text()
    assert "<!-- python -m benchmarks.tables" in text
    assert remake(text, ["benchmarks.tables"]) == text


@extended
def test_figures_are_drawn() -> None:
    figures = runpy.run_path(str(DOCS / "figures.py"))
    config = sanm_train.TrainConfig(recipe="sanm-ce", epochs=4, warmup=1, limit=400)
    result = sanm_train.train(config)
    assert len(figures["masking"](result).axes) == 12
    assert len(figures["label_quality"](result).axes) == 2
    assert len(figures["calibration"](result).axes) == 2
    assert len(figures["accuracy"]().axes[0].lines) == 3
    for page in ("method", "accuracy"):
        drawn = {path.name for path in DOCS.glob(f"{page}-*.png")}
        shown = re.findall(rf"{page}-[\w-]+\.png", (DOCS / f"{page}.md").read_text())
        assert drawn and drawn <= set(shown)
