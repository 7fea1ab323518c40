"""A PEFT folder as an `Adapter`: equal to what PEFT loads from it, or refused in one line that says why."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import tiny
from logo.adapters.adapter import Adapter, open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.peft import LoraConfig, Refusal, module_path, parse_config, read_raw
from logo.errors import AdapterError
from make_adapters import (
    CONFIG,
    LLAMA,
    ONE_KEY,
    PICKLE,
    REFUSED,
    SAFETENSORS,
    SEEN_WHEN_READ,
    Q,
    V,
    damage,
    edit_config,
    everyones_folder,
    load_peft,
    lock,
    lora_layers,
    settings,
    tensors,
    write,
    write_drawer,
    write_peft,
)
from tolerances import same_tensor


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawer(tmp_path_factory.mktemp("drawer"))


def refusal(folder: Path, **options: Any) -> AdapterError:
    """The error that opening and reading the folder ends in; always one line that begins with the name."""
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder, **options).read()
    error = caught.value
    assert str(error) == f"adapter {folder.name!r}: {error.reason}"
    assert len(str(error).splitlines()) == 1
    return error


@pytest.mark.parametrize("kind", REFUSED)
def test_each_kind_that_cannot_be_mixed_is_refused_with_its_reason(drawer: Path, kind: str) -> None:
    assert refusal(drawer / kind).reason.startswith(REFUSED[kind][1])
    if kind in SEEN_WHEN_READ:  # others are refused when they are opened
        open_adapter(drawer / kind)
    else:
        with pytest.raises(AdapterError):
            open_adapter(drawer / kind)


ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "layers_pattern": ("llama", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "regex": ("llama", {"target_modules": r".*\.(0|2)\.self_attn\.(q|o)_proj"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"], "save": {"save_embedding_layers": False}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "with_biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_read_is_what_peft_loads(tmp_path: Path, kind: str) -> None:
    base, changes = ACCEPTED[kind]
    write_peft(tmp_path, tiny.model(base), **changes)
    layers = lora_layers(load_peft(tmp_path, tiny.model(base)))
    adapter = open_adapter(tmp_path).fit(BaseLayout.of(tiny.model(base)))
    weights = adapter.read()
    assert set(adapter.modules) == set(layers) == set(weights)
    for path, layer in layers.items():
        assert adapter.modules[path].rank == layer.r["default"]
        assert weights[path].scaling == layer.scaling["default"]
        assert torch.equal(weights[path].A, layer.lora_A["default"].weight)
        assert torch.equal(weights[path].B, layer.lora_B["default"].weight)
        delta = weights[path].scaled_b() @ weights[path].A  # (out, in)
        expected = layer.get_delta_weight("default")
        same_tensor(delta.T if layer.fan_in_fan_out else delta, expected)
    assert adapter.config.unknown == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_the_type_they_are_stored_in_and_scale_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = tensors(dtype=dtype)
    adapter = open_adapter(write(tmp_path, stored, lora_alpha=3))
    weights = adapter.read()[f"model.layers.0.{Q}"]
    assert weights.A.dtype == weights.B.dtype == dtype
    assert torch.equal(weights.A, stored[ONE_KEY])
    assert weights.scaled_b().dtype == torch.float32
    assert torch.equal(weights.scaled_b(), stored[ONE_KEY.replace("lora_A", "lora_B")].float() * 0.75)


PATH = f"model.layers.0.{Q}"
VARIANTS = {
    "in memory": f"base_model.model.{PATH}.lora_A.default.weight",
    "adapter name with dots": f"base_model.model.{PATH}.lora_A.flanv2.wmt16.weight",
    "no prefix": f"{PATH}.lora_A.weight",
    "fsdp": f"base_model.model._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.{Q}.lora_A.weight",
}


@pytest.mark.parametrize("key", VARIANTS.values(), ids=VARIANTS)
def test_wrappers_that_training_tools_leave_in_keys_are_removed(tmp_path: Path, key: str) -> None:
    a, b = tensors({PATH: (32, 32)}, prefix="").values()
    adapter = open_adapter(write(tmp_path, {key: a, key.replace("lora_A", "lora_B"): b}))
    assert set(adapter.fit(BaseLayout.of(tiny.model("llama"))).modules) == {PATH}
    assert torch.equal(next(iter(adapter.read().values())).A, a)


WRAPPERS = st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "base_layer"]), max_size=2)


@given(st.data())
def test_wrappers_anywhere_leave_the_path(data: st.DataObject) -> None:
    segments = PATH.split(".")
    front = data.draw(st.sampled_from(["", "base_model.model.", "_orig_mod.base_model.model."]))
    wrapped = [part for segment in segments for part in (segment, *data.draw(WRAPPERS))]
    assert module_path(front + ".".join(wrapped)) == PATH


def test_factors_of_other_shapes_are_refused_with_both(tmp_path: Path) -> None:
    """In three dimensions, of a convolution, of rank 0, in one dimension, and transposed."""
    key_b, convolution = ONE_KEY.replace("lora_A", "lora_B"), [32, 4, 1, 1]
    shapes: Any = (([4, 32, 1], [32, 4]), ([4, 32], convolution), ([0, 32], [32, 0]), ([4], [4]), ([32, 4], [32, 4]))
    for shape_a, shape_b in shapes:
        folder = write(tmp_path / "a", {ONE_KEY: torch.ones(shape_a), key_b: torch.ones(shape_b)})
        assert f"has lora_A {shape_a} and lora_B {shape_b}; expected" in refusal(folder).reason


@budget(max_examples=60)
@given(st.data())
def test_a_damaged_file_is_refused_or_an_adapter(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    write(folder, tensors({PATH: (32, 32)}))
    content = bytearray((folder / SAFETENSORS).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / SAFETENSORS).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        weights = open_adapter(folder).read()
    except AdapterError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(bool(w.A.isfinite().all() and w.B.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("locked", [CONFIG, SAFETENSORS, "."])
def test_what_may_not_be_read_is_refused(locked: str) -> None:
    with everyones_folder() as shared:
        folder = write(shared / "a")
        open_adapter(folder).read()  # imports everything before rights are gone
        lock(folder / locked, shared)
        assert "ermission denied" in refusal(folder).reason


@pytest.mark.parametrize("use", [Adapter.read, Adapter.verify, lambda adapter: adapter.sha256])
def test_what_is_in_a_file_later_is_never_taken_for_what_was_opened(tmp_path: Path, use: Any) -> None:
    """Nor is a verdict of it, or its digest; and nothing is read with the old scale."""
    write(tmp_path / "a", lora_alpha=8)
    read, unread = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "a")
    read.read()
    write(tmp_path / "a", tensors(seed=3), lora_alpha=16)
    for adapter in (read, unread):
        with pytest.raises(AdapterError, match="it has changed since it was opened; open the pool again"):
            use(adapter)
    assert open_adapter(tmp_path / "a").read()[PATH].scaling == 4
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterError, match=rf"adapter 'a': {SAFETENSORS} cannot be read: No such file") as caught:
        use(unread)
    assert len(str(caught.value).splitlines()) == 1


def test_what_was_read_stays_whatever_happens_to_the_file(tmp_path: Path) -> None:
    """It may be written to in place, or be cut short, on which a view of it would end the process."""
    adapter = open_adapter(write(tmp_path / "a"))
    weights = adapter.read()
    before = {path: (one.A.clone(), one.B.clone()) for path, one in weights.items()}
    content = (tmp_path / "a" / SAFETENSORS).read_bytes()
    with open(tmp_path / "a" / SAFETENSORS, "r+b") as file:
        file.seek(-len(content) // 2, os.SEEK_END)
        file.write(b"\x11" * (len(content) // 2))
    for path, one in weights.items():
        assert torch.equal(one.A, before[path][0]) and torch.equal(one.B, before[path][1])
    os.truncate(tmp_path / "a" / SAFETENSORS, 0)
    for path, one in weights.items():
        assert torch.equal(one.A, before[path][0]) and torch.equal(one.B, before[path][1])


def test_reading_some_modules_reads_only_those(tmp_path: Path) -> None:
    adapter = open_adapter(damage(write(tmp_path), float("nan")))
    other = f"model.layers.0.{V}"
    assert set(adapter.read([other])) == {other}
    with pytest.raises(AdapterError, match="holds NaN"):
        adapter.read([PATH])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def pickled(folder: Path, content: object) -> Path:
    write(folder)
    (folder / SAFETENSORS).unlink()
    torch.save(content, folder / PICKLE)
    return folder


def test_a_pickle_is_read_when_it_is_allowed(tmp_path: Path) -> None:
    write_peft(tmp_path, save={"safe_serialization": False})
    adapter = open_adapter(tmp_path, allow_pickle=True)
    weights = adapter.read()
    for path, layer in lora_layers(load_peft(tmp_path)).items():
        assert torch.equal(weights[path].A, layer.lora_A["default"].weight)
    assert adapter.sha256 == hashlib.sha256((tmp_path / PICKLE).read_bytes()).hexdigest()
    write(tmp_path)  # safetensors win over a pickle beside them
    (tmp_path / PICKLE).write_bytes(b"never read")
    assert set(open_adapter(tmp_path, allow_pickle=True).read()) == set(LLAMA)


def test_invocation_tokens_are_tokens_of_the_base_model(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path, tensors(), alora_invocation_tokens=[10**6]))
    with pytest.raises(AdapterError, match=r"its invocation tokens are \[1000000\]; the base model knows \d+ tokens"):
        adapter.fit(BaseLayout.of(tiny.model("llama")))


def test_a_pickle_that_runs_code_does_not_run_and_nobody_is_told_how_to(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = pickled(tmp_path / "evil", tensors() | {"x": Evil(mark)})
    reason = refusal(folder, allow_pickle=True).reason
    unsafe = "it holds objects other than tensors, or is damaged; no code in it was run"
    assert reason == f"{PICKLE} cannot be read: {unsafe}"
    assert not mark.exists()
    torch.load(folder / PICKLE, weights_only=False)
    assert mark.exists()  # so the trap was a real one


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    sparse = {key: value.to_sparse() for key, value in tensors().items()}
    for content in (list(tensors().values()), {1: torch.ones(2)}, {"step": 3}, {"model": tensors()}, sparse):
        reason = refusal(pickled(tmp_path / "a", content), allow_pickle=True).reason
        assert reason == f"{PICKLE} cannot be read: not a dictionary of dense tensors by name"


def test_what_a_pickle_held_when_it_was_read_counts_not_what_it_holds(tmp_path: Path) -> None:
    """For its tensors, its verdict, and its digest, under which a calibration is kept."""
    nan = tensors() | {ONE_KEY: torch.full((4, 32), torch.nan)}
    folders = [pickled(tmp_path / name, held) for name, held in (("a", tensors()), ("b", nan))]
    good, bad = (open_adapter(folder, allow_pickle=True) for folder in folders)
    content, before = (tmp_path / "a" / PICKLE).read_bytes(), good.read()[PATH]
    for name in "ab":
        torch.save(tensors(seed=3), tmp_path / name / PICKLE)
    assert torch.equal(good.read()[PATH].B, before.B)
    assert good.sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(AdapterError, match="holds NaN"):
        bad.verify()


def test_a_link_has_a_name_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "run7")
    (tmp_path / "best").symlink_to("run7")
    assert open_adapter(tmp_path / "best").name == open_adapter(tmp_path / "run7" / ".." / "best").name == "best"


def test_a_git_lfs_pointer_is_called_what_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SAFETENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refusal(tmp_path).reason


# ---- the configuration: patterns ------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]

# Overlapping on purpose: which of two matching keys wins depends on their order.
KEYS = st.sampled_from(
    [
        *("q_proj", "v_proj", "proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"),
        *("model.layers.1.self_attn.q_proj", ".*", r".*\.v_proj", "q_proj|v_proj", "(q|v)_proj", ".*_proj"),
        *(r"layers\.[01]\..*", r"layers\.\d+\.self_attn\.(q|v)_proj", "^model.layers.1.*", "^layers.0.*", "1.*"),
        *("(model.)?layers.1.*", r".*layers\.\d+\..*v_proj"),
    ]
)


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of up to four keys, in any order."""
    return st.lists(st.tuples(KEYS, values), max_size=4, unique_by=lambda item: item[0]).map(dict)


