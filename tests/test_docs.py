"""What the pages say is so: their tables, the paths they name, the names they explain."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import oftfx
from oftfx import errors

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "tools/docs/pages"
TEXTS = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "README.md", *sorted(PAGES.rglob("*.md")))}


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools/docs/update_tables.py"))


def test_the_tables_are_what_the_tools_write_from_the_committed_figures(tool):
    found = tool["tables"]()
    stale = [str(path) for path, text in TEXTS.items() if tool["filled"](text, found) != text]
    assert stale == [], "run tools/docs/update_tables.py"


def test_every_table_stands_somewhere(tool):
    assert set.union(*(tool["shown"](text) for text in TEXTS.values())) == set(tool["tables"]())


def test_a_figure_that_was_changed_by_hand_is_found(tool):
    path = Path("tools/docs/pages/measured/speed.md")
    changed = re.sub(r"1\.21", "1.01", TEXTS[path])
    assert changed != TEXTS[path]
    assert tool["filled"](changed, tool["tables"]()) == TEXTS[path]


def test_paths_that_are_named_exist():
    named = {
        (p, path) for p, t in TEXTS.items() for path in re.findall(r"`((?:tools|tests|oftfx|passes)/[\w./-]+)`", t)
    }
    assert len(named) > 30
    missing = {n for _, n in named if not (ROOT / n).exists() and not n.startswith("tools/docs/site")}
    assert missing == set()


def test_every_public_name_has_a_reference():
    expand = runpy.run_path(str(ROOT / "tools/docs/public_names.py"))["on_page_markdown"]
    pages = [expand(text) for path, text in TEXTS.items() if path.parent.name == "reference"]
    entries = re.findall(r"^::: oftfx\.(?:\w+\.)*(\w+)$", "\n".join(pages), flags=re.MULTILINE)
    assert set(oftfx.__all__) - {"__version__", "OftfxError"} - set(entries) == set()  # errors have a page together


def test_every_error_and_warning_is_explained():
    from oftfx.serving import RequestError, ServingError

    known = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, (errors.OftfxError, Warning))]
    names = {c.__name__ for c in (*known, RequestError, ServingError)} - {"OftfxError"}
    explained = re.findall(
        r"^### (\w+)$", TEXTS[Path("tools/docs/pages/guides/troubleshooting.md")], flags=re.MULTILINE
    )
    assert set(explained) == names


def test_every_message_that_is_explained_is_one():
    files = [p for folder in ("oftfx", "passes") for p in (ROOT / folder).rglob("*.py")]
    sources = "\n".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text()) for p in files)  # literals over several lines
    rows = re.findall(r"^\| (`.*?) \|", TEXTS[Path("tools/docs/pages/guides/troubleshooting.md")], flags=re.MULTILINE)
    messages = {part.strip() for row in rows for code in re.findall(r"`(.+?)`", row) for part in code.split("...")}
    assert len(messages) > 40
    assert {m for m in messages if m not in sources} == set()


def test_every_format_is_listed():
    from oftfx.formats import formats

    listed = re.findall(r"^\| (`.*?) \|", TEXTS[Path("tools/docs/pages/guides/formats.md")], flags=re.MULTILINE)
    assert {n for cell in listed for n in re.findall(r"`(\w+)`", cell)} == set(formats())


def test_every_example_is_shown():
    shown = set(re.findall(r'--8<-- "tests/examples/(\w+)\.py', "\n".join(TEXTS.values())))
    assert shown == {p.stem for p in (ROOT / "tests/examples").glob("*.py")} - {"__init__", "test_examples"}


def test_python_in_the_guides_is_included_from_examples():
    for path, text in TEXTS.items():
        if path != Path("README.md"):
            for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
                assert all(line.startswith('--8<-- "tests/examples/') for line in block.splitlines()), path


def test_every_field_of_pefts_configuration_is_explained():
    peft = pytest.importorskip("peft")
    text = TEXTS[Path("tools/docs/pages/guides/from-peft.md")]
    fields = set(inspect.signature(peft.OFTConfig).parameters) - {"peft_type"}
    assert len(fields) > 15
    assert [f for f in sorted(fields) if not re.search(rf"`[^`]*\b{f}\b", text)] == []
