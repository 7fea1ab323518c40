"""`logo pool` on small pools: what `inspect`, `examples` and `export` do, which adapters are left out, and what says
where they act. What is exported answers in PEFT and here as the mixture did, or as PEFT converts it."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from logo import AdapterPool, LoGo
from logo.adapters.activation import EVERYWHERE, Activation, read_notes
from logo.adapters.adapter import open_adapter
from logo.adapters.examples import write_examples
from logo.adapters.sources import adapter_patterns
from logo.adapters.write import write_mixture
from logo.cli.app import run
from logo.cli.pool.publish import contents_of
from logo.errors import StorageError, UsageError
from logo.mixing.mixer import Mixture
from logo.selection.texts import REQUESTS
from make_adapters import (
    CONFIG,
    SAFETENSORS,
    Q,
    V,
    edit_weights,
    load_peft,
    lora_layers,
    tensors,
    write,
    write_drawer,
    write_peft,
)
from test_engine import PROMPTS, engine, ids_of, write_adapter
from tolerances import same_tensor


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Three adapters, of which `dead` does nothing."""
    root = tmp_path / "pool"
    for number, name in enumerate(("a", "deep/b", "dead")):
        write(root / name, tensors(seed=number), base_model_name_or_path="org/base-1B")
    edit_weights(root / "dead", lambda w: [w[key].zero_() for key in w if "lora_B" in key])
    return root


