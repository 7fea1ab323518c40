"""What a user writes who checks types strictly: every name of the public API, with the types that it promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import logo
from logo import (
    AdapterError,
    AdapterPool,
    Generation,
    LoGo,
    LoGoError,
    Scored,
    Selection,
    SelectionSettings,
    Stream,
    Truncation,
    UsageError,
)


def opened() -> LoGo:
    SelectionSettings(k=2, signal="calibrated")
    return LoGo.from_pretrained("demo", device="cpu", truncation=Truncation(side="right"), k=2)


def own_pool(folder: Path) -> AdapterPool:
    return AdapterPool.open(folder)


def selected(engine: LoGo, prompts: Sequence[str]) -> tuple[Selection, list[Selection]]:
    one: Selection = engine.select(prompts[0])
    many: list[Selection] = engine.select(list(prompts), k=1)
    return one, many


def answered(engine: LoGo, prompts: Sequence[str]) -> tuple[str, list[str]]:
    one: Generation = engine.generate(prompts[0], max_new_tokens=8)
    many: list[Generation] = engine.generate(list(prompts), max_new_tokens=8)
    return one.text, [answer.text for answer in many]


def streamed(engine: LoGo, prompt: str) -> str:
    stream: Stream = engine.stream(prompt, max_new_tokens=8, temperature=0.5, do_sample=True, when_unsure="mix")
    with stream as pieces:
        return "".join(pieces)


def weights(selection: Selection) -> dict[str, float]:
    return dict(zip(selection.adapters, selection.weights, strict=True))


def scored(engine: LoGo, prompt: str, gold: str) -> list[float]:
    base_and_logo: list[Scored] = engine.score(prompt, gold, [{}, None])
    return [one.log_likelihood for one in base_and_logo]


def explained(error: LoGoError) -> str:
    return error.reason if isinstance(error, AdapterError) else str(error)


def wrong(engine: LoGo) -> None:
    """Each of these lines is an error to the type checker, so that nothing here is `Any` unnoticed."""
    engine.select(3)  # type: ignore[call-overload]
    engine.select("a", kk=3)  # type: ignore[call-overload]
    engine.generate("a", k="two")  # type: ignore[call-overload]
    SelectionSettings(k="two")  # type: ignore[arg-type]
    AdapterPool.open(3)  # type: ignore[arg-type]


def main() -> None:
    engine = opened()
    prompts = ["What is 7 plus 5?", "What is the opposite of hot?"]
    one, many = selected(engine, prompts)
    text, texts = answered(engine, prompts)
    print(logo.__version__, weights(one), [best.adapters[0] for best in many])
    print(text, texts, streamed(engine, prompts[0]), scored(engine, prompts[0], "12"))
    try:
        engine.select(prompts[0], k=0)
    except UsageError as error:
        print(explained(error))


if __name__ == "__main__":
    main()
