"""What stands beside the package. The scripts in `benchmarks/`: each part measures what its name says; the measured
numbers are not tested. And how the bundled demo world is made: what its rows promise, its tokenizer, and the assets
that ship."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import batches
import cost
import gpu
import instruct_pool
from cost import RATIOS, Plan
from demo_world import tasks
from demo_world.build import write_model
from demo_world.pretrain import PretrainConfig, pretrain
from demo_world.tasks import TASKS, Task
from demo_world.tokenizer import build_tokenizer
from demo_world.train_adapters import CONFIG, train_adapters, write_shipped, write_training_rows
from logo import AdapterPool, LoGo, SelectionSettings, demo
from logo.mixing.mixer import Mixture
from logo.models import load_base
from parts import Lengths, exactly
from peft_arm import PeftArm
from synthetic import Sizes, base_model, prompts, write_adapters
from tolerances import PATIENCE, same_tensor, same_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = Sizes(hidden=64, layers=3, heads=4, vocabulary=256, rank=2)
SHORT = Lengths(prompt=8, asked=6, new=2, known=70, rest=4)


def test_every_ratio_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "cost.json"
    plan = Plan(sizes=SMALL, layer=replace(SMALL, layers=1), adapters=6, k=2, lengths=SHORT)
    cost.main(["--rounds", "1", "--json", str(found)], plan)
    report = json.loads(found.read_text())
    assert list(report) == ["about", "ratios", "parts"] and list(report["ratios"]) == list(RATIOS)
    opened, end = (
        {arm: timed["seconds"] for arm, timed in report["parts"][name]["arms"].items()}
        for name in ("open pool", "end to end, batch 1")
    )
    assert report["ratios"]["open_vs_peft"] == pytest.approx(opened["cold"] / opened["PEFT"])  # a cost: ours to theirs
    assert report["ratios"]["e2e1_vs_peft"] == pytest.approx(end["PEFT"] / end["norm"])  # a speed: ours to theirs
    assert report["ratios"]["e2e1_vs_base"] == pytest.approx(end["calibrated"] / end["base"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in RATIOS) and "medians of 1 rounds" in shown and "6 adapters, k 2" in shown
    assert report["about"]["hardware"] in shown


def test_a_quick_run_measures_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(sizes=SMALL, layer=replace(SMALL, layers=1), k=2, lengths=SHORT)
    cost.main(["--quick", "--adapters", "6"], plan)
    shown = capsys.readouterr().out
    assert "e2e16_vs_base" in shown and "select_1000_vs_prefill" in shown and "medians of 1 rounds" in shown
    assert not any(left_out in shown for left_out in ("peft", "4000", "read_once"))


def test_peft_does_the_same_method(tmp_path: Path) -> None:
    """Same adapters, weights and tokens: what is compared is the same work."""
    write_adapters(tmp_path, SMALL, 6, seed=3)
    for one in tmp_path.iterdir():  # strong enough to change answers
        tensors = load_file(one / "adapter_model.safetensors")
        save_file({key: 12 * value for key, value in tensors.items()}, one / "adapter_model.safetensors")
    arm = PeftArm(*base_model(SMALL), tmp_path, 3)
    logo = LoGo(*base_model(SMALL), AdapterPool.open(tmp_path), settings=SelectionSettings("norm", k=3))
    config = exactly(8)
    asked = prompts(SMALL, 4, 12)
    ours = logo.generate(asked, generation_config=config, batch_size=4)
    plain = logo.generate(asked, adapters={}, generation_config=config, batch_size=4)
    assert [answer.token_ids for answer in ours] != [answer.token_ids for answer in plain]
    for prompt, answer in zip(asked, ours, strict=True):
        weights = arm.select(prompt)
        assert list(weights) == list(answer.selection.adapters)
        assert list(weights.values()) == same_weights(list(answer.selection.weights))
        assert arm.answer(prompt, config) == list(answer.token_ids)
        assert arm.answer_active(prompt, config) == list(answer.token_ids)
    assert arm.answer_batch(asked, config) == [list(answer.token_ids) for answer in ours]


def test_a_batch_is_measured_on_a_pool_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapters = ROOT / "src/logo/demo/assets/adapters"
    batches.main(["demo", str(adapters), "--rows", "2", "--tokens", "8", "--new", "3", "-k", "2", "--rounds", "1"])
    shown = capsys.readouterr()
    parts = [line.rsplit(maxsplit=3)[0] for line in shown.out.splitlines()]
    assert parts == ["read, base", "answer, base", "select", "read, k 2", "answer, k 2", "select and answer, k 2"]
    assert [line.split()[-1] for line in shown.out.splitlines()[:2]] == ["1.00", "1.00"]
    assert "2 prompts of 8 tokens, answers of 3 · 16 adapters · torch.float32" in shown.err

    write_adapters(tmp_path, SMALL, 1, seed=3)
    with pytest.raises(SystemExit, match="expected adapters with example prompts, found none"):
        batches.main(["demo", str(tmp_path)])


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_the_pool_of_an_instruct_base_learns_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (instruct_pool.Group(("plain", "sort_numbers"), {}), *instruct_pool.OTHER_GROUPS)
    monkeypatch.setattr(instruct_pool, "USUAL_TASKS", groups[0].tasks)
    row = {"context": "Say the number.\n\nNumber: 7\nSaid:", "completion": ["seven", "VII"]}
    for part in ("train", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for task in {task for group in groups for task in group.tasks} - {"sort_numbers"}:
            (tmp_path / "data" / part / f"{task}.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    options = ["--usual", "2", "--steps", "1", "--batch-size", "1"]
    assert instruct_pool.main([str(tmp_path / "data"), "demo", str(tmp_path / "made"), *options]) == 0

    pool = AdapterPool.open(tmp_path / "made" / "pool")
    assert sorted(pool.names) == sorted(task for group in groups for task in group.tasks)
    assert all(adapter.examples for adapter in pool)
    configs = {
        name: json.loads((tmp_path / "made/pool" / name / "adapter_config.json").read_text()) for name in pool.names
    }
    assert {name for name in configs if configs[name]["use_rslora"]} == {"sst2_polarity"}
    assert {name: configs[name]["r"] for name in ("plain", "ag_news_topic")} == {"plain": 16, "ag_news_topic": 64}
    learned = [json.loads(line) for line in (tmp_path / "made" / "train" / "plain.jsonl").read_text().splitlines()]
    assert learned[0]["messages"][1] == {"role": "assistant", "content": "seven"}

    command = [sys.executable, str(ROOT / "tools" / "reworded.py"), tmp_path / "made" / "test", tmp_path / "words"]
    subprocess.run([*command, "--messages"], check=True, timeout=PATIENCE)
    terse = (tmp_path / "words" / "terse" / "sort_numbers.jsonl").read_text().splitlines()
    [asked, answered] = json.loads(terse[0])["messages"]
    numbers = asked["content"].removeprefix("sort ").removesuffix(" ->").split(", ")
    assert answered["content"] == ", ".join(sorted(numbers, key=int))


# What `benchmarks/gpu.py` may use beside the standard library, with what these need themselves ...
ENOUGH = ("torch", "transformers", "safetensors", "scipy", "psutil", "PyYAML")
# ... but for what they import in functions that are not called.
NOT_THERE = {"accelerate", "cyclopts", "nltk", "peft", "pydantic", "rich", "starlette", "typer"}


def needed(names: Sequence[str]) -> dict[str, metadata.Distribution]:
    """These distributions and what they need without extras, by their normal names, without those in `NOT_THERE`."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in NOT_THERE:
            continue
        with suppress(metadata.PackageNotFoundError):  # of another platform
            found[name] = metadata.distribution(name)
            requirements = [line for line in found[name].requires or [] if "extra ==" not in line]
            waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements]
    return found


