"""The page: what it shows equals the files, hostile text stays text, the same input makes the same bytes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.evaluation.report import analyse, as_latex, as_markdown, page, summary
from logo.evaluation.report.page import environment
from logo.evaluation.report.payload import packed
from logo.evaluation.runs import read_runs
from report_runs import ROWS, SIGNALS, TASKS, demo_results, write_result

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "<!-- ]]> <![CDATA[ &lt;b&gt; &#60;",
    "{{7*7}} ${title} $style",
    "\u202egnp.exe \u2028\u2029 \x00\x1b \ud800",
    "javascript:alert(1)",
    "\\end{tabular} % $x_1^2$ ~#&",
]
TEXT = st.sampled_from(HOSTILE) | st.text(max_size=20)


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.blocks: dict[str, str] = {}
        self.policy = ""
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "script":
            self._script = attributes.get("id") or "code"
        if tag == "meta" and attributes.get("http-equiv"):
            self.policy = attributes["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.blocks[self._script] = self.blocks.get(self._script, "") + data
        else:
            self.texts.append(data)

    def names(self) -> set[str]:
        return {name for name, _ in self.elements}

    def block(self, name: str) -> object:
        return unpacked(self.blocks[f"b-{name}"])


def unpacked(block: str) -> Any:
    """What `packed` was given, as the page's script reads it."""
    return json.loads(gzip.decompress(base64.b64decode(block)))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_results(tmp_path_factory)


@pytest.fixture(scope="session")
def demo_page(demo: Path) -> Parsed:
    return Parsed(page(analyse(read_runs([demo / "results"], demo / "data"))))


def cells(text: str) -> list[list[str]]:
    """The rows of all tables as text."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text.replace("<wbr>", ""), flags=re.DOTALL)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in found]


def test_the_numbers_are_those_of_the_files(demo: Path) -> None:
    runs = read_runs([demo / "results"], demo / "data")
    analysis = analyse(runs)
    rows = cells(page(analysis))
    stored = {
        (signal, task): json.loads(
            (
                demo / "results" / f"demo_selection_{signal}_n_3_seed_0" / f"demo.{task}" / "eval_results.json"
            ).read_text()
        )
        for signal in SIGNALS
        for task in TASKS
    }
    for task in TASKS:
        [row] = [row for row in rows if row[:2] == [f"demo.{task}", "accuracy"]]
        shown = [float(cell.split()[0]) for cell in row[2:]]
        expected = [100 * fmean(stored[str(run.method), task]) for run in runs]
        assert shown == pytest.approx(expected, abs=0.051)
    told = summary(analysis)
    for run in told["runs"]:
        means = [fmean(stored[run["method"], task]) for task in TASKS]
        assert run["mean"]["value"] == pytest.approx(fmean(means)) and run["instances"] == ROWS * len(TASKS)
    [pair] = told["versus"]
    assert pair["difference"] == pytest.approx(told["runs"][1]["mean"]["value"] - told["runs"][0]["mean"]["value"])
    assert sum(pair["instances"].values()) == ROWS * len(TASKS)


def test_every_instance_is_in_the_page(demo: Path, demo_page: Parsed) -> None:
    index = demo_page.block("index")
    assert isinstance(index, dict)
    assert [each["name"] for each in index["datasets"]] == [f"demo.{task}" for task in TASKS]
    for number, task in enumerate(TASKS):
        lines = (demo / "data" / "demo" / task / "test.jsonl").read_text().splitlines()
        asked = [json.loads(line) for line in lines]
        assert demo_page.block(f"p{number}") == [[row["context"], [row["completion"]]] for row in asked]
        for run, signal in enumerate(sorted(SIGNALS)):
            folder = demo / "results" / f"demo_selection_{signal}_n_3_seed_0" / f"demo.{task}"
            stored = {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}
            assert index["datasets"][number]["values"][run] == stored["eval_results"]
            answers = demo_page.block(f"a{run}-{number}")
            assert isinstance(answers, list)
            assert [answer[0] for answer in answers] == stored["predictions"]
            names = [[index["adapters"][n] for n in answer[1]] for answer in answers]
            assert names == stored["selected_loras"]
            for answer, weights in zip(answers, stored["weights"], strict=True):
                assert answer[2] == pytest.approx(weights, abs=5e-5)


def test_the_page_is_sound(demo_page: Parsed) -> None:
    """One title, headings in order, headers with scopes, names for what scrolls."""
    levels = [int(name[1]) for name, _ in demo_page.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(attributes.get("scope") for name, attributes in demo_page.elements if name == "th")
    ids = [attributes["id"] for _, attributes in demo_page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in demo_page.elements:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(reference) or "").split()) <= set(ids)
        if attributes.get("role") in ("region", "search", "group"):
            assert attributes.get("aria-label")
        if name == "a":
            assert str(attributes["href"]).removeprefix("#") in ids
    captions = [name for name, _ in demo_page.elements].count("caption")
    assert captions == [name for name, _ in demo_page.elements].count("table") >= 6


def test_nothing_comes_from_elsewhere_and_nothing_else_may_run(demo: Path, demo_page: Parsed) -> None:
    text = page(analyse(read_runs([demo / "results"], demo / "data")))
    for name, attributes in demo_page.elements:
        assert not any(key.startswith("on") or key == "style" for key in attributes), (name, attributes)
        for key in ("src", "href", "action", "data", "poster"):
            target = attributes.get(key)
            assert target is None or target.startswith(("#", "data:")), target
    assert not re.search(r"https?://", text)
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL) for tag in ("style", "script"))
    for found, directive in ((style, "style-src"), (script, "script-src")):
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in demo_page.policy
    assert demo_page.policy.startswith("default-src 'none';") and "unsafe" not in demo_page.policy


def test_the_same_results_make_the_same_bytes(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> tuple[str, str]:
        analysis = analyse(read_runs([demo / "results"], demo / "data"))
        return page(analysis), as_latex(analysis)

    today = made()
    monkeypatch.setattr(time, "time", lambda: 2e9)  # another day
    assert made() == today


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Every place where data comes in, filled with what would break out of it."""
    harmless = write_hostile(tmp_path / "harmless", [f"text {n}" for n in range(len(HOSTILE))])
    evil = write_hostile(tmp_path / "evil", HOSTILE)
    expected, found = (Parsed(page(analyse(read_runs([root])), root_title)) for root, root_title in (harmless, evil))
    assert [name for name, _ in found.elements] == [name for name, _ in expected.elements]
    for (_, ours), (_, theirs) in zip(found.elements, expected.elements, strict=True):
        assert ours.keys() == theirs.keys()
    assert found.blocks.keys() == expected.blocks.keys() and found.blocks["code"] == expected.blocks["code"]
    prompts = found.block("p0")
    assert isinstance(prompts, list)
    assert [prompt[0] for prompt in prompts] == HOSTILE
    shown = "".join(found.texts)
    assert "<img src=x onerror=alert(1)>" in shown and "</script><script>alert(1)</script>" in shown


