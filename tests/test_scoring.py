"""`LoGo.score`: teacher-forced numbers equal to what transformers and PEFT say about the same mixture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import make_adapters
import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings, UsageError
from logo.models import DEMO_FOLDER, load_tokenizer
from logo.prompts import Prompts, answer_ids
from logo.rows import Row
from logo.scoring import encoded, spaced
from logo.training.rows import encoded as training_row
from logo.vllm.offline import _scored
from test_chat import with_template
from test_engine import ids_of, tokenizer, write_adapter
from tolerances import same_scores

DEMO = load_tokenizer(str(DEMO_FOLDER / "model"))
PROMPT, GOLD = "w3 w4 w5 w6", "w7 w8 w9"
MIXTURES: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.3, "c": 0.7}, {"a": 1 / 3, "b": 1 / 3}]


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawer")
    make_adapters.write_peft(root / "a", seed=1)
    make_adapters.write_peft(root / "b", seed=2, r=2, target_modules=["q_proj", "down_proj"])
    make_adapters.write_peft(root / "c", seed=3, use_rslora=True)
    return root


@pytest.fixture(scope="module")
def logo(drawer: Path) -> LoGo:
    settings = SelectionSettings(signal="norm", k=2)
    return LoGo(tiny.model("llama"), tokenizer(), AdapterPool.open(drawer), settings=settings)


def plain(model: nn.Module, tokens: PreTrainedTokenizerFast, prompt: str, gold: str) -> tuple[float, bool]:
    """Mean negative log likelihood and exact match, from all logits of one unbatched forward pass."""
    return plain_ids(model, tokens(prompt)["input_ids"], tokens(f" {gold}", add_special_tokens=False)["input_ids"])


def plain_ids(model: nn.Module, start: list[int], answer: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return float(-chosen.mean()), logits.argmax(-1).tolist() == answer


def merged(pool: AdapterPool, mixture: dict[str, float]) -> nn.Module:
    """The base model with the mixture added to its weights."""
    model = tiny.model("llama")
    with torch.no_grad():
        for name, weight in mixture.items():
            for path, factors in pool[name].read().items():
                module = model.get_submodule(path)
                module.weight += weight * factors.scaling * factors.B.float() @ factors.A.float()
    return model


def test_every_mixture_scores_as_with_merged_weights(logo: LoGo) -> None:
    scored = logo.score(PROMPT, GOLD, MIXTURES)
    for mixture, found in zip(MIXTURES, scored, strict=True):
        nll, match = plain(merged(logo.pool, mixture), logo.tokenizer, PROMPT, GOLD)
        assert found.nll == same_scores(nll)
        assert (found.exact_match, found.tokens) == (match, 3)
    assert len({round(found.nll, 4) for found in scored}) == len(MIXTURES)  # they really differ


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_one_adapter_scores_as_in_peft(logo: LoGo, drawer: Path, name: str) -> None:
    [found] = logo.score(PROMPT, GOLD, [{name: 1.0}])
    nll, _ = plain(make_adapters.load_peft(drawer / name), logo.tokenizer, PROMPT, GOLD)
    assert found.nll == same_scores(nll)


@pytest.mark.parametrize(
    ("gold", "named", "exact"), [(1, 1, True), (1, 2, True), (2, 1, False), (0, 1, False), (0, 2, False)]
)
def test_of_equally_likely_tokens_the_first_matches_exactly_in_both_engines(gold: int, named: int, exact: bool) -> None:
    """vLLM's rank counts all tokens that are as likely, and it names one of the best in each place."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 0.0, 1.0, -1.0]])
    nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor([gold, 0])))
    first, last = logits.log_softmax(dim=-1)
    place = {gold: SimpleNamespace(logprob=float(first[gold]), rank=int((first >= first[gold]).sum()))}
    if named != gold:
        place[named] = SimpleNamespace(logprob=float(first[named]), rank=1)
    made = SimpleNamespace(logprobs=[{0: SimpleNamespace(logprob=float(last[0]), rank=1)}], token_ids=[0])
    found = _scored(SimpleNamespace(prompt_logprobs=[None, place], outputs=[made]), [gold, 0])
    assert found.exact_match == exact
    assert found.nll == pytest.approx(nll)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "opt", "falcon", "gpt_neox"])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    write_adapter(tmp_path / "t", model, ("q_proj", "query_key_value", "c_attn"), rank=2, seed=0)
    logo = LoGo(model, tokenizer(), AdapterPool.open(tmp_path), settings=SelectionSettings("norm", k=1))
    base, mixed = logo.score(PROMPT, GOLD, [{}, {"t": 1.0}])
    nll, match = plain(model, logo.tokenizer, PROMPT, GOLD)
    assert (base.nll, base.exact_match) == (same_scores(nll), match)
    assert mixed.nll != same_scores(nll)


def test_equal_mixtures_are_computed_once_and_only_at_the_completion(logo: LoGo) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = logo.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    selection = logo.select(PROMPT)
    mixtures = [{}, {"a": 1.0}, selection, {"a": 1.0, "b": 0.0}, selection.mixture, {}]
    scored = logo.score(PROMPT, GOLD, mixtures)
    handle.remove()
    assert shapes == [(3, 3, 96)]  # three mixtures, three gold tokens
    assert scored[0] == scored[5] and scored[1] == scored[3] and scored[2] == scored[4]
    assert logo.score(PROMPT, GOLD, []) == []


def test_one_space_at_the_seam_where_there_is_none() -> None:
    for prompt, completion, text in (
        ("Question:", "yes", " yes"),
        ("Answer: ", "yes", "yes"),
        ("Answer:\n", "yes", "yes"),
        ("Answer:", "\nyes", "\nyes"),
        ("", "yes", "yes"),
    ):
        assert spaced(prompt, completion) == text