def output(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(["pool", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_inspect_says_how_large_updates_are(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = output(capsys, "inspect", pool)["adapters"]
    assert [one["name"] for one in found] == ["a", "dead", "deep/b"]
    updates = open_adapter(pool / "a").read()
    dense = [(one.scaled_b() @ one.A).double() for path, one in updates.items() if path.endswith((Q, V))]
    assert found[0]["norm"] == pytest.approx(math.hypot(*(float(one.norm()) for one in dense)), rel=1e-5)
    ranks = []
    for one in dense:
        shares = torch.linalg.svdvals(one)[:4] ** 2
        shares /= shares.sum()
        ranks.append(math.exp(-float((shares * shares.log()).sum())))
    assert found[0]["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert (found[1]["norm"], found[1]["effective_rank"]) == (0.0, 0.0)
    assert run(["pool", "inspect", str(pool)]) == 0
    said = capsys.readouterr().out
    assert "effective rank" in said and f"{pool}: 3 adapters usable" in said


def test_inspect_tells_what_would_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_drawer(tmp_path / "pool", ("nan", "kasa"))
    write_peft(tmp_path / "pool" / "whole", tiny.model("llama"), modules_to_save=["lm_head"])
    found = output(capsys, "inspect", tmp_path / "pool", code=1)
    assert [(one["name"], len(one["copies"])) for one in found["adapters"]] == [("good", 0), ("whole", 1)]
    assert [one["name"] for one in found["refused"]] == ["kasa", "nan"]
    assert run(["pool", "inspect", str(tmp_path / "pool")]) == 1
    assert "whole: copies of base weights: used if" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run(["pool", "inspect", str(tmp_path / "empty")]) == 1
    assert "0 adapters usable" in capsys.readouterr().out
    write_peft(tmp_path / "empty" / (long := "plain" * 20))
    (tmp_path / "empty" / "second").symlink_to(long)
    assert run(["pool", "inspect", str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().out
    assert long in said and "left out second: it is a link" in said and "0 refused, 1 left out" in said


def test_nobody_is_left_out_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_drawer(tmp_path / "pool", ("nan", "kasa", "pickled"))
    assert run(["pool", "push", str(root), "org/x", "--dry-run", "--path-in-repo", "."]) == 1
    locking = ["pool", "lock", str(root), "--save", str(tmp_path / "pool.yaml")]
    assert run(locking) == 1
    assert "--on-bad-adapter skip" in capsys.readouterr().err
    assert run([*locking, "--on-bad-adapter", "skip", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["refused"]
    assert sorted(one["name"] for one in told) == ["kasa", "nan", "pickled"] and all(one["reason"] for one in told)
    assert run(["pool", "examples", str(root)]) == 1
    assert "refused" not in capsys.readouterr().out


def test_examples_of_requests_naming_adapters(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a server logs them: those that were scored, cut, or named several adapters, are no examples."""
    write_examples(pool / "dead", ["its own"])

    def logged(name: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"adapters": [name], "weights": [1.0], "named": True, "prompt": prompt, "cut": False, **more}

    entries = [logged("a", f"prompt {n}") for n in range(9)]
    entries += [logged("a", "scored", named=False), logged("a", "long", cut=True), logged("a", "Both  of them")]
    entries += [logged("deep/b", text) for text in ("both of THEM", "one", "two", REQUESTS[0])]  # as `logo verify` asks
    entries += [logged(name, f"{name} {n}") for name in ("dead", "gone") for n in "123"]
    entries.append(logged("a", "two adapters", adapters=["a", "dead"], weights=[0.5, 0.5]))
    log = tmp_path / "day.log"
    lines = [json.dumps({"logger": "logo.access", "selections": [one]}) for one in entries]
    log.write_text("\n".join([*lines, "another program's line", '{"logger": "logo.access"}', ""]))
    assert output(capsys, "examples", pool, "--from-log", log) == {"a": 8, "dead": 1, "deep/b": 0}
    assert AdapterPool.open(pool)["a"].examples == tuple(f"prompt {n}" for n in range(8))
    named = [f'{{"prompt": "row {n}", "adapter": "deep/b"}}\n' for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(["\ufeff", *named]))
    assert run(["pool", "examples", str(pool), "--from-log", str(tmp_path / "rows.jsonl")]) == 0
    assert "   3 deep/b (new)" in capsys.readouterr().out
    assert run(["pool", "examples", str(pool), "a", "--from-log", str(log)]) == 2
    (tmp_path / "rows.jsonl").write_text('{"prompt": "no name"}\n')
    assert run(["pool", "examples", str(pool), "--from-log", str(tmp_path / "rows.jsonl")]) == 1
    assert "found no prompt that names its adapter" in capsys.readouterr().err


def test_examples_need_a_place_where_they_can_be_stored(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "examples", "org/loras"]) == 2
    assert "make a manifest first: `logo pool lock org/loras --save pool.yaml`" in capsys.readouterr().err


# ---- where adapters act ---------------------------------------------------------------------------------------------

LAST = {"activation": "last:4"}


def note(folder: Path, **said: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").write_text(json.dumps(said))
    return folder


def activations(folder: Path) -> dict[str, Activation]:
    pool = AdapterPool.open(folder)
    return {adapter.name: adapter.activation for adapter in pool}


@pytest.fixture
def acting(tmp_path: Path) -> Path:
    """Pools in a pool: of the last four tokens, of the last two, and an adapter with an invocation."""
    root = note(tmp_path / "pool", **LAST)
    for number, name in enumerate(("a", "deep/b", "two/c", "two/deep/d", "plain/e", "broken/f")):
        write(root / name, tensors(seed=number))
    write(root / "two" / "g", tensors(seed=9), alora_invocation_tokens=[7, 8])
    note(root / "two", activation="last:2", recipe="r 4")
    note(root / "plain", recipe="of its own")  # which says nothing of it
    (root / "broken" / "pool.json").write_text("{")
    return root


def test_notes_that_cannot_be_read_now_are_no_missing_ones(acting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, adapters would act on other tokens: now, and by the cache later."""

    def failing(*_: object, **__: object) -> str:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(StorageError, match=r"pool\.json: cannot be read: Too many open files"):
            read_notes(acting)
    assert read_notes(acting) == LAST


EXPECTED = {
    "a": Activation(last=4),
    "deep/b": Activation(last=4),
    "two/c": Activation(last=2),
    "two/deep/d": Activation(last=2),
    "two/g": Activation((7, 8)),
    "plain/e": Activation(last=4),
    "broken/f": Activation(last=4),
}


@pytest.mark.filterwarnings("ignore:.*pool.json is ignored:UserWarning")
def test_adapters_act_where_the_nearest_notes_say(
    acting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a pool, in part, alone, from their own folder, added, and in a manifest; and `inspect` shows it."""
    assert activations(acting) == EXPECTED
    for part in ("a", "deep", "two", "two/deep", "two/deep/d", "plain", "plain/e", "broken"):
        above = part if (acting / part / "adapter_config.json").is_file() else f"{part}/"
        found = [(name, acts) for name, acts in EXPECTED.items() if f"{name}/".startswith(above)]
        assert list(activations(acting / part).values()) == [acts for _, acts in sorted(found)]
    for name, acts in EXPECTED.items():
        [added] = AdapterPool().add(acting / name)
        [opened] = AdapterPool.open([acting / name])
        assert added.activation == opened.activation == acts
    assert run(["pool", "lock", str(acting), "--save", str(acting.parent / "pool.yaml")]) == 0
    assert activations(acting.parent / "pool.yaml") == EXPECTED
    capsys.readouterr()
    told = output(capsys, "inspect", acting)["adapters"]
    assert {one["name"]: one["activation"] for one in told} == {name: str(one) for name, one in EXPECTED.items()}
    assert run(["pool", "inspect", str(acting)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("activation")] == [
        "activation last:4: a, broken/f, deep/b, plain/e",
        "activation last:2: two/c, two/deep/d",
        "activation invocation: two/g",
    ]
    monkeypatch.chdir(acting / "a")
    for place in (".", Path(os.curdir)):
        [adapter] = AdapterPool.open(place)
        assert adapter.activation == open_adapter(place).activation == Activation(last=4)


def test_what_is_sent_says_it(acting: Path) -> None:
    (acting / "broken" / "pool.json").unlink()
    sent = contents_of(acting, list(AdapterPool.open(acting)), "org/loras", "tasks")
    noted = [file.removesuffix("pool.json") for file in sent if file.endswith("pool.json")]
    assert noted == ["tasks/plain/", "tasks/", "tasks/two/"]
    [alone] = AdapterPool.open(acting / "a")
    with pytest.raises(UsageError, match=r"acts on last:4 because of a pool\.json in the folder above"):
        contents_of(acting / "a", [alone], "org/loras", "a")
    note(acting / "deep", k=3)
    with pytest.raises(UsageError, match=r"acts on last:4 because of a pool\.json in the folder above"):
        contents_of(acting / "deep", list(AdapterPool.open(acting / "deep")), "org/loras", "deep")
    [spoken] = AdapterPool.open(acting / "two" / "g")  # says it itself
    assert "g/adapter_config.json" in contents_of(acting / "two" / "g", [spoken], "org/loras", "g")


def test_what_is_fetched_for_one_adapter_says_it_too() -> None:
    above = {"pool.json", "tasks/pool.json", "tasks/more/pool.json"}
    assert above < set(adapter_patterns("tasks/more/a", False))
    assert "pool.json" in adapter_patterns("a", False)
    assert adapter_patterns("", False).count("pool.json") == 1


@pytest.mark.parametrize("around", [{}, LAST, {"activation": "everywhere"}], ids=str)
@pytest.mark.parametrize("own", [EVERYWHERE, Activation(last=3), Activation((5,))], ids=str)
def test_a_mixture_acts_where_its_adapters_do_anywhere(own: Activation, around: dict[str, str], tmp_path: Path) -> None:
    linear = [path for path, module in tiny.model("llama").named_modules() if isinstance(module, nn.Linear)]
    write(tmp_path / "a", tensors(seed=0), **({"alora_invocation_tokens": [*own.tokens]} if own.tokens else {}))
    if own.last:
        note(tmp_path / "a", activation=str(own))
    adapter = open_adapter(tmp_path / "a")
    home = note(tmp_path / "home", **around) if around else tmp_path / "home"
    write_mixture([(adapter, 0.5)], home / "mix" / "half", linear)
    assert activations(home) == {"mix/half": own}
    assert open_adapter(home / "mix" / "half").activation == own
    if not around and own.everywhere:
        assert not list(home.rglob("pool.json"))


# ---- exported: a mixture, and adapters whose initialisation changed the base ----------------------------------------

MIXTURE = {"tasks/t0": 0.5, "tasks/t2": -0.25, "tasks/t3": 2.0, "tasks/t1": 0.0}  # unequal ranks and targets


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_peft_and_our_reader_answer_with_it(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    kinds = [("q_proj", "qkv_proj", "c_attn"), ("down_proj", "c_proj"), ("q_proj", "o_proj", "qkv_proj", "c_attn")]
    for i, targets in enumerate(kinds):
        write_adapter(tmp_path / "pool" / f"t{i}", model, targets, rank=i + 1, seed=i)
    logo = engine(model, tmp_path / "pool", unscorable="skip", k=1)
    mixture = {"t0": 0.7, "t1": -0.4, "t2": 1.5}
    assert logo.save_mixture(mixture, tmp_path / "all" / "mixture") == tmp_path / "all" / "mixture"
    pool = AdapterPool.open(tmp_path / "all")
    [written] = pool
    assert written.ranks[-1] == 4  # t0 and t2 meet on a module
    expected = logo.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
    reader = engine(model, tmp_path / "all", unscorable="skip", k=1)
    again = reader.generate(PROMPTS, adapters={"mixture": 1.0}, max_new_tokens=12)
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]
    assert {one.token_ids for one in expected} != {one.token_ids for one in logo.generate(PROMPTS, adapters={})}
    theirs = load_peft(tmp_path / "all" / "mixture", tiny.model(name))
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        [ids] = ids_of(logo, [prompt])
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=2)
        assert tuple(found[0, len(ids) :].tolist()) == answer.token_ids
        with logo._mixer.active(logo.fitted, [Mixture(mixture)]):
            ours = logits(model, ids)
        same_tensor(logits(theirs, ids), ours)


def test_names_of_modules_are_short_where_all_of_that_name_are_adapted(llama: nn.Module, tmp_path: Path) -> None:
    write_adapter(tmp_path / "pool" / "even", llama, ("q_proj",), rank=2, seed=0)
    write_adapter(tmp_path / "pool" / "odd", llama, ("layers.1.self_attn.v_proj", "q_proj"), rank=3, seed=1)
    logo = engine(llama, tmp_path / "pool", k=1)

    def config(mixture: dict[str, float], name: str) -> Any:
        return json.loads((logo.save_mixture(mixture, tmp_path / name) / "adapter_config.json").read_text())

    even = config({"even": 1.0}, "a")
    assert (even["target_modules"], even["r"], even["rank_pattern"]) == (["q_proj"], 2, {})
    both = config({"even": 1.0, "odd": 1.0}, "b")
    assert both["r"] == both["lora_alpha"] == 5 and list(both["rank_pattern"].values()) == [3]
    paths = [f"model.layers.{i}.self_attn.{name}_proj" for i, name in ((0, "q"), (1, "q"), (1, "v"), (2, "q"))]
    assert both["target_modules"] == paths == sorted(lora_layers(load_peft(tmp_path / "b")))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    logo = engine(llama, adapters, unscorable="skip", k=1)
    for nothing in ({}, {"tasks/t1": 0.0}):
        with pytest.raises(UsageError, match="has no adapter, so there is nothing to write"):
            logo.save_mixture(nothing, tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="exists already and is not an empty folder"):
        logo.save_mixture(MIXTURE, tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be written"):
        logo.save_mixture(MIXTURE, tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    logo.save_mixture(MIXTURE, str(tmp_path / "empty"))
    assert len(AdapterPool.open(tmp_path / "empty")) == 1


@pytest.mark.slow
def test_the_command_writes_what_a_prompt_selects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, place = "What is 7 plus 5?", ["--base-model", "demo", "--device", "cpu"]
    assert run(["pool", "export", prompt, *place, "--save", str(tmp_path / "pool" / "sums")]) == 0
    assert "add_numbers" in capsys.readouterr().err
    demo = LoGo.from_pretrained("demo", device="cpu", signal="calibrated")
    answer = demo.generate(prompt)
    other = LoGo.from_pretrained("demo", tmp_path / "pool", device="cpu")
    assert other.generate(prompt, adapters={"sums": 1.0}).token_ids == answer.token_ids
    forced = ["--adapter", "french=0.5", "--adapter", "plural"]
    assert run(["pool", "export", *forced, *place, "--save", str(tmp_path / "two")]) == 0
    assert run(["pool", "export", *forced, *place, "--save", str(tmp_path / "two")]) == 2
    for more in (forced, ["--initial", str(tmp_path)]):
        assert run(["pool", "export", prompt, *more, *place, "--save", str(tmp_path / "three")]) == 2
        assert "expected one of: a prompt, which selects; --adapter NAME=WEIGHT" in capsys.readouterr().err
    assert run(["pool", "export", "--initial", str(tmp_path), "--save", str(tmp_path / "out")]) == 2
    assert "name the folder of the trained adapter with --adapters" in capsys.readouterr().err


IDS = tiny.prompts([9])[0]


def convert(root: Path) -> int:
    named = {"--adapters": "trained", "--initial": "initial", "--save": "out"}
    return run(["pool", "export", *(word for option, name in named.items() for word in (option, str(root / name)))])


def trained_from(folder: Path, **settings: Any) -> torch.Tensor:
    """An adapter whose initialisation changed the base, as PEFT leaves it: `initial`, `trained`, and PEFT's own
    conversion as `plain`. Returns what the trained model answers."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny.model("llama"), config)
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(folder / "initial")
        wrapped.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
        generator = torch.Generator().manual_seed(0)
        for layer in lora_layers(wrapped).values():
            for side in (layer.lora_A, layer.lora_B):
                weight = side["default"].weight.data
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        wrapped.save_pretrained(folder / "trained")
        answer = logits(wrapped, IDS)
        if not (settings.get("use_rslora") and settings.get("alpha_pattern")):  # which PEFT refuses
            wrapped.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial"))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1.*q_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns", "rslora_patterns"],
)
def test_as_peft_converts(tmp_path: Path, init: str, settings: dict[str, Any]) -> None:
    answer = trained_from(tmp_path, init_lora_weights=init, **settings)
    (tmp_path / "trained" / "pool.json").write_text(json.dumps(LAST))
    assert convert(tmp_path) == 0 and json.loads((tmp_path / "out" / "pool.json").read_text()) == LAST
    same_tensor(logits(load_peft(tmp_path / "out"), IDS), answer)  # on the untouched base
    if (tmp_path / "plain").exists():
        theirs, ours = (load_file(tmp_path / name / SAFETENSORS) for name in ("plain", "out"))
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            same_tensor(ours[key], tensor)
        expected, config = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("plain", "out"))
        assert config.pop("lora_alpha") == pytest.approx(expected.pop("lora_alpha"))
        assert sorted(config.pop("target_modules")) == sorted(expected.pop("target_modules"))  # PEFT's is a set
        assert config == expected


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trained, initial, said in (
        ({"init_lora_weights": "pissa"}, {"lora_alpha": 9}, "another shape or scale at model.layers.0"),
        ({"init_lora_weights": "pissa"}, {"weights": tensors(rank=2), "r": 2}, "another shape or scale"),
        ({"init_lora_weights": "olora"}, {"weights": tensors({"lm_head": (32, 96)})}, "adapts other modules"),
        ({"init_lora_weights": "pissa"}, {"weights": tensors(seed=0)}, "is the same: give that before training"),
        ({}, {}, "init_lora_weights is True, which names no initialisation that changed the base weights"),
        ({"init_lora_weights": "pissa", "use_dora": True}, {}, "it is a DoRA adapter"),
    ):
        write(tmp_path / "trained", tensors(seed=0), **trained)
        write(tmp_path / "initial", **{"weights": tensors(seed=1), **initial})
        assert convert(tmp_path) == 1
        error = capsys.readouterr().err
        assert "adapter 'trained'" in error and said in error and not (tmp_path / "out").exists()
