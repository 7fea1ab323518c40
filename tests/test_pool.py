"""`AdapterPool`: what is found in a folder, in which order, and what happens to the bad ones."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

import tiny
from logo import AdapterPool, LoGo
from logo.adapters.adapter import Adapter, open_adapter
from logo.adapters.examples import write_examples
from logo.adapters.layout import BaseLayout, LinearShape
from logo.adapters.pool import DEFAULT_K, CurrentPool, open_pool
from logo.adapters.sources import Source, default_k, parse_sources, pool_sources, spec_of
from logo.errors import LoGoError, PoolError, StorageError, UsageError
from logo.models import DEMO_FOLDER, DEMO_K
from logo.selection.settings import SelectionSettings
from make_adapters import (
    CONFIG,
    REFUSED,
    SAFETENSORS,
    Q,
    damage,
    everyones_folder,
    lock,
    tensors,
    write,
    write_drawer,
    write_peft,
)
from test_engine import tokenizer

TINY = tensors({"layers.0.q": (2, 2)}, rank=1)
FITS = BaseLayout({"layers.0.q": LinearShape(2, 2)})


def put(root: Path, *names: str) -> Path:
    """Adapters of a few bytes, below `root`."""
    for name in names:
        write(root / name, TINY, r=1)
    return root


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return open_adapter(put(tmp_path_factory.mktemp("one"), "one") / "one")


def refused(call: Any, kind: type[LoGoError] = PoolError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "B", "é", "a/b", "_", "a b"])), max_size=20))
def test_a_pool_never_changes_and_its_digest_is_of_its_content(one: Adapter, steps: list[tuple[bool, str]]) -> None:
    pool, model = AdapterPool(), set[str]()
    digests = {frozenset[str](): pool.digest}
    for add, name in steps:
        names, digest = pool.names, pool.digest
        if add == (name in model):
            refused(lambda pool=pool, add=add, name=name: pool.add(one, name) if add else pool.remove(name))
            continue
        changed = pool.add(one, name) if add else pool.remove(name)
        model ^= {name}
        assert (pool.names, pool.digest) == (names, digest)
        assert changed.names == tuple(sorted(model)) and len(changed) == len(model)
        assert (name in changed) == add
        assert digests.setdefault(frozenset(model), changed.digest) == changed.digest
        pool = changed
    assert len(set(digests.values())) == len(digests)
    at_once = AdapterPool(replace(one, name=name) for name in model)
    assert at_once.names == pool.names == tuple(adapter.name for adapter in pool) and at_once.digest == pool.digest


def test_the_digest_is_of_weights_scales_and_examples_not_of_folders(tmp_path: Path) -> None:
    for name, changes in {"a/x": {}, "b/x": {}, "scaled/x": {"lora_alpha": 3}}.items():
        write(tmp_path / name, TINY, **{"r": 1, **changes})
    write(tmp_path / "other" / "x", tensors({"layers.0.q": (2, 2)}, rank=1, seed=1), r=1)
    write(tmp_path / "named" / "y", TINY, r=1)
    write(tmp_path / "told" / "x", TINY, r=1)
    write_examples(tmp_path / "told" / "x", ["a prompt"])
    found = {name: AdapterPool.open(tmp_path / name) for name in ("a", "b", "scaled", "other", "named", "told")}
    digests = {name: pool.digest for name, pool in found.items()}
    assert digests["a"] == digests["b"] == AdapterPool.open(tmp_path / "told", examples="ignore").digest
    assert len(set(digests.values())) == 5
    assert AdapterPool(one.acting("last:2") for one in found["a"]).digest != digests["a"]


def test_threads_that_change_an_engines_pool_lose_nothing(one: Adapter) -> None:
    current = CurrentPool(AdapterPool([one]))
    began, names = current.value, [f"{kind}{count}" for count in range(30) for kind in "az"]

    def change(mine: list[str]) -> None:
        for name in mine:
            assert current.add(one, name).name == name
            if name.endswith("7"):
                assert current.remove(name).name == name

    threads = [threading.Thread(target=change, args=(names[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(current.names) == {"one", *(name for name in names if not name.endswith("7"))}
    assert began.names == ("one",) and len(current) == len(list(current)) == len(current.value)


def test_a_change_is_not_lost_when_the_pool_before_it_is_replaced(one: Adapter) -> None:
    current = CurrentPool(AdapterPool([one]))
    before = current.value
    current.add(one, "meanwhile")
    current.put(AdapterPool([one]), instead_of=before)
    assert current.names == ("meanwhile", "one")
    current.put(before)
    assert current.value is before


def test_an_unknown_name_is_met_with_the_closest(one: Adapter) -> None:
    pool = AdapterPool(replace(one, name=name) for name in ("flanv2.wmt16", "flanv2.rte"))
    asked = refused(lambda: pool["flanv2.wnt16"])
    assert asked == "no adapter 'flanv2.wnt16' in the pool of 2 (did you mean 'flanv2.wmt16'?)"
    assert refused(lambda: pool.remove("flanv2.wnt16")) == asked
    assert refused(lambda: pool["zzz"]) == "no adapter 'zzz' in the pool of 2"


def test_a_subset_is_chosen_by_names_and_patterns(one: Adapter) -> None:
    for asked, chosen in (
        (["b", "a", "a"], ("a", "b")),
        (["t/*", "t/x", "?"], ("a", "b", "t/x", "t/y")),
        ("odd[1]", ("odd[1]",)),
    ):
        pool = AdapterPool(replace(one, name=name) for name in ("b", "a", "t/y", "t/x", "odd[1]"))
        assert pool.subset(asked).names == chosen
        assert len(pool) == 5


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("org/repo", [Source("repo", "org/repo")]),
        ("org/repo/tasks/a@refs/pr/4", [Source("repo", "org/repo", "tasks/a", "refs/pr/4")]),
        ("gone", [Source("folder", "gone")]),
        ("pool.yaml", [Source("manifest", "pool.yaml")]),
        ("here, org/b@v1", [Source("folder", "here"), Source("repo", "org/b", "", "v1")]),
        ("org/a,org/a", [Source("repo", "org/a")]),
        ("a,b", [Source("folder", "a,b")]),  # a folder is called so
        (Path("here"), [Source("folder", "here")]),
        (["org/a", Path("here")], [Source("repo", "org/a"), Source("folder", "here")]),
    ],
)
def test_places(text: Any, places: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a,b").mkdir()
    (tmp_path / "pool.yaml").write_text("adapters: [here]")
    found = parse_sources(text)
    assert list(found) == places
    text = spec_of(found)
    monkeypatch.chdir(tmp_path / "here")  # where it means the same
    (tmp_path / "here" / "here").mkdir()
    again = parse_sources(text)
    assert [(p.kind, p.below, p.revision) for p in again] == [(p.kind, p.below, p.revision) for p in found]
    assert [p.where for p in again] == [p.where if p.on_hub else str(tmp_path / Path(p.where)) for p in found]


def test_what_is_no_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in (
        ("", "no source of adapters"),
        ("a,,b", "no source of adapters"),
        ("org/prefix-*", r"`logo pool lock 'org/prefix-\*'` lists the repositories of an owner"),
        ("org/a@../x", "is not a branch"),
        ("notes.txt", "found another file"),
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("adapters")
        with pytest.raises(UsageError, match=message) as caught:
            parse_sources(text)
        assert "\n" not in str(caught.value)


SEGMENT = st.text("abc.- é", min_size=1, max_size=4).filter(lambda s: not s.startswith(".") and s.strip() == s)


@budget(max_examples=25)
@given(st.sets(st.lists(SEGMENT, min_size=1, max_size=3).map("/".join), min_size=1, max_size=5))
def test_every_folder_with_an_adapter_is_found_and_named_by_its_relative_path(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = put(tmp_path_factory.mktemp("found"), *names)  # some of them inside others
    assert AdapterPool.open(root).names == tuple(sorted(names))


def test_an_adapter_folder_is_a_pool_of_one_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "mine")
    assert AdapterPool.open(tmp_path / "mine").names == ("mine",)
    monkeypatch.chdir(tmp_path / "mine")
    assert AdapterPool.open(".").names == ("mine",)
    put(tmp_path, "other")
    monkeypatch.chdir(tmp_path)
    assert AdapterPool.open(".").names == AdapterPool.open("./").names == ("mine", "other")


def test_two_folders_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, "x", "x/x", "x/y")
    assert "adapter 'x': " in refused(lambda: AdapterPool.open(tmp_path / "x"))
    pool = AdapterPool.open(tmp_path / "x", on_bad_adapter="skip")
    assert pool.names == ("x", "y")
    assert [error.name for error in pool.refused] == ["x"]
    assert "rename one of them" in pool.refused[0].reason


def test_links_in_a_circle_end_and_dead_ones_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a", "b/c")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "itself").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "gone").symlink_to(tmp_path / "no such folder")
    (tmp_path / ".hidden").symlink_to(tmp_path / "no such folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    pool = AdapterPool.open(tmp_path)
    assert pool.names == ("a", "b/c")
    assert sorted(error.name for error in pool.refused) == ["b/gone", "loop"]
    assert all("which cannot be reached" in error.reason for error in pool.refused)


def test_a_real_folder_comes_before_every_link_to_it(tmp_path: Path) -> None:
    put(tmp_path, "pool/zulu/deep", "pool/b", "elsewhere/one")
    (tmp_path / "pool" / "alias").symlink_to("zulu/deep")
    for name in ("x", "y"):
        (tmp_path / "pool" / name).symlink_to(tmp_path / "elsewhere")
    pool = AdapterPool.open(tmp_path / "pool")
    assert pool.names == ("b", "x/one", "zulu/deep")
    assert [error.name for error in pool.refused] == ["alias", "y"]
    assert all("in the pool already" in error.reason for error in pool.refused)
    both = AdapterPool.open([tmp_path / "pool", tmp_path / "elsewhere"])
    assert both.names == ("b", "one", "x/one", "zulu/deep")


def test_what_is_no_folder_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("x")
    monkeypatch.chdir(tmp_path)
    for where, why in (("no", "No such file"), ("./f/no", "Not a directory"), ("x" * 300, "File name too long")):
        text = refused(lambda where=where: AdapterPool.open(where), StorageError)
        assert text.startswith(f"no adapters in {tmp_path / where}: {why}") and "expected folders" in text
    assert "found another file" in refused(lambda: AdapterPool.open(tmp_path / "f"), UsageError)
    for options, said in (({"example": "use"}, "did you mean 'examples'?"), ({"examples": "no"}, "one of use, ignore")):
        assert said in refused(lambda options=options: AdapterPool.open(".", **options), UsageError)
    (tmp_path / "sub").mkdir()
    text = refused(lambda: AdapterPool.open(tmp_path / "sub", on_bad_adapter="skip"))
    assert text.startswith(f"no adapters in {tmp_path / 'sub'}: expected folders that hold {CONFIG} and {SAFETENSORS}")


def test_a_folder_that_may_not_be_listed_is_refused_and_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is the pool, as one that may not be entered, by what the system says."""
    with everyones_folder() as shared:
        monkeypatch.setenv("LOGO_CACHE", str(shared / ".cache"))
        put(shared, "pool/a", "pool/group/deep/b")
        root, group = shared / "pool", shared / "pool" / "group"
        AdapterPool.open(root)  # imports everything before rights are gone
        lock(group, shared)
        assert "adapter 'group': the folder cannot be listed" in refused(lambda: AdapterPool.open(root))
        pool = AdapterPool.open(root, on_bad_adapter="skip")
        assert (pool.names, [error.name for error in pool.refused]) == (("a",), ["group"])
        for place in (group, group / "deep"):
            text = refused(lambda place=place: AdapterPool.open(place), StorageError)
            assert text.startswith(f"no adapters in {place}: Permission denied; ")


