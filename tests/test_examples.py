"""Example prompts of adapters: what is read of them, what is kept, and how they decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import AdapterPool, LoGo
from logo.adapters.examples import folder_description, folder_examples, write_examples
from logo.adapters.peft import EXAMPLES, RECORD
from logo.adapters.sources import adapter_patterns
from logo.cli.app import run
from logo.cli.pool.publish import contents_of
from logo.evaluation.answer import Answerer
from logo.evaluation.contest import REMOVED, Contest
from logo.evaluation.datasets import Dataset
from logo.evaluation.study import Measurer
from logo.rows import Row
from logo.selection import base_reader
from logo.selection.evidence import RESPONSE, Similarities, together
from logo.selection.examples import Examples, means_of, whitened
from logo.selection.selector import EXAMPLES as WITH_EXAMPLES
from logo.selection.whitening import Whitening
from test_calibrated import PROMPTS, change, engine, pool
from tolerances import same_scores, same_tensor


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny.model("llama", num_hidden_layers=6, **tiny.LONG)


@pytest.fixture
def folder(llama: nn.Module, tmp_path: Path) -> Path:
    return pool(llama, tmp_path / "pool")


def told(folder: Path, **examples: str | list[str]) -> Path:
    for name, prompts in examples.items():
        write_examples(folder / name, [prompts] if isinstance(prompts, str) else prompts)
    return folder


def scores(logo: LoGo, *prompts: str, **options: Any) -> torch.Tensor:
    found = logo.select(list(prompts), **options)
    return torch.tensor([list(selection.scores.values()) for selection in found])


# -- the formula -------------------------------------------------------------------------------------------------------


def spaces_of(*ordinary: torch.Tensor) -> Whitening:
    """Whitenings of both kinds of descriptions (texts, 2, d) at each depth."""
    return Whitening.stacked([Whitening.of(texts[:, kind]) for texts in ordinary for kind in (0, 1)])


def test_similarities_are_the_formula() -> None:
    torch.manual_seed(0)
    depths = [torch.randn(30, 2, 5) for _ in range(3)]
    means, prompts = [torch.randn(5, 2, 5) for _ in range(3)], [torch.randn(6, 2, 5) for _ in range(3)]
    owners, known = torch.tensor([0, 1, 1, 2, 1]), torch.tensor([True, True, False, True])
    spaces = spaces_of(*depths)
    centres = whitened(spaces, means).mT
    found = Examples(spaces, centres, owners, known, spread=0.5).similarities(prompts)
    assert found.values.shape == (6, 3) and found.known is known
    for row in range(6):
        best = [-2.0] * 3
        for number, owner in enumerate(owners.tolist()):
            total = 0.0
            for texts, own, prompt in zip(depths, means, prompts, strict=True):
                for i in (0, 1):
                    w = Whitening.of(texts[:, i])
                    x, m = ((one - w.mean) @ w.fold(torch.eye(5)) for one in (prompt[row, i], own[number, i]))
                    total += float(torch.cosine_similarity(x, m, dim=0)) / 6
            best[owner] = max(best[owner], total)
        assert found.values[row].tolist() == pytest.approx([value / 0.5 for value in best], abs=1e-5)


responses_of = st.integers(0, 2**31).map(lambda seed: torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)))


@given(responses_of, st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_one_formula_for_all_evidence(responses: torch.Tensor, known: list[bool], seed: int) -> None:
    """What an adapter has counts as it is; what it lacks follows its response; scores among candidates are those of a
    pool of them."""
    torch.manual_seed(seed)
    which = torch.tensor(known)
    similar = Similarities(torch.randn(2, sum(known)), which)
    scores = together(responses, [similar])
    expected = RESPONSE * responses[:, which] + similar.values
    torch.testing.assert_close(scores[:, which], expected)
    estimated = scores[:, ~which] - (RESPONSE + 1) * responses[:, ~which]
    torch.testing.assert_close(estimated, estimated[:, :1].expand_as(estimated), atol=1e-4, rtol=0)
    encoded = Similarities(torch.randn(2, sum(known)), which)
    both = together(responses, [similar, encoded])
    torch.testing.assert_close(both[:, which], expected + encoded.values)
    among = torch.tensor([True, True, False, True, True])
    alone = Similarities(similar.values[:, among[which]], which[among])
    found = together(responses, [similar], among.expand(2, -1))
    torch.testing.assert_close(found[:, among], together(responses[:, among], [alone]), atol=1e-5, rtol=0)
    assert bool((found[:, ~among] == -torch.inf).all())


# -- in an engine ------------------------------------------------------------------------------------------------------


def test_an_example_is_recognised_whatever_the_weights_say(llama: nn.Module, folder: Path) -> None:
    examples = dict(zip(["t0", "t1", "t2", "t3"], PROMPTS, strict=False))
    logo = engine(llama, told(folder, **examples))
    for name, prompt in examples.items():
        selection = logo.select(prompt)
        assert selection.adapters == (name,)
        assert selection.confidence is not None and selection.confidence > 0.6  # of four adapters
    assert logo.scorer.selector.evidence == WITH_EXAMPLES


@pytest.mark.parametrize("own", [{}, {"t0": "a"}, {"t0": "a", "t1": "The cat sat."}])
def test_scores_of_candidates_depend_on_no_others_examples(own: dict[str, str], llama: nn.Module, folder: Path) -> None:
    """Nor do those of adapters without examples, which are estimated: they are those of a pool of the candidates."""
    candidates, found = ["t0", "t1", "t2"], []
    for others in ("Where was it?", PROMPTS[0]):
        logo = engine(llama, told(folder, **own, t3=others))
        found.append(scores(logo, *PROMPTS, candidates=candidates))
        among = [logo.select([PROMPTS[0]], candidates=candidates)[0], logo.select([PROMPTS[0]])[0]]
        assert among[0].scores.keys() == set(candidates) and among[1].scores.keys() == {*candidates, "t3"}
    same_tensor(*found)


def test_a_study_leaves_the_own_adapters_examples_out_with_it(llama: nn.Module, folder: Path) -> None:
    """They do not count in the estimates of adapters without examples."""
    logo, prompt = engine(llama, told(folder, t0="a", t1=PROMPTS[0])), PROMPTS[0]
    task = Dataset("t1", Path("t1.jsonl"), (Row(prompt, ()),))
    record = Measurer(Answerer(logo, "M"), Contest(("calibrated",))).measure(task, 0)
    [found] = [arm["confidence"] for arm in record["arms"] if arm["protocol"] == REMOVED]
    assert found == pytest.approx(logo.select(prompt, candidates=["t0", "t2", "t3"]).confidence, abs=1e-4)


def test_prompts_are_described_up_to_the_last_layer(llama: nn.Module, folder: Path) -> None:
    """Without example prompts, the probe stops where adapters are compared."""
    logo = engine(llama, told(folder, t0=PROMPTS[0]))
    assert logo.points[-3:] == ("2", "3", "5")  # of 6 layers
    assert list(logo.scorer.described) == [*range(len(logo.points))][-3:]
    without = engine(llama, folder, examples="ignore")
    assert without.points == logo.points[:-3] and not without.scorer.described


def test_adapters_with_and_without_examples_are_in_one_pool(llama: nn.Module, folder: Path) -> None:
    logo = engine(llama, told(folder, t1=PROMPTS[2]))
    found = scores(logo, *PROMPTS)
    assert found.isfinite().all()
    assert logo.select(PROMPTS[2]).adapters == ("t1",)
    # Among those without examples, the responses alone decide.
    responses = scores(engine(llama, folder, examples="ignore"), *PROMPTS)
    others = [0, 2, 3]
    assert found[:, others].argsort(dim=1).tolist() == responses[:, others].argsort(dim=1).tolist()


def test_examples_in_several_wordings_have_means_of_their_own() -> None:
    """Beside the mean of all, which may be like none of them; examples in one wording have that mean alone."""
    torch.manual_seed(0)
    spaces = spaces_of(torch.randn(40, 2, 8))
    wordings = 3 * torch.randn(3, 2, 8).repeat_interleave(4, dim=0)
    texts = wordings + 0.1 * torch.randn(12, 2, 8)
    [means] = means_of([texts], spaces)
    assert len(means) > 3
    torch.testing.assert_close(means[0], texts.mean(dim=0))
    for text in texts:
        assert float((means[1:] - text).norm(dim=(1, 2)).min()) < 1 < float((means[0] - text).norm())
    [alone] = means_of([texts[:4]], spaces)
    torch.testing.assert_close(alone, texts[:4].mean(dim=0, keepdim=True))


def test_an_adapter_that_joins_brings_its_examples(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    logo = engine(llama, folder)
    assert logo.scorer.examples.described is None
    new = pool(llama, tmp_path / "new", 1) / "t0"
    told(tmp_path / "new", t0=PROMPTS[2])
    logo.pool.add(new, "joined")
    assert logo.select(PROMPTS[2]).adapters == ("joined",)
    logo.pool.remove("joined")
    logo.select(PROMPTS[2])
    assert logo.scorer.examples.described is None


def test_examples_are_those_of_the_opening(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Whatever is written beside the adapters afterwards, also if the pool changes."""
    logo = engine(llama, told(folder, t0=PROMPTS[0], t1=PROMPTS[1]))
    before = logo.select(PROMPTS[0])
    told(folder, t1=PROMPTS[0])
    (folder / "t0" / EXAMPLES).unlink()
    logo.pool.add(pool(llama, tmp_path / "new", 1) / "t0", "joined")
    assert logo.select(PROMPTS[0]).adapters == before.adapters == ("t0",)
    logo.pool.remove("joined")
    assert logo.select(PROMPTS[0]).scores == same_scores(before.scores)
    assert engine(llama, folder).select(PROMPTS[0]).adapters == ("t1",)