def blank_in_front() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's, which puts a blank in front of every text."""
    letters = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", *"aenosy"]
    merges = [("y", "e"), ("ye", "s"), ("\u2581", "yes"), ("n", "o"), ("\u2581", "no")]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def test_no_blank_comes_before_a_completion_that_the_text_has_not() -> None:
    """As the model reads them where the whole is one text."""
    for prompt, completion, tokens in (
        ("yes", "no", ["\u2581no"]),
        ("yes\n", "no", ["no"]),
        ("yes", "\nno yes", ["<0x0A>", "no", "\u2581yes"]),
        ("yes ", "a", ["a"]),
    ):
        made = blank_in_front()
        read, gold = encoded(Prompts(made, None), prompt, completion)
        whole = made(prompt + spaced(prompt, completion), add_special_tokens=False)["input_ids"]
        assert made.convert_ids_to_tokens(gold) == tokens and whole[-len(tokens) :] == gold
        row = training_row(made, Row(prompt, completion))
        assert list(row.ids) == [*read.ids, *gold, made.eos_token_id]


def test_an_answer_in_a_conversation_is_scored_as_it_is_trained() -> None:
    """As the template writes it, here with a thought in front, which may be the answer's own."""
    turn = "<{{ m.role[0] }}>{{ '<t></t>' if m.role == 'assistant' and '</t>' not in m.content }}{{ m.content }}."
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}{{{{ '<a>' if add_generation_prompt }}}}"
    made, asked = with_template(DEMO, turns), [{"role": "user", "content": "a"}]
    for answer, text in (("Paris", "<t></t>Paris"), (" Paris", "<t></t> Paris"), ("<t>b</t>\n", "<t>b</t>\n")):
        read, gold = encoded(Prompts(made, None), asked, answer)
        row = training_row(made, Row("", answer, messages=tuple(asked)))
        assert [*read.ids, *gold] == list(row.ids[: len(read.ids) + len(gold)]) and made.decode(gold) == text


@given(st.text(max_size=12) | st.lists(st.sampled_from(["\n", " ", "w3", "yes", "1", "."]), max_size=6).map("".join))
def test_completions_of_other_tokenizers_are_their_texts_alone(text: str) -> None:
    for made in (DEMO, tokenizer()):
        assert answer_ids(made, text) == made(text, add_special_tokens=False)["input_ids"]


def test_a_long_prompt_makes_room_for_the_completion(logo: LoGo) -> None:
    long = " ".join(f"w{3 + i % 80}" for i in range(200))
    with pytest.warns(UserWarning, match="prompt 1 has 201 tokens, more than the 125 that fit"):
        [found] = logo.score(long, GOLD, [{}])
    kept = ids_of(logo, ["w3"])[0][:1] + tokenizer()(long)["input_ids"][-124:]
    with torch.no_grad():
        logits = logo.model(input_ids=torch.tensor([kept + [7, 8, 9]])).logits[0, -4:-1]
    assert found.nll == same_scores(float(nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]))))


def test_what_cannot_be_scored(logo: LoGo) -> None:
    for call, arguments, message in (
        ("score", (PROMPT, "", [{}]), "completion '' has no tokens"),
        ("score", (PROMPT, "a\ud83d", [{}]), "half a surrogate pair"),
        ("score", (PROMPT, 7, [{}]), "completion: expected a string, found 7"),
        ("score", (PROMPT, " ".join(["w3"] * 128), [{}]), "the completion has 128 tokens, but the model's context"),
        ("score", (PROMPT, GOLD, [{"a": float("nan")}]), "weight of adapter 'a'"),
        ("score", (PROMPT, GOLD, [{"d": 1.0}]), "'d'"),
        ("score_pairs", ([([1], [2]), ([1], [])], [{}, {}]), "pair 2: the completion has no tokens"),
        ("score_pairs", ([([], [2])], [{}]), "pair 1: the prompt has no tokens"),
        ("score_pairs", ([([1], [2])], [{}, {}]), "one entry for each of 1 pairs, found 2"),
        ("score_pairs", ([([1] * 128, [2, 3])], [{}]), "shorten the prompt"),
    ):
        with pytest.raises((UsageError, PoolError), match=message):
            getattr(logo, call)(*arguments)


# -- many prompts, each with its own mixture ------------------------------------------------------------------------

# Token ids of prompts and completions of these lengths, none like another.
PAIRS = [
    ([1, *range(3 + i, 2 + i + start)], [*range(50 + i, 50 + i + end)])
    for i, (start, end) in enumerate([(4, 3), (12, 1), (2, 6), (7, 7), (1, 2)])
]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pairs_in_a_batch_score_as_merged_weights_alone(logo: LoGo, batch_size: int) -> None:
    scored = logo.score_pairs(PAIRS, MIXTURES, batch_size=batch_size)
    for (prompt, gold), mixture, found in zip(PAIRS, MIXTURES, scored, strict=True):
        nll, match = plain_ids(merged(logo.pool, mixture), prompt, gold)
        assert found.log_likelihood == same_scores(-nll * len(gold))
        assert (found.exact_match, found.tokens) == (match, len(gold))


def test_no_pairs_and_a_pair_as_long_as_the_context(logo: LoGo) -> None:
    assert logo.score_pairs([], []) == []
    assert logo.prompts.context == 128
    assert logo.score_pairs([([1] * 128, [2])], [{}])[0].tokens == 1
    with pytest.raises(UsageError, match="batch_size"):
        logo.score_pairs([([1], [2])], [{}], batch_size=0)