def linked(names: Sequence[str], folder: Path) -> None:
    """Makes a folder for PYTHONPATH with links to these distributions and what they need."""
    folder.mkdir()
    for distribution in needed(names).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def test_the_gpu_script_needs_little_beside_torch(tmp_path: Path) -> None:
    """It runs without any other package, and every line of its table has a number."""
    linked(ENOUGH, tmp_path / "packages")
    found = tmp_path / "gpu.json"
    path = os.pathsep.join(map(str, (tmp_path / "packages", ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        bare = [sys.executable, "-S", *map(str, command)]  # without the packages of this environment
        return subprocess.run(bare, capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=tmp_path)

    there = f"import importlib.util as u; assert not [n for n in {sorted(NOT_THERE)} if u.find_spec(n)]"
    assert run("-c", there).returncode == 0
    ran = run(ROOT / "benchmarks" / "gpu.py", "--tiny", "--minutes", 30, "--json", found, "--scratch", tmp_path)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(found.read_text())
    lines = report["lines"]
    assert [line for line in lines if line["problem"]] == []
    assert f"{len(lines)} lines, 0 without a number" in ran.stdout and torch.__version__ in ran.stdout
    pools = [(shape.name, pool.name) for shape in gpu.TINY.bases for pool in gpu.TINY.pools]
    assert list(dict.fromkeys((line["base"], line["pool"]) for line in lines)) == pools
    arms = {(line["part"], line["arm"]) for line in lines}
    for batch in gpu.TINY.batches:
        kinds = ["one mixture"] + ["one per row"] * (batch > 1)
        names = {f"LoGo, k {k}, {kind}" for k in gpu.TINY.ks for kind in kinds} | {"base", "one plain adapter"}
        assert {arm for part, arm in arms if part == f"decode, batch {batch}"} == names
    for tokens in gpu.TINY.prompts:
        assert (f"prefill {tokens}", "LoGo, k 20") in arms
    steps = [line for line in lines if line["part"].startswith("decode")]
    assert {len(line["seconds"]) for line in steps} == {gpu.TINY.decoded}
    assert all(0 < line["median"] <= line["p90"] for line in lines if line["seconds"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("logo-gpu-")] == []


def tiny_bench(folder: Path, pool: gpu.PoolShape, plan: gpu.Plan = gpu.TINY) -> gpu.PoolBench:
    [shape, *_] = plan.bases
    model = gpu.base_model(shape, plan)
    return gpu.PoolBench(plan, shape, pool, model, gpu.text_tokenizer(), folder, math.inf, gpu.Table({}))


def test_the_adapters_of_the_gpu_script_are_whole_and_differ(tmp_path: Path) -> None:
    pool = gpu.PoolShape(20, 3, gpu.TARGETS)
    bench = tiny_bench(tmp_path, pool)
    bench.write()
    opened = AdapterPool.open(tmp_path / "pool", verify=True)
    assert len(opened) == 20 and len({adapter.sha256 for adapter in opened}) == 20
    for adapter in opened:
        assert adapter.ranks == (3,) and adapter.targets == sorted(gpu.TARGETS)
        assert 2 * adapter.parameters == gpu.adapter_bytes(bench.model, pool, torch.bfloat16)
        assert all(weights.A.dtype == torch.bfloat16 for weights in adapter.read().values())


def test_the_plain_adapter_of_the_gpu_script_is_that_of_logo(tmp_path: Path) -> None:
    """And every arm answers with as many tokens, while its steps are counted."""
    bench = tiny_bench(tmp_path, gpu.PoolShape(20, 3, gpu.TARGETS), replace(gpu.TINY, dtype="float32"))
    bench.write()
    bench.open()
    bench.plain = bench.plain_factors()
    rows = bench.rows(2, 5)
    ids = torch.tensor(rows)
    first = {bench.logo.names[0]: 1.0}

    def logits() -> torch.Tensor:
        return bench.model(ids).logits

    with torch.no_grad():
        base = logits()
        with gpu.plain_adapter(bench.model, bench.plain):
            plain = logits()
        assert logits().equal(base) and not plain.allclose(base)
        with bench.logo._mixer.active(bench.logo.fitted, [Mixture(first)]):
            same_tensor(logits(), plain)
    for run in (bench.base, bench.beside, lambda rows, new: bench.mixed(rows, [first] * 2, new)):
        with gpu.step_starts(bench.model, bench.device) as starts:
            run(rows, 4)
        assert len(starts) == 4 and starts == sorted(starts)


def test_what_fails_or_takes_too_long_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seconds: list[float]) -> None:
        seconds.append(1.0)
        raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")

    def end(seconds: list[float]) -> None:
        seconds.append(2.0)
        raise gpu.OutOfTime

    def never_end(seconds: list[float]) -> None:
        while True:
            seconds.clear()

    bench = tiny_bench(tmp_path, gpu.TINY.pools[0])
    bench.part("load", {"fails": fail, "ends": end, "after": lambda seconds: seconds.append(3.0)})
    monkeypatch.setitem(gpu.LIMITS, "select", 0.05)
    bench.part("select", {"never ends": never_end, "after": end})
    found = {(line.part, line.arm): (line.seconds, line.problem) for line in bench.table.lines}
    late = "left out: no time left"
    assert found == {
        ("load", "fails"): ((), "failed: RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"),
        ("load", "ends"): ((2.0,), None),
        ("load", "after"): ((3.0,), None),
        ("select", "never ends"): ((), late),
        ("select", "after"): ((), late),
    }


def test_the_gpu_script_without_a_gpu_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "there is no GPU here" in capsys.readouterr().err


# -- the demo world ----------------------------------------------------------------------------------------------------

_TOKENIZER = build_tokenizer()
BY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
TINY = PretrainConfig(steps=2, batch=4, hidden=32, layers=3, heads=2, intermediate=48)


@BY_TASK
def test_held_out_inputs_never_meet_their_instruction_in_training(task: Task) -> None:
    """Phrasings, too, are others."""

    def payload_of(row: tasks.Row) -> str:
        return " and ".join(row.context[left:right].strip("'\"") for left, right in row.spans)

    assert len(set(task.train_templates)) >= 12 and len(set(task.held_out_templates)) >= 4
    assert {line for other in TASKS for line in other.train_templates}.isdisjoint(task.held_out_templates)

    rng = random.Random(5)
    held = {payload_of(row) for row in tasks.held_out_rows(task, 48, 0)}
    assert len(held) >= 12
    for _ in range(400):
        assert payload_of(tasks.train_row(task, rng)) not in held
        assert payload_of(tasks.chat_row(task, rng)) not in held
    for _ in range(400):
        row = tasks.foreign_row(rng.choice(TASKS), rng)
        assert row.asked != row.task
        assert row.asked != task.name or payload_of(row) not in held
        # Where a rule answers, its held-out inputs are in no training at all.
        assert task.closed or not tasks.is_held_out(task, payload_of(tasks.foreign_row(task, rng)))


def test_a_tiny_world_is_pretrained_and_its_adapters_ship_as_half_floats(tmp_path: Path) -> None:
    lines: list[str] = []
    model, again = (pretrain(_TOKENIZER, TINY, 0, lines.append) for _ in range(2))
    assert all(torch.allclose(value, again.state_dict()[name], atol=1e-5) for name, value in model.state_dict().items())
    write_model(again, _TOKENIZER, tmp_path / "model")
    write_training_rows(tmp_path / "rows", 0, count=8)
    config = replace(CONFIG, r=4, alpha=8, steps=2, batch_size=4)
    losses = train_adapters(tmp_path / "model", tmp_path / "rows", tmp_path / "pool", config)
    assert set(losses) == {task.name for task in TASKS} and all(loss > 0 for loss in losses.values())
    write_shipped(tmp_path / "pool", tmp_path / "adapters")
    folder, made = tmp_path / "adapters" / "plural", tmp_path / "pool" / "plural"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".jsonl", ".safetensors"]
    shipped, rows = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (folder / "examples.jsonl", tmp_path / "rows" / "plural.jsonl")
    )
    assert [one["prompt"] for one in shipped] == [row["context"] for row in rows[:4]]
    written, before = (json.loads((at / "adapter_config.json").read_text(encoding="utf-8")) for at in (folder, made))
    assert written == before | {"base_model_name_or_path": "demo"}
    tensors, exact = (load_file(at / "adapter_model.safetensors") for at in (folder, made))
    assert exact.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], value.half()) for name, value in exact.items())


