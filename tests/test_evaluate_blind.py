"""A blind comparison: the page tells nothing, the key tells all, and only its own verdicts are counted."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from blind_answers import HOSTILE, A, B, comparison, outcomes, verdicts
from scipy.stats import binomtest

from tasks.errors import InputError
from tasks.evaluate import blind
from tasks.evaluate.blind import Comparison, compare, comparison_folder, read_key, write_key
from tasks.evaluate.blind_page import page_data, write_page
from tasks.evaluate.blind_tally import accept, tally
from tasks.evaluate.blind_verdicts import Verdict, read_verdicts

SCRIPT = Path(blind.__file__).with_name("blind_page.js")


class Page(HTMLParser):
    """The tags of a page with their attributes, and what stands in scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    write_page(comparison(), tmp_path / "blind.html")
    return Page(tmp_path / "blind.html")


def stored(made: Comparison, path: Path, outcome: str = "ab", **given: Any) -> Path:
    """A file of verdicts on a comparison whose key is here."""
    write_key(made.key)
    verdicts(made, outcome, **given).write(path)
    return path


def test_each_model_is_left_in_half_of_the_pairs_and_has_its_own_answer_there() -> None:
    made = comparison(20)
    assert sorted(made.key.left.values()) == ["a"] * 10 + ["b"] * 10
    for pair in made.pairs:
        of_a, of_b = (pair.left, pair.right) if made.key.left[pair.id] == "a" else (pair.right, pair.left)
        assert of_a.startswith(f"amber {pair.reference}")
        assert of_b == f"blue {pair.reference}"
        assert pair.prompt.startswith(f"question {pair.reference.split()[1]}?")


def test_the_order_is_that_of_the_seed_and_of_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = comparison(20)
    assert comparison(20) == made
    assert comparison(20, seed=1).key.left != made.key.left
    prompts = [pair.prompt for pair in made.pairs]
    assert [pair.prompt for pair in comparison(20, seed=1).pairs] != prompts
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    elsewhere = comparison(20)
    assert list(elsewhere.key.left.values()) != list(made.key.left.values())
    assert elsewhere.key.comparison != made.key.comparison


def test_ids_and_order_do_not_tell_the_models_apart() -> None:
    """Who swaps A and B gets the same kind of page: nothing in an id depends on who is left."""
    made = comparison(200)
    left = [made.key.left[pair.id] for pair in made.pairs]
    assert {len(pair.id) for pair in made.pairs} == {16}
    runs = 1 + sum(before != after for before, after in itertools.pairwise(left))
    assert 70 < runs < 130, "sides are not drawn in turns or in blocks"
    first = [pair.id[0] for pair, side in zip(made.pairs, left, strict=True) if side == "a"]
    assert len(set(first)) > 8


def test_prompts_with_the_same_answer_are_not_shown_and_counted() -> None:
    made = comparison(10, same=3)
    assert len(made.pairs) == 7
    assert made.key.identical == 3
    with pytest.raises(InputError, match="the same answer to all of 4"):
        comparison(4, same=4)


def test_fewer_prompts_are_drawn_by_the_seed() -> None:
    drawn = {comparison(50, seed=seed, most=5).pairs[0].prompt for seed in range(8)}
    assert len(comparison(50, most=5).pairs) == 5
    assert len(drawn) > 3


def test_runs_without_a_common_prompt_are_refused() -> None:
    with pytest.raises(InputError, match="no test prompt in common"):
        compare(A, {("p", "r"): "x"}, B, {("q", "r"): "y"}, 0)


def test_the_page_holds_neither_names_nor_key_nor_seed(page: Page) -> None:
    made = comparison()
    data = json.loads(page.inside["script"][0])
    assert set(data) == {"format", "id", "token", "criteria", "best", "longest_comment", "pairs"}
    assert all(set(pair) == {"id", "prompt", "reference", "left", "right"} for pair in data["pairs"])
    assert len(data["pairs"]) == 10
    secret = (comparison_folder(made.key.comparison).parent / "secret").read_bytes()
    for hidden in (A.name, B.name, A.tag, B.tag, "careful-cat", "seed", "contestant", secret.hex()):
        assert hidden not in page.source
    assert not re.search(r"\bkey\.json|aaaa|bbbb", page.source)


def test_swapping_the_two_runs_changes_no_more_than_ids_and_sides(tmp_path: Path) -> None:
    """Were the page to say who is who, the two pages would differ in it."""

    def skeleton(text: str) -> str:
        text = re.sub(r'"[0-9a-f]{16}"', '"id"', text)
        return re.sub(r'"(left|right|prompt|reference)": ?"(?:[^"\\]|\\.)*"', r'"\1"', text)

    rows = [(f"q{number}", "") for number in range(10)]
    first, second = dict.fromkeys(rows, "x"), dict.fromkeys(rows, "y")
    write_page(compare(A, first, B, second, 0), tmp_path / "one.html")
    write_page(compare(B, second, A, first, 0), tmp_path / "two.html")
    one, two = ((tmp_path / name).read_text() for name in ("one.html", "two.html"))
    assert one != two
    assert skeleton(one) == skeleton(two)