RANKS, ALPHAS = patterns(st.integers(1, 6)), patterns(st.integers(1, 64) | st.floats(0.5, 64))

# Anything JSON can say.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1, text
    return text


@pytest.mark.slow
@budget(max_examples=20)
@given(RANKS, ALPHAS, st.integers(1, 5), st.integers(1, 20), st.booleans())
def test_ranks_and_scales_are_those_of_the_loaded_peft_model(
    tmp_path_factory: pytest.TempPathFactory, ranks: Any, alphas: Any, r: int, alpha: int, rslora: bool
) -> None:
    folder = tmp_path_factory.mktemp("patterns") / "adapter"
    base = tiny.model("llama", num_hidden_layers=11)  # of which two end in 0
    made = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    write_peft(folder, copy.deepcopy(base), r=r, lora_alpha=alpha, **made)
    edit_config(folder, rank_pattern=ranks, alpha_pattern=alphas)  # PEFT saves them sorted by key
    expected = {p: (m.r["default"], m.scaling["default"]) for p, m in lora_layers(load_peft(folder, base)).items()}
    assert {p: (m.rank, m.scaling) for p, m in open_adapter(folder).modules.items()} == expected
    assert len(expected) == 22


def test_a_rank_pattern_that_lost_its_order_when_peft_saved_it_is_refused(tmp_path: Path) -> None:
    """As PEFT up to 0.21 sorted them; it cannot load such an adapter either."""
    write_peft(tmp_path, rank_pattern={"q_proj": 3, ".*": 2})
    edit_config(tmp_path, rank_pattern={".*": 2, "q_proj": 3})
    with pytest.raises(AdapterError, match=r"gives rank 2 to module .*q_proj, but its tensors have rank 3"):
        open_adapter(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_peft(tmp_path)
    edit_config(tmp_path, rank_pattern={"q_proj": 3, ".*": 2})
    assert open_adapter(tmp_path).ranks == (2, 3)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key",
    [
        *(r"(\w+\.?)+x", "(.*)*x", r"(?:(?:\w*)*)*x", r"(\w|\.|[a-z])*x", "(m?o?d?){60}x", "(m|mo|mod){1,60}x"),
        *(".*" * 12 + "x", ".?" * 30 + ".{30}x", "(|.)?" * 30 + "x", "(.*|m|)" * 30 + "x"),
        *(r"(.*)(.*)\3\4\3\4x", r"(?x:(\w+) +)x", "(?=(.*)*x)y", "x)|(.*)*(x"),
    ],
)
def test_a_pattern_that_takes_for_ever_is_refused(setting: str, key: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    edit_config(folder, **{setting: {key: 4}})
    reason = refusal(folder).reason
    assert reason.startswith(f"{setting} has the key {json.dumps(key)[:40]}")
    assert "may take for ever to match: expected names of modules, with few wildcards" in reason


@pytest.mark.parametrize(
    "key",
    [
        *(".*", r".*\.layers\.\d+\..*proj", r"(model\.)?layers\.\d{1,2}\.self_attn\.(q|k|v)_proj", r"[^.]*_proj"),
        "|".join(rf"model\.layers\.{layer}\.self_attn\.{name}" for layer in range(99) for name in ("q_proj", "v_proj")),
        rf"layers\.({'|'.join(map(str, range(99)))})\.(self_attn|mlp)\.(q_proj|v_proj|up_proj)",
    ],
)
def test_a_pattern_as_people_write_them_is_matched(key: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", lora_alpha=8)
    edit_config(folder, alpha_pattern={key: 16})
    assert {module.scaling for module in open_adapter(folder).modules.values()} == {4.0}


def test_a_name_that_is_too_long_to_be_one_is_refused(tmp_path: Path) -> None:
    """A search in it would take as many steps as the square of its length."""
    key = f"base_model.model.{'.lora_A' * 100}.weight"
    folder = write(tmp_path / "a", {**tensors(), key: torch.ones(2, 2)})
    assert refusal(folder).reason.endswith(f"has a name of {len(key)} characters, more than 500")


def test_every_setting_of_the_installed_peft_is_known() -> None:
    assert parse_config(dict.fromkeys(FIELDS) | settings(bias="none")).unknown == ()


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_unknown_settings_are_listed_and_change_nothing(extra: dict[str, Any]) -> None:
    extra = {key: value for key, value in extra.items() if key not in FIELDS}
    config = parse_config(extra | settings())
    off = {key for key, value in extra.items() if json.dumps(value) in ("null", "false", "[]", "{}")}
    assert config.unknown == tuple(sorted(extra.keys() - off))
    assert dataclasses.replace(config, unknown=()) == parse_config(settings())


OFF = ["use_qalora", "target_parameters", "trainable_token_indices", "layer_replication", "kasa_config", "lora_bias"]


def test_what_is_off_or_says_nothing_about_the_mixture_is_no_reason_to_refuse() -> None:
    silent = dict.fromkeys(("rank_pattern", "alpha_pattern", "target_modules", "use_rslora"))
    for changes in (*({key: off} for key in OFF for off in (None, False, [])), silent):
        assert parse_config(settings(base_model_name_or_path={"no": "name"}, **changes)) == LoraConfig(r=4, alpha=8.0)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "astra", "loftq"])
