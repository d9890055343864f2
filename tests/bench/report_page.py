"""Look at pages in a real browser: python -m tests.bench.report_page PAGE... [--shots DIR] [--browser FILE]

PAGE is a report.html of a run or a sweep, or what launch/compare.py --report wrote. Each is opened in headless
Chromium, from the file, light and dark, wide and as on a phone. Checked: nothing is asked of the network, the console
says nothing, nothing runs out of the page, every table sorts both ways by every column, filters leave what they should,
and a click shows a run's details. Needs `pip install playwright` and a Chromium; the suite checks such pages without.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
VALUES = """([table, column]) => [...table.querySelectorAll("tbody tr:not(.details)")].map((row) =>
  row.cells[column].dataset.value ?? row.cells[column].textContent.trim())"""


@contextmanager
def opened(browser: Any, file: Path, size: str, scheme: str) -> Iterator[Any]:
    """The page in a window; raises AssertionError for what it asks of the network or says on the console."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    yield page
    assert not said, said
    context.close()


def check_sorting(page: Any) -> int:
    """Click every title of every table twice; the number of columns."""
    columns = 0
    for table in page.query_selector_all("table.sortable"):
        for column, title in enumerate(table.query_selector_all("thead th")):
            for sign in (1, -1):
                title.query_selector("button").click()
                values = page.evaluate(VALUES, [table, column])
                known = [value for value in values if value != ""]
                assert values[: len(known)] == known or not is_number(table, column, known), "missing comes last"
                if is_number(table, column, known):
                    numbers = [sign * float(value) for value in known]
                    assert numbers == sorted(numbers), (title.inner_text(), known)
            columns += 1
    return columns


def is_number(table: Any, column: int, known: list[str]) -> bool:
    """Whether a column is sorted as numbers."""
    return bool(known) and "number" in (table.query_selector_all("thead th")[column].get_attribute("class") or "")


def check_runs(page: Any) -> str:
    """Filters, and the details of every run; what was seen, "" on the page of one run."""
    runs = page.query_selector_all("table.runs tbody")
    if not runs:
        return ""
    told = f"{len(runs)} runs"
    name = runs[-1].query_selector(".open").inner_text()
    page.fill("input[name=text]", name)
    left = [run for run in runs if run.is_visible()]
    assert runs[-1] in left or any(name in run.inner_text() for run in left)
    assert all(name in run.inner_text() for run in left)
    page.fill("input[name=text]", "")
    for select in page.query_selector_all("form select"):
        options = [option.inner_text() for option in select.query_selector_all("option")][1:]
        shown = 0
        for option in options:
            select.select_option(label=option)
            shown += sum(run.is_visible() for run in runs)
        assert shown == len(runs), f"{options} part the runs into {shown}"
        select.select_option(index=0)
        told += f", {len(options)} {select.get_attribute('data-choice')}"
    page.check("input[name=front]")
    assert all(run.is_visible() == ("front" in (run.get_attribute("class") or "")) for run in runs)
    page.uncheck("input[name=front]")
    for run in runs:
        run.query_selector(".open").click()
        assert run.query_selector(".details").is_visible() and run.query_selector(".details dl")
        assert run.query_selector(".open").get_attribute("aria-expanded") == "true"
    pictures = len(page.query_selector_all(".details svg"))
    for run in runs[1:]:
        run.query_selector(".open").press("Enter")
        assert not run.query_selector(".details").is_visible()
    return f"{told}, {pictures} pictures in their details"


def main() -> None:
    """Check all pages; print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", metavar="PAGE")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="where screenshots go")
    parser.add_argument("--browser", default=shutil.which("chromium"), metavar="FILE", help="default: chromium")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=list(OPTIONS))
        for file in map(Path.resolve, arguments.pages):
            for size in SIZES:
                for scheme in ("light", "dark"):
                    with opened(browser, file, size, scheme) as page:
                        columns, runs = check_sorting(page), check_runs(page)
                        for details in page.query_selector_all("details:not(.details *)"):
                            details.query_selector("summary").click()
                        inner = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                        assert inner <= 0, f"{inner} pixels wider than the window"
                        if arguments.shots:
                            arguments.shots.mkdir(parents=True, exist_ok=True)
                            name = f"{file.parent.name}_{file.stem}_{size}_{scheme}.png"
                            page.screenshot(path=arguments.shots / name, full_page=True)
                        pictures = len(page.query_selector_all("svg"))
                    print(f"{file.name} {size} {scheme}: {columns} columns, {pictures} pictures {runs}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