def write_hostile(root: Path, texts: list[str]) -> tuple[Path, str]:
    count = len(texts)
    for run in ("a", "b"):
        write_result(
            root / run / "d.x",
            [0, 1] * (count // 2),
            predictions=texts,
            selected=[texts[:2]] * count,
            weights=[[0.5, 0.5]] * count,
            scores={"norm": [[float(n + i) for n in range(count)] for i in range(count)]},
            rows=[{"context": text, "completion": text, "adapter": text} for text in texts],
            run_json={
                "options": {"base_model": texts[0], "method": texts[1], "dtype": run, texts[3]: texts[4] + run},
                "device": texts[5],
                "date": texts[1],
                "pool": dict.fromkeys(texts, ""),
                "score_columns": texts,
                "versions": {texts[2]: texts[3]},
            },
            metrics={
                "extra": {texts[2]: 1.0},
                "signatures": {texts[2]: texts[0]},
                "errors": [{"index": 0, "message": texts[0]}],
            },
            seconds={"loading": 1.0, "inference": 2.0, texts[1]: 1.0},
        )
    return root, texts[0]


@given(TEXT, TEXT)
def test_a_template_gives_back_the_text(text: str, other: str) -> None:
    template = environment().from_string('<p title="{{ other }}">{{ text }}<b>{{ other }}</b></p>')
    parsed = Parsed(template.render(text=text, other=other))
    assert [name for name, _ in parsed.elements] == ["p", "b"]
    forbidden = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
    clean = [re.sub(forbidden, "\ufffd", part).replace("\r", "\ufffd") for part in (text, other)]
    assert "".join(parsed.texts).replace("\r", "\ufffd") == "".join(clean)
    assert (parsed.elements[0][1]["title"] or "").replace("\r", "\ufffd") == clean[1]


@given(st.recursive(st.none() | st.integers(-9, 9) | TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_packed_data_is_given_back_and_cannot_end_its_element(content: object) -> None:
    block = packed(content)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", block)
    assert unpacked(block) == content and packed(content) == block


def test_latex_tables(demo: Path) -> None:
    analysis = analyse(read_runs([demo / "results"], demo / "data"))
    text = as_latex(analysis)
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 2
    for block in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = re.findall(r"^    (.*) \\\\$", block[1], flags=re.MULTILINE)
        assert {row.replace(r"\&", "").count("&") for row in rows} == {len(block[0]) - 1}
    for task in TASKS:
        assert f"demo.{task} & accuracy & " in text
    best = [cell for line in analysis.lines for cell in line.cells if cell and cell.mark == "best"]
    assert text.count("\\textbf") == len(best) + sum(
        cell.mark == "best" for line in analysis.groups for cell in line.cells if cell
    )


def test_results_of_the_official_script_alone_make_a_page(tmp_path: Path) -> None:
    """No prompts, no names of columns, no options, one row, and a second run with nothing in common."""
    write_result(tmp_path / "m_selection_norm_n_2_seed_0" / "bbh.navigate", [1])
    rouge = [{"rouge-1": 0.5, "rouge-2": 0.25, "rouge-L": 0.375}]
    write_result(tmp_path / "m_selection_norm_n_3_seed_0" / "gem.dart", rouge, selected=[[]], weights=[[]], scores={})
    analysis = analyse(read_runs([tmp_path]))
    assert analysis.labels == ("norm · k 2", "norm · k 3") and not analysis.versus
    parsed = Parsed(page(analysis))
    assert parsed.block("p0") == [None]
    text = "".join(parsed.texts)
    assert "selected no adapters" in text and "Head to head" not in text
    as_latex(analysis)
    as_markdown(analysis)