def test_the_page_fetches_nothing_and_hostile_answers_stay_text(page: Page) -> None:
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|sendBeacon|WebSocket", page.source)
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object", "a", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & attributes.keys()]
    assert len(page.inside["script"]) == 2
    assert "window.hacked" not in page.inside["script"][1]
    data = json.loads(page.inside["script"][0])
    assert {"window.hacked=1" in pair["prompt"] for pair in data["pairs"]} == {True}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.source), "what steers is made visible"


def test_only_the_pages_own_script_and_style_may_run(page: Page) -> None:
    [policy] = [given["content"] or "" for tag, given in page.tags if given.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for rule, text in (("script-src", page.inside["script"][1]), ("style-src", page.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_a_key_comes_back_as_it_was_and_only_its_owner_may_read_it() -> None:
    key = comparison(same=2).key
    path = write_key(key)
    assert read_key(key.comparison) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((path.parent.parent / "secret").stat().st_mode) == 0o600


def test_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    made = comparison()
    path = stored(made, tmp_path / "v.json", "abt", rated=True)
    assert read_verdicts(path) == verdicts(made, "abt", rated=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["verdicts"][0].update(choice="tie"), "the seal does not fit"),
        (lambda file: file["verdicts"].pop(), "the seal does not fit"),
        (lambda file: file.update(reviewer="f" * 16), "the seal does not fit"),
        (lambda file: file.update(seal=7), "the seal does not fit"),
        (lambda file: file.update(verdicts=None), "reviewer or verdicts are missing"),
        (lambda file: file.update(reviewer="../../x"), "reviewer or verdicts are missing"),
        (lambda file: file.update(comparison="f" * 16), "no key"),
        (lambda file: file.update(comparison="../secret"), "no key"),
        (lambda file: file.update(comparison=None), "no key"),
        (lambda file: file.update(format="other"), "no file of verdicts"),
    ],
)
def test_a_foreign_or_tampered_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = stored(comparison(), tmp_path / "v.json", "aabb")
    assert len(read_verdicts(path).verdicts) == 4
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(InputError, match=message) as told:
        read_verdicts(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ({"pair": "0" * 16}, "is not in the comparison"),
        ({"choice": "both"}, "is none of left, right, tie"),
        ({"left": {"accuracy": 6}}, "from 1 to 5"),
        ({"left": {"accuracy": True}}, "from 1 to 5"),
        ({"right": {"beauty": 3}}, "from 1 to 5"),
        ({"right": None}, "from 1 to 5"),
        ({"comment": None}, "other keys"),
        ({"extra": 1}, "other keys"),
    ],
)
def test_a_seal_does_not_make_nonsense_valid(verdict: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Whoever can read the page can seal: what is sealed is checked all the same."""
    made = comparison()
    path = stored(made, tmp_path / "v.json", "ab")
    file = json.loads(path.read_text())
    file["verdicts"][1] |= verdict
    file["seal"] = seal(made, file)
    path.write_text(json.dumps(file))
    with pytest.raises(InputError, match=message):
        read_verdicts(path)


def test_a_pair_that_is_decided_twice_is_refused(tmp_path: Path) -> None:
    made = comparison()
    path = stored(made, tmp_path / "v.json", "ab")
    file = json.loads(path.read_text())
    file["verdicts"].append(file["verdicts"][0])
    file["seal"] = seal(made, file)
    path.write_text(json.dumps(file))
    with pytest.raises(InputError, match="decided twice"):
        read_verdicts(path)


def seal(made: Comparison, file: dict[str, Any]) -> str:
    """As the page makes it, written here a second time."""
    text = json.dumps(file["verdicts"], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{made.key.token}\n{file['reviewer']}\n{text}".encode()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'"verdicts"', b"[" * 100_000])
def test_a_file_that_is_none_of_verdicts_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"v\.json"):
        read_verdicts(path)
    with pytest.raises(InputError, match="no such file"):
        read_verdicts(tmp_path / "none.json")
    with pytest.raises(InputError, match="not JSON"):
        read_verdicts(tmp_path)


def test_the_tally_counts_models_not_sides() -> None:
    made = comparison()
    counted = tally(made.key, [verdicts(made, "aaaabtt", rated=True)])
    assert counted.wins == {"a": 4, "b": 1}
    assert (counted.ties, counted.undecided) == (2, 3)
    assert counted.ratings == {"a": {"accuracy": 5}, "b": {"accuracy": 2}}
    assert counted.win_rate("a") == 0.8
    figures = counted.figures("b")
    assert (figures["wins"], figures["losses"], figures["ties"], figures["rating_accuracy"]) == (1, 4, 2, 2)


@pytest.mark.parametrize(
    ("outcome", "p_value"), [("aaaaaa", 2 / 64), ("aaaaab", 14 / 64), ("ab", 1), ("aaaaaattt", 2 / 64)]
)
def test_the_sign_test_is_exact_and_leaves_ties_out(outcome: str, p_value: float) -> None:
    made = comparison()
    assert tally(made.key, [verdicts(made, outcome)]).p_value == pytest.approx(p_value, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_interval_and_test_never_contradict_each_other(seed: int) -> None:
    made = comparison(60)
    for outcome in (outcomes(60, seed), "a" * (8 + seed), "a" * 15 + "b" * (2 + seed)):
        counted = tally(made.key, [verdicts(made, outcome)])
        low, high = counted.interval("a")
        assert (low > 0.5 or high < 0.5) == (counted.p_value < 0.05)
        assert counted.interval("b") == pytest.approx((1 - high, 1 - low))
        # Clopper and Pearson: at either end the tail has 2.5%.
        wins, decided = counted.wins["a"], sum(counted.wins.values())
        if 0 < wins < decided:
            assert binomtest(wins, decided, low, "greater").pvalue == pytest.approx(0.025, abs=1e-6)
            assert binomtest(wins, decided, high, "less").pvalue == pytest.approx(0.025, abs=1e-6)


def test_only_ties_give_no_rate_and_no_difference() -> None:
    made = comparison()
    counted = tally(made.key, [verdicts(made, "ttt")])
    assert counted.p_value == 1
    assert counted.win_rate("a") is None
    assert "win_rate" not in counted.figures("a")
    assert counted.interval("a") == (0, 1)


def test_a_prompt_has_one_vote_however_many_reviewers_it_had() -> None:
    made = comparison()
    three = [verdicts(made, outcome, str(n) * 16) for n, outcome in enumerate(("aab", "aba", "atb"))]
    counted = tally(made.key, three)
    assert counted.wins == {"a": 1, "b": 1}  # a+a+a; a+b+tie; b+a+b
    assert counted.ties == 1
    assert counted.reviewers == 3


def test_a_file_tallied_twice_counts_once_and_a_later_one_takes_its_place(tmp_path: Path) -> None:
    made = comparison()
    first = read_verdicts(stored(made, tmp_path / "one.json", "aab"))
    assert len(accept(first)) == 1
    assert len(accept(first)) == 1
    [later] = accept(read_verdicts(stored(made, tmp_path / "two.json", "aabbb")))
    assert len(later.verdicts) == 5
    other = read_verdicts(stored(made, tmp_path / "three.json", "b", reviewer="9" * 16))
    assert len(accept(other)) == 2


def test_a_file_without_verdicts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no verdict"):
        accept(read_verdicts(stored(comparison(), tmp_path / "v.json", "")))


NODE = shutil.which("node")

DRIVE = """
const page = require(process.argv[1]);
const { comparison, steps } = JSON.parse(require("fs").readFileSync(0, "utf8"));
let state = page.newState("00112233445566ff");
for (const [act, ...given] of steps) {
  if (act === "undo") state = page.undo(state);
  else if (act === "restore") state = page.restored(comparison, JSON.stringify(state));
  else state = page[act](comparison, state, ...given);
}
const hashes = Array.from({ length: 140 }, (_, n) => page.sha256("ä".repeat(n)));
const foreign = [null, "{", "{}", JSON.stringify({ ...state, verdicts: [{ pair: "x" }] })];
process.stdout.write(JSON.stringify({
  file: page.verdictFile(comparison, state), hashes,
  foreign: foreign.map((text) => page.restored(comparison, text)),
}));
"""


@pytest.mark.skipif(NODE is None, reason="no node to run the page's script in; the browser test does it too")
def test_the_pages_script_makes_files_that_are_read_back(tmp_path: Path) -> None:
    made = comparison(5)
    write_key(made.key)
    steps = [
        ["rate", "left", "overall", 5],
        ["rate", "left", "accuracy", 4],
        ["rate", "right", "accuracy", 9],
        ["comment", ' "quoted" \u2028 \\ ä 🙂 \x7f \ud800 '],
        ["decide", "left"],
        ["decide", "tie"],
        ["rate", "right", "coherence", 2],
        ["decide", "right"],
        ["undo"],
        ["restore"],
        ["decide", "tie"],
        ["decide", "right"],
    ]
    told = json.dumps({"comparison": page_data(made), "steps": steps})
    done = subprocess.run([str(NODE), "-e", DRIVE, str(SCRIPT)], input=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)
    assert given["hashes"] == [hashlib.sha256(("ä" * n).encode()).hexdigest() for n in range(140)]
    assert given["foreign"] == [None] * 4
    (tmp_path / "v.json").write_text(given["file"], encoding="utf-8")
    first, second, third, fourth = read_verdicts(tmp_path / "v.json").verdicts
    comment = '"quoted" \u2028 \\ ä 🙂 \x7f \ufffd'
    assert first == Verdict(made.pairs[0].id, "left", {"accuracy": 4, "overall": 5}, {}, comment)
    assert list(first.left) == ["accuracy", "overall"]
    assert second == Verdict(made.pairs[1].id, "tie")
    assert third == Verdict(made.pairs[2].id, "tie", {}, {"coherence": 2}), "undoing loses no rating"
    assert fourth == Verdict(made.pairs[3].id, "right")
    assert HOSTILE.startswith("</script>")
