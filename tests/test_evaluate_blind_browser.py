"""The blind page in a real browser: decided by keyboard, kept, downloaded, tallied."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blind_answers import choice_for, comparison
from chromium import PATIENCE_S, PROGRAM, Browser, browser

from tasks.evaluate.blind import write_key
from tasks.evaluate.blind_page import write_page
from tasks.evaluate.blind_tally import tally
from tasks.evaluate.blind_verdicts import Verdict, read_verdicts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed"),
]

KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    made = comparison()
    write_key(made.key)
    write_page(made, tmp_path / "blind.html")
    return tmp_path / "blind.html"


@pytest.fixture
def shown(page: Path, tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path / "profile", tmp_path) as opened:
        opened.open(page)
        yield opened
        assert opened.errors == []
        assert {request for request in opened.requests if not request.startswith("blob:")} == {page.as_uri()}


def downloaded(folder: Path) -> Path:
    end = time.monotonic() + PATIENCE_S
    while not (files := list(folder.glob("verdicts-*.json"))):
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.05)
    [file] = files
    return file


def count(shown: Browser) -> str:
    return str(shown.value("document.getElementById('count').textContent"))


def test_ten_verdicts_by_keyboard_are_downloaded_and_tallied(shown: Browser, tmp_path: Path) -> None:
    made = comparison()
    assert count(shown) == "0 of 10 decided"
    assert shown.value("document.getElementById('download').disabled")
    for place, winner in enumerate(["a"] * 7 + ["b", None, None]):
        text = shown.value("document.getElementById('left-answer').textContent")
        assert text.startswith("amber" if made.key.left[made.pairs[place].id] == "a" else "blue")
        shown.press(KEYS[choice_for(made, place, winner)])
        assert count(shown) == f"{place + 1} of 10 decided"
    assert shown.value("!document.getElementById('done').hidden && document.getElementById('pair').hidden")
    assert shown.value("document.activeElement.id") == "done-heading"
    shown.press("d")
    given = read_verdicts(downloaded(tmp_path))
    counted = tally(given.key, [given])
    assert (counted.wins, counted.ties, counted.undecided) == ({"a": 7, "b": 1}, 2, 0)
    assert shown.value("document.getElementById('file').value") == downloaded(tmp_path).read_text()


def test_hostile_answers_run_nothing(shown: Browser) -> None:
    assert shown.value("typeof window.hacked") == "undefined"
    assert "onerror=window.hacked" in shown.value("document.getElementById('prompt').textContent")
    shown.value("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.hacked=1\" id=x>')")
    shown.value("document.getElementById('x').click()")
    assert shown.value("typeof window.hacked") == "undefined", "the policy forbids all other scripts"
    shown.errors.clear()  # the violation that was to be seen


def test_ratings_undo_and_comment_by_keyboard(shown: Browser, tmp_path: Path) -> None:
    made = comparison()
    for key in "43":
        shown.press(key)
    shown.press("3")
    shown.press("c")
    for key in ("g", "o", "o", "d", "1", "ArrowLeft"):
        shown.press(key)
    assert count(shown) == "0 of 10 decided", "keys belong to the comment while it is written"
    shown.press("Escape")
    shown.press("ArrowRight", autoRepeat=True)
    assert count(shown) == "0 of 10 decided", "a key held down decides nothing"
    shown.press("ArrowLeft", modifiers=1)
    assert count(shown) == "0 of 10 decided", "Alt and ← go back in the browser"
    shown.press("ArrowRight")
    shown.press("u")
    assert count(shown) == "0 of 10 decided"
    assert shown.value("document.getElementById('comment').value") == "good1"
    shown.press("ArrowDown")
    shown.press("d")
    [verdict] = read_verdicts(downloaded(tmp_path)).verdicts
    rated = {"accuracy": 4, "relevance": 3, "coherence": 3}
    assert verdict == Verdict(made.pairs[0].id, "tie", rated, {}, "good1")


def test_eleven_fives_rate_everything_and_a_click_takes_one_back(shown: Browser, tmp_path: Path) -> None:
    for _ in range(11):
        shown.press("5")
    shown.value("document.querySelector('#rate-right-overall button:last-child').click()")
    shown.press("ArrowLeft")
    shown.press("d")
    [verdict] = read_verdicts(downloaded(tmp_path)).verdicts
    assert list(verdict.left.values()) == [5] * 5
    assert list(verdict.right) == ["accuracy", "relevance", "coherence", "completeness"]


def test_the_browser_goes_on_where_it_was_closed(page: Path, tmp_path: Path) -> None:
    for before in ("0 of 10 decided", "2 of 10 decided"):
        with browser(tmp_path / "profile", tmp_path) as opened:
            opened.open(page)
            assert count(opened) == before
            opened.press("ArrowLeft")
            opened.press("5")
            opened.press("ArrowRight")
            # Chromium writes what a page keeps some seconds later, or when it is closed as below.
            opened.open(page)


def test_a_browser_that_keeps_nothing_says_so_and_works(shown: Browser, page: Path) -> None:
    source = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('blocked') }})"
    shown.call("Page.addScriptToEvaluateOnNewDocument", source=source)
    shown.open(page)
    assert not shown.value("document.getElementById('not-kept').hidden")
    shown.press("ArrowLeft")
    assert count(shown) == "1 of 10 decided"


def test_the_page_is_named_for_those_who_do_not_see_it(shown: Browser) -> None:
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node
    }
    assert ("heading", "Prompt 1") in named
    assert ("progressbar", "prompts decided") in named
    assert {role for role, name in named if "button" in role and not name} == set()
    shown.press("r")
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    groups = {node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "group"}
    assert {"verdict", "accuracy of the left answer", "overall of the right answer"} <= groups


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(scheme: str, shown: Browser) -> None:
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for who in ("body", "h2", "article", "button", "summary"):
        assert contrast(shown, who) >= 4.5, f"{who}: WCAG 2.2 asks for 4.5"


def contrast(shown: Browser, selector: str) -> float:
    """Contrast of an element's text with what lies behind it (WCAG 2.2, relative luminance)."""
    luminances = []
    for colour in ("getComputedStyle(e).color", "behind(e)"):
        text = shown.value(
            "(() => { const behind = (e) => { for (; e; e = e.parentElement) { const c = "
            "getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } };"
            f"const e = document.querySelector('{selector}'); return {colour}; }})()"
        )
        channels = [int(number) / 255 for number in text.strip("rgb()").split(", ")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    dark, light = sorted(luminances)
    return (light + 0.05) / (dark + 0.05)
