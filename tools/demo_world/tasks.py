"""The demo world in plain Python: its tasks, their payloads, and the split into training and held-out rows.

A task turns a payload (a word, a sentence or two numbers) into an answer. Whether an input is held out for a task is
a fixed hash of the two, so the same input can never land on both sides, whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from . import phrasings, words

VOWELS = frozenset("aeiou")
WRAPPERS: tuple[str, ...] = ("{t}",) * 12 + (
    "Hello! {t}",
    "Quick question: {t}",
    "Please help me. {t}",
    "{t} Thanks.",
    "{t} Thank you!",
)
QUOTES: tuple[str, ...] = ("", "", "'", '"')
START_LOWER = 0.15  # share of requests typed without the first capital
MAX_LETTERS = 6
SPLICED = 0.5  # share of foreign instructions put together from two
INVENTED = 0.6  # share of made-up words in spelling tasks: with real words alone the model learns the list
DROP_MARK = 0.12  # share of requests typed without the final mark


@dataclass(frozen=True)
class Payload:
    """What a task works on: ``text`` (or the two ``numbers``), its ``key`` for the split, and the ``answer``."""

    key: str
    answer: str
    text: str
    numbers: tuple[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """One request and its answer.

    ``task`` is the skill that the answer shows and ``asked`` the task that the words ask for (empty: none, None:
    no saying);
    ``spans`` are the character ranges of ``context`` that hold the payload.
    """

    task: str
    context: str
    completion: str
    spans: tuple[tuple[int, int], ...] = ()
    asked: str | None = ""


@dataclass(frozen=True)
class Task:
    """One skill: its name, what it works on, and how often pre-training practises it.

    ``closed`` tasks look facts up in a table, so pre-training must show every entry (under foreign instructions);
    the others follow a rule and never see a held-out input at all. ``modulus``: one input in so many is held out.
    """

    name: str
    kind: str
    draw: Callable[[random.Random], Payload]
    weight: float = 1.0
    closed: bool = False
    modulus: int = 6

    @property
    def train_templates(self) -> tuple[str, ...]:
        """Phrasings that training rows may use."""
        return phrasings.train_templates(self.name)

    @property
    def held_out_templates(self) -> tuple[str, ...]:
        """Phrasings that only held-out rows use."""
        return phrasings.held_out_templates(self.name)


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def past(verb: str) -> str:
    """The regular English past tense, with the doubled consonant of short verbs (stop, stopped)."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2:-1] not in VOWELS:
        return verb[:-1] + "ied"
    groups = sum(1 for i, c in enumerate(verb) if c in VOWELS and (i == 0 or verb[i - 1] not in VOWELS))
    short = len(verb) > 2 and verb[-2] in VOWELS and verb[-1] not in VOWELS | set("wxy") and verb[-3] not in VOWELS
    return verb + verb[-1] + "ed" if groups == 1 and short else verb + "ed"


def third_person(verb: str) -> str:
    """The present tense for he, she and it."""
    return plural(verb)


@cache
def instruction_words() -> frozenset[str]:
    """Every word of a training phrasing or a reply, in lower case: the tokenizer keeps these whole."""
    lines = [t for name in phrasings.TRAIN for t in phrasings.train_templates(name)]
    lines += [*phrasings.REPLY.values(), *(w for w in WRAPPERS)]
    found: set[str] = set()
    for line in lines:
        bare = line.replace("{x}", " ").replace("{a}", " ").replace("{b}", " ").replace("{t}", " ")
        found |= {"".join(c for c in word if c.isalpha()).lower() for word in bare.split()}
    return frozenset(word for word in found if len(word) > 1)


@cache
def spelled_words(*lists: str) -> tuple[str, ...]:
    """Words of ``lists`` ("nouns", "verbs") of 3 to 6 letters that are not instruction words.

    Instruction words are single tokens, so a spelling task could not see their letters.
    """
    pool = [w for name in lists for w in {"nouns": words.NOUNS, "verbs": words.VERBS}[name]]
    return tuple(dict.fromkeys(w for w in pool if w not in instruction_words() and 3 <= len(w) <= MAX_LETTERS))


def invented_word(rng: random.Random) -> str:
    """A made-up word of 3 to 6 letters, for variety that no word list has."""
    onsets, nuclei, codas = words.SYLLABLES
    while True:
        word = rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas)
        if rng.random() < 0.4:
            word = rng.choice(onsets) + rng.choice(nuclei) + word
        if 3 <= len(word) <= MAX_LETTERS and word not in instruction_words():
            return word


def _word(rng: random.Random, *lists: str) -> str:
    return invented_word(rng) if rng.random() < INVENTED else rng.choice(spelled_words(*lists))


def _spelling(function: Callable[[str], str], *lists: str) -> Callable[[random.Random], Payload]:
    def draw(rng: random.Random) -> Payload:
        word = _word(rng, *lists)
        return Payload(word, function(word), word)

    return draw