def test_one_bad_adapter_refuses_the_pool_or_is_skipped_with_its_reason(tmp_path: Path) -> None:
    drawer = write_drawer(tmp_path)
    text = refused(lambda: AdapterPool.open(drawer))
    assert text.startswith("adapter 'alora_of_nothing': alora_invocation_tokens must be")
    assert f"({len(REFUSED) - 1} more bad in {drawer}); `logo pool lock --on-bad-adapter skip` leaves bad" in text
    pool = AdapterPool.open(drawer, on_bad_adapter="skip")
    assert pool.names == ("good",)
    assert sorted(error.name for error in pool.refused) == sorted(REFUSED)


def test_training_checkpoints_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a", "a/checkpoint-50", "a/checkpoint-50x")
    pool = AdapterPool.open(tmp_path)
    assert pool.names == ("a", "a/checkpoint-50x")
    [left] = pool.refused
    assert left.name == "a/checkpoint-50" and "it is a training checkpoint" in left.reason
    assert AdapterPool.open(str(tmp_path / "a" / "checkpoint-50")).names == ("checkpoint-50",)


def test_unknown_settings_of_a_whole_pool_make_one_warning(tmp_path: Path) -> None:
    write(tmp_path / "a", TINY, r=1, later_one=None)
    write(tmp_path / "b", TINY, r=1, later_one=2, another=True)
    put(tmp_path, "c")
    with pytest.warns(UserWarning) as caught:
        AdapterPool.open(tmp_path)
    assert [str(w.message) for w in caught] == [f"{CONFIG}: unknown settings ignored: another, later_one"]
    assert caught[0].filename == __file__