def test_the_cache_keeps_means_only(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    secret = "the password of the vault is 1234"
    engine(llama, told(folder, t0=[secret, "another one"]), cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").rglob("described/*.safetensors"))) == 2  # of them, and of our ordinary texts
    everything = b"".join(file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert b"password" not in everything


def test_a_second_engine_reads_no_example(
    llama: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(folder, t0=PROMPTS[0], t2=[PROMPTS[2], PROMPTS[3]])
    first = scores(engine(llama, folder, cache=str(tmp_path / "cache")), *PROMPTS)
    monkeypatch.setattr(base_reader, "read_texts", lambda *_: pytest.fail("the base model reads again"))
    again = scores(engine(llama, folder, cache=str(tmp_path / "cache")), *PROMPTS)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


def test_an_adapter_of_zeros_without_examples_never_wins(llama: nn.Module, folder: Path) -> None:
    change(folder / "t3", torch.zeros_like)
    logo = engine(llama, told(folder, t0=PROMPTS[0], t1=PROMPTS[1], t2=PROMPTS[2]), k=4)
    assert "t3" not in {selection.adapters[0] for selection in logo.select(PROMPTS)}


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_that_makes_no_sense_is_a_warning(llama: nn.Module, folder: Path) -> None:
    for content, reason in (
        ("{", "line 1: expected a JSON object"),
        ('{"prompt": "fine"}\n[1]', "line 2: expected a JSON object with the text"),
        ('{"prompt": 3}', "line 1: expected a JSON object with the text"),
        ('{"prompt": "  "}', "line 1: expected a JSON object with the text"),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "line 2: expected .*; the examples are left out"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
    ):
        (folder / "t0" / EXAMPLES).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.warns(UserWarning, match=reason):
            assert folder_examples(folder / "t0") == ()


def test_a_description_is_a_text_beside_the_adapter(llama: nn.Module, folder: Path) -> None:
    assert folder_description(folder / "t0") is None
    file = folder / "t0" / RECORD
    file.write_text("config: {}\n")
    assert folder_description(folder / "t0") is None
    file.write_text("description: Says – in a word – what it is.\nconfig: {}\n", encoding="utf-8")
    assert folder_description(folder / "t0") == "Says – in a word – what it is."
    for content, reason in (
        ("description: [a", "cannot be read .*; the description is left out"),
        ("description: 3", "description: expected a text, found 3; it is left out"),
        ("description: ''", "description: expected a text, found ''; it is left out"),
        ("description: !!python/object/apply:os.getcwd []", "cannot be read .*; the description is left out"),
    ):
        file.write_text(content)
        with pytest.warns(UserWarning, match=reason):
            assert folder_description(folder / "t0") is None


def test_examples_may_be_many_and_have_no_answers(folder: Path) -> None:
    rows = [{"context": f"prompt {i}", "completion": "the answer"} for i in range(40)]
    (folder / "t0" / EXAMPLES).write_text("\n\n".join(map(json.dumps, rows)))
    assert folder_examples(folder / "t0") == tuple(f"prompt {i}" for i in range(40))
    assert folder_examples(folder / "t1") == folder_examples(folder) == ()


def test_examples_of_one_adapter_do_not_become_those_of_another(folder: Path) -> None:
    """In the cache of the Hub, equal files are links to one file."""
    blob = folder.parent / "blob"
    blob.write_text('{"prompt": "shared"}\n')
    for name in ("t0", "t1"):
        (folder / name / EXAMPLES).symlink_to("../../blob")
    told(folder, t0="its own")
    assert folder_examples(folder / "t0") == ("its own",) and folder_examples(folder / "t1") == ("shared",)
    assert blob.read_text() == '{"prompt": "shared"}\n' and not list((folder / "t0").glob(".*"))


def test_examples_go_with_downloads_and_are_not_sent(folder: Path) -> None:
    told(folder, t0="mine alone")
    adapters = list(AdapterPool.open(folder))
    assert f"*/{EXAMPLES}" in adapter_patterns("", False)
    sent = contents_of(folder, adapters, "org/name", "folder")
    assert not [file for file in sent if EXAMPLES in file]


def test_the_command_gives_and_shows_examples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one", "completion": "x"}\n{"prompt": "two"}\n')
    assert run(["pool", "examples", str(folder), "t1", str(file)]) == 0
    assert capsys.readouterr().out == "t1: 2 examples\n"
    assert run(["pool", "examples", str(folder), "t1"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run(["pool", "examples", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"t0": 0, "t1": 2, "t2": 0, "t3": 0}
    assert run(["pool", "examples", str(folder), "t1", str(tmp_path / "missing.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