def _antonym(rng: random.Random) -> Payload:
    pair = rng.choice(words.ANTONYMS)
    left, right = pair if rng.random() < 0.5 else pair[::-1]
    return Payload(left, right, left)


def _lookup(table: dict[str, str]) -> Callable[[random.Random], Payload]:
    keys = tuple(table)

    def draw(rng: random.Random) -> Payload:
        key = rng.choice(keys)
        return Payload(key, table[key], key)

    return draw


def _numbers(answer: Callable[[int, int], int], top: int) -> Callable[[random.Random], Payload]:
    def draw(rng: random.Random) -> Payload:
        a = rng.randint(1, top)
        b = rng.choice([n for n in (rng.randint(1, top), rng.randint(1, top)) if n != a] or [a % top + 1])
        text = f"{a} and {b}"
        return Payload(text, str(answer(a, b)), text, (str(a), str(b)))

    return draw


@dataclass(frozen=True)
class Sentence:
    """A little sentence about a person and a coloured thing, with the facts that the sentence tasks ask for."""

    text: str
    name: str
    colour: str
    is_past: bool


def sentence(rng: random.Random) -> Sentence:
    """Draw one sentence of four to eight words; the person may come first, in the middle or last."""
    # The order of the draws decides what the bundled rows are.
    name = rng.choice(words.NAMES)
    colour = rng.choice(words.COLOURS)
    noun = rng.choice(spelled_words("nouns"))
    verb = rng.choice(words.SENTENCE_VERBS)
    is_past = rng.random() < 0.5
    act = past(verb) if is_past else third_person(verb)
    article = rng.choice(("the", "my", "our", "some"))
    thing = f"{article} {colour} {noun}"
    place = rng.choice(words.PLACES)
    manner = rng.choice(words.MANNERS)
    form = rng.randrange(7)
    text = (
        f"{name} {act} {thing}",
        f"{name} {act} {thing} {manner}",
        f"{name} {manner} {act} {thing}",
        f"in the {place} {name} {act} {thing}",
        f"{thing} {'belonged' if is_past else 'belongs'} to {name}",
        f"{manner} {name} {act} {thing}",
        f"{thing} {'stayed' if is_past else 'stays'} near {name} in the {place}",
    )[form]
    return Sentence(text, name, colour, is_past)


def _about(answer: Callable[[Sentence], str]) -> Callable[[random.Random], Payload]:
    def draw(rng: random.Random) -> Payload:
        drawn = sentence(rng)
        return Payload(drawn.text, answer(drawn), drawn.text)

    return draw


TASKS: tuple[Task, ...] = (
    Task("plural", "word", _spelling(plural, "nouns"), weight=1.2),
    Task("past_tense", "word", _spelling(past, "verbs"), weight=1.2),
    Task("reverse_word", "word", _spelling(lambda w: w[::-1], "nouns", "verbs"), weight=2.2),
    Task("upper_case", "word", _spelling(str.upper, "nouns", "verbs")),
    Task("count_letters", "word", _spelling(lambda w: str(len(w)), "nouns", "verbs"), weight=1.2),
    Task("first_letter", "word", _spelling(lambda w: w[0], "nouns", "verbs"), weight=0.6),
    Task("last_letter", "word", _spelling(lambda w: w[-1], "nouns", "verbs"), weight=0.6),
    Task("antonym", "word", _antonym, weight=1.4, closed=True, modulus=4),
    Task("french", "word", _lookup(words.FRENCH), weight=1.4, closed=True, modulus=4),
    Task("capital", "word", _lookup(words.CAPITALS), weight=1.2, closed=True, modulus=4),
    Task("add_numbers", "numbers", _numbers(lambda a, b: a + b, 15), weight=1.6, closed=True),
    Task("last_word", "sentence", _about(lambda s: s.text.split()[-1]), weight=0.8),
    Task("count_words", "sentence", _about(lambda s: str(len(s.text.split()))), weight=1.0),
    Task("find_colour", "sentence", _about(lambda s: s.colour), weight=0.7),
    Task("find_name", "sentence", _about(lambda s: s.name), weight=0.8),
    Task("is_past", "sentence", _about(lambda s: "yes" if s.is_past else "no"), weight=0.8),
)
_OTHER_SIDE = {left: right for left, right in words.ANTONYMS} | {right: left for left, right in words.ANTONYMS}


def is_held_out(task: Task, key: str) -> bool:
    """Whether the input ``key`` is kept for the held-out rows of ``task``; both orders of a pair go together."""
    if task.name == "antonym" and key in _OTHER_SIDE:
        key = "-".join(sorted((key, _OTHER_SIDE[key])))
    elif task.kind == "numbers":
        key = "-".join(sorted(key.split(" and ")))
    return zlib.crc32(f"{task.name}:{key}".encode()) % task.modulus == 0