def test_adapters_that_do_not_fit_are_refused_or_skipped(tmp_path: Path) -> None:
    put(tmp_path, "a")
    for name in ("y", "z"):
        write(tmp_path / name, tensors({f"layers.0.{Q}": (2, 2)}, rank=1), r=1)
    pool = AdapterPool.open(tmp_path)
    text = refused(lambda: pool.fit(FITS))
    assert text.startswith("adapter 'y': does not fit the base model: 1 of 1 modules")
    assert "(1 more bad in the pool); `logo pool lock --on-bad-adapter skip --base-model M` leaves" in text
    fitted = pool.fit(FITS, on_bad_adapter="skip")
    assert (fitted.names, [e.name for e in fitted.refused]) == (("a",), ["y", "z"])
    text = refused(lambda: pool.subset(["y", "z"]).fit(FITS, on_bad_adapter="skip"))
    assert text.startswith("none of the 2 adapters fits the base model; the first: adapter 'y': ")


def test_what_does_not_fit_is_left_out_of_the_pool_with_a_warning(tmp_path: Path) -> None:
    """At opening and when it is added, until it is good; the pool and the engine's names are the same. The pool that
    the caller has stays whole, for engines of other base models."""
    for seed, name in enumerate(("a", "b")):
        write_peft(tmp_path / "pool" / name, seed=seed)
    for name in ("pool/early", "late"):
        write(tmp_path / name, tensors({"model.layers.7.self_attn.q_proj": (32, 32)}))
    pool = AdapterPool.open(tmp_path / "pool")
    settings = SelectionSettings.of(signal="norm", k=1)
    with pytest.warns(UserWarning, match="1 bad adapter is left out of the pool: adapter 'early': does not fit"):
        logo = LoGo(tiny.model("llama"), tokenizer(), pool, settings=settings, on_bad_adapter="skip")
    assert pool.names == ("a", "b", "early") and logo.pool.names == logo.names == ("a", "b")
    logo.pool.add(tmp_path / "late")
    with pytest.warns(UserWarning, match="1 bad adapter is left out of the pool: adapter 'late': does not fit") as told:
        assert logo.names == ("a", "b")
    assert len(told) == 1 and logo.pool.names == logo.names and "late" not in logo.pool
    assert [error.name for error in logo.pool.refused] == ["early", "late"]
    write_peft(tmp_path / "pool" / "c", seed=3)
    logo.pool.add(tmp_path / "pool" / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is told twice
        assert logo.names == logo.pool.names == ("a", "b", "c")
        for name in ("early", "late"):
            write_peft(tmp_path / "good" / name)
            logo.pool.add(tmp_path / "good" / name)
            assert logo.pool.names == logo.names and name in logo.names
    assert logo.names == ("a", "b", "c", "early", "late") and logo.pool.refused == ()


def test_a_damaged_adapter_is_left_out_however_large_the_pool_is(tmp_path: Path) -> None:
    """One that was not read when its pool was opened, and one that is added; each is read once."""
    for seed, name in enumerate(("pool/a", "pool/nan", "late", "pool/z")):
        write_peft(tmp_path / name, seed=seed)
    for name in ("pool/nan", "late"):
        damage(tmp_path / name, float("nan"))
    pool = AdapterPool.open(tmp_path / "pool", verify=False)
    settings = SelectionSettings.of(signal="norm", k=1)
    with pytest.warns(UserWarning, match="left out of the pool: adapter 'nan': tensor .* holds NaN"):
        logo = LoGo(tiny.model("llama"), tokenizer(), pool, settings=settings, on_bad_adapter="skip")
    assert logo.names == logo.pool.names == ("a", "z")
    logo.pool.add(tmp_path / "late")
    with pytest.warns(UserWarning, match="left out of the pool: adapter 'late': tensor .* holds NaN"):
        assert logo.generate("w3 w4", max_new_tokens=1).selection.adapters
    assert logo.names == logo.pool.names == ("a", "z")
    (tmp_path / "pool" / "z" / SAFETENSORS).unlink()  # it was sound when it was opened
    write_peft(tmp_path / "b")
    logo.pool.add(tmp_path / "b")
    assert logo.names == ("a", "b", "z")


def test_the_demos_pool_has_one_k_however_it_is_named() -> None:
    folder = DEMO_FOLDER / "adapters"
    for place in (None, folder, str(folder), [folder]):
        assert open_pool(place, "demo").default_k == DEMO_K == 3
        assert default_k(pool_sources(place, "demo"), DEFAULT_K) == 3