def test_initialisations_that_change_the_base_are_refused_with_the_way_out(init: str) -> None:
    """For LoftQ there is none: not even a conversion."""
    way = "quantised" if init == "loftq" else "path_initial_model_for_weight_conversion"
    for unconverted in {False, init == "loftq"}:
        with pytest.raises(Refusal, match=f'init_lora_weights is "{init}".*{way}') as refusal:
            parse_config(settings(init_lora_weights=init), unconverted=unconverted)
        assert ("--initial" in one_line(refusal.value)) == (init != "loftq")


def test_a_value_that_cannot_be_used_is_shown_with_what_was_expected() -> None:
    for changes, reason in (
        ({"r": "4"}, 'r must be a positive whole number, found "4"'),
        ({"r": 4.5}, "r must be a positive whole number, found 4.5"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, found NaN"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, found 1000"),
        ({"rank_pattern": ["q_proj"]}, 'rank_pattern must be an object of pattern: number, found ["q_proj"]'),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a finite number, found null"),
        ({"alpha_pattern": {"(?i)q_proj": 2}}, 'alpha_pattern has the key "(?i)q_proj", which is no regular'),
        ({"use_rslora": "false"}, 'use_rslora must be true or false, found "false"'),
        ({"peft_type": None}, 'peft_type is null; only "LORA"'),
        ({"bias": ["x" * 1000]}, "bias is"),
    ):
        with pytest.raises(Refusal) as refusal:
            parse_config(settings(**changes))
        assert one_line(refusal.value).startswith(reason)
        assert len(str(refusal.value)) < 250


@budget(max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_values_give_a_config_or_one_line(changes: dict[str, Any]) -> None:
    try:
        config = parse_config(settings() | changes)
    except Refusal as refusal:
        one_line(refusal)
    else:
        assert config.rank("model.layers.0.self_attn.q_proj") > 0
        assert math.isfinite(config.scaling("model.layers.0.self_attn.q_proj", 4))


@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b'{"r": ' + b"9" * 5000 + b"}")
@example(content=b"[" * 100_000)
def test_any_file_gives_a_config_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_config"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(Refusal) as refusal:  # none of these says "LORA"
        parse_config(read_raw(folder))
    one_line(refusal.value)