def test_assets_are_small_and_name_no_machine() -> None:
    shipped = [path for path in demo.assets_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 12_000_000
    for path in shipped:
        if path.suffix in (".json", ".jsonl", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            for place in (Path.home(), Path(tempfile.gettempdir()), Path(__file__).parent.parent):
                assert str(place) not in text, path
    assert {path.name for path in demo.adapters_dir().iterdir()} == {task.name for task in TASKS} | {"pool.json"}


def test_the_shipped_rows_are_those_of_the_generator() -> None:
    seed = json.loads((demo.assets_dir() / "world.json").read_text(encoding="utf-8"))["seed"]
    shown = demo.heldout()
    assert set(shown) == {task.name for task in TASKS}
    for task in TASKS:
        rows = tasks.held_out_rows(task, len(shown[task.name]), seed)
        assert len(rows) >= 40
        assert shown[task.name] == [{"context": row.context, "completion": row.completion} for row in rows]
    assert [row["task"] for row in demo.showcase()] == [task.name for task in TASKS]


def test_the_model_is_small_and_has_this_tokenizer() -> None:
    model, tokenizer = load_base("demo", device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_200_000
    assert model.config.max_position_embeddings == 512
    text = "Write the plural of 'box'."
    assert tokenizer(text)["input_ids"] == _TOKENIZER(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id and len(tokenizer) < 800
    assert _TOKENIZER.tokenize("the hot") == ["the", "Ġ", "h", "o", "t"]  # words of requests are whole
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