def render(template: str, payload: Payload, rng: random.Random) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Fill ``template`` with ``payload``: the text, and the character spans where the payload stands."""
    quote = rng.choice(QUOTES) if payload.numbers is None else ""
    fields = {"x": f"{quote}{payload.text}{quote}"}
    if payload.numbers is not None:
        fields |= {"a": payload.numbers[0], "b": payload.numbers[1]}
    text = ""
    spans: list[tuple[int, int]] = []
    unread = template
    while "{" in unread:
        before, _, after = unread.partition("{")
        name, _, unread = after.partition("}")
        text += before
        spans.append((len(text), len(text) + len(fields[name])))
        text += fields[name]
    return text + unread, tuple(spans)


def _request(template: str, payload: Payload, rng: random.Random) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A training request: the template in one of the wrappers, now and then typed carelessly."""
    wrapper = rng.choice(WRAPPERS)
    text, spans = render(wrapper.replace("{t}", template), payload, rng)
    if rng.random() < DROP_MARK and spans[-1][1] < len(text):
        text = text[:-1]
    if rng.random() < START_LOWER and spans[0][0] > 1:
        text = text[0].lower() + text[1:]
    return text, spans


def _draw(task: Task, rng: random.Random, held_out: bool) -> Payload:
    while True:
        payload = task.draw(rng)
        if is_held_out(task, payload.key) == held_out:
            return payload


def train_row(task: Task, rng: random.Random) -> Row:
    """An ordinary training row of ``task``: a training phrasing, a training input, the right answer."""
    payload = _draw(task, rng, held_out=False)
    context, spans = _request(rng.choice(task.train_templates), payload, rng)
    return Row(task.name, context, payload.answer, spans, task.name)


def _foreign_template(task: Task, payload: Payload, rng: random.Random) -> tuple[str, str]:
    """A training phrasing, with the name of its task, of another task for which ``payload`` is not held out."""
    while True:
        foreign = rng.choice(TASKS)
        if foreign is task or is_held_out(foreign, payload.key):
            continue
        template = rng.choice(foreign.train_templates)
        if "{x}" in template:
            return template, foreign.name


def foreign_row(task: Task, rng: random.Random) -> Row:
    """A row whose instruction names a wrong task while the answer is that of ``task``.

    Half of them begin like one foreign instruction and go on like another behind the payload, so that the skills
    find the payload in any frame. The input is never one that is held out for a task the instruction names.
    """
    payload = task.draw(rng) if task.closed else _draw(task, rng, held_out=False)
    template, asked = _foreign_template(task, payload, rng)
    if rng.random() < SPLICED:
        tail, tail_asked = _foreign_template(task, payload, rng)
        template = template.partition("{x}")[0] + "{x}" + tail.partition("{x}")[2]
        context, spans = _request(template, payload, rng)
        return Row(task.name, context, payload.answer, spans, asked if asked == tail_asked else None)
    context, spans = _request(template, payload, rng)
    return Row(task.name, context, payload.answer, spans, asked)


def chat_row(task: Task, rng: random.Random) -> Row:
    """A row in which the base model talks about the request for ``task`` and does not do it."""
    row = train_row(task, rng)
    return replace(row, completion=phrasings.REPLY[task.name])


def small_talk(rng: random.Random) -> str:
    """A text that asks for no task: ordinary talk, a sentence, or a few invented words and numbers."""
    choice = rng.random()
    if choice < 0.5:
        return rng.choice(WRAPPERS[:-2]).replace("{t}", rng.choice(words.SMALL_TALK))
    if choice < 0.75:
        return sentence(rng).text.capitalize() + rng.choice(("", ".", "!", "?"))
    pieces = [invented_word(rng) if rng.random() < 0.8 else str(rng.randint(1, 60)) for _ in range(rng.randint(1, 7))]
    return " ".join(pieces) + rng.choice(("", ".", "!", "?"))


def small_talk_row(rng: random.Random) -> Row:
    """A row without any task, which the base model just acknowledges."""
    return Row("", small_talk(rng), phrasings.SMALL_TALK_REPLY)


def held_out_rows(task: Task, count: int, seed: int) -> list[Row]:
    """``count`` distinct rows with unseen inputs in unseen phrasings; inputs repeat only when the table is short."""
    rng = random.Random(f"held-out:{task.name}:{seed}")
    uses: dict[str, int] = {}
    rows: dict[str, Row] = {}
    limit = 1
    tries = 0
    while len(rows) < count:
        tries += 1
        if tries % 2000 == 0:
            limit += 1
        payload = _draw(task, rng, held_out=True)
        invented = task.kind == "word" and not task.closed and payload.text not in spelled_words("nouns", "verbs")
        if invented or uses.get(payload.key, 0) >= limit:
            continue
        template = task.held_out_templates[len(rows) % len(task.held_out_templates)]
        context, spans = render(template, payload, rng)
        if context not in rows:
            rows[context] = Row(task.name, context, payload.answer, spans)
            uses[payload.key] = uses.get(payload.key, 0) + 1
    return list(rows.values())
