"""Measures which part of a chat should select adapters, with system prompts and follow-ups made from rows of single
tasks.

    python examples/chats.py BASE_MODEL ADAPTERS ROWS [ROWS_PER_TASK]

ROWS holds `{task}.jsonl` with `{"context", "completion"}` rows, one file per adapter of that name. A row counts as
right if its own adapter is selected first. The chats of adapters with invocation tokens are always probed whole.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from logo import LoGo

SYSTEM = (
    "You are the careful assistant of a small publishing house. Answer in the language of the question, keep to what "
    "you are asked, and say so when you do not know something. Use short sentences and plain words. Orders are shipped "
    "within three working days, and returns are accepted within thirty days if the book has not been damaged. "
)


def main(base_model: str, adapters: str, folder: str, count: int) -> None:
    logo = LoGo.from_pretrained(base_model, adapters, signal="calibrated")
    if logo.tokenizer.chat_template is None and "<start_of_turn>" in logo.tokenizer.get_vocab():
        logo.tokenizer.chat_template = GEMMA
    ids = logo.tokenizer(SYSTEM * 10, add_special_tokens=False)["input_ids"][:500]
    system = {"role": "system", "content": logo.tokenizer.decode(ids)}
    drawn = random.Random(0)
    rows = {}
    for name in logo.names:
        lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in drawn.sample(lines, 2 * count)]

    def tell(label: str, chats: Sequence[tuple[str, Any]], *probe_texts: str) -> None:
        if logo.fitted.read_once and any(activation.tokens for activation in logo.fitted.activations):
            probe_texts = ("all",)
        shares = []
        for probe_text in probe_texts:
            logo.prompts = replace(logo.prompts, probe_text=probe_text)  # type: ignore[arg-type]
            selections = logo.select([chat for _, chat in chats])
            hits = sum(row.adapters[0] == name for row, (name, _) in zip(selections, chats, strict=True))
            shares.append(f"{probe_text} {hits / len(chats):.3f}")
        print(f"{label:28} {'   '.join(shares)}   of {len(chats)}", flush=True)

    flat = [(name, row) for name in rows for row in rows[name][:count]]
    tell("one message", [(name, [user(row["context"])]) for name, row in flat], "last-user", "all")
    tell("after a system prompt", [(name, [system, user(row["context"])]) for name, row in flat], "last-user", "all")
    same_task = []
    brief = []
    other_task = []
    for name in rows:
        for first, second in zip(rows[name][:count], rows[name][count:], strict=True):
            turns = [user(first["context"]), {"role": "assistant", "content": answer(first)}]
            same_task.append((name, [*turns, user(second["context"])]))
            brief.append((name, [*turns, user(f"And this one?\n{without_instruction(second['context'])}")]))
            stranger = drawn.choice([task for task in rows if task != name])
            other_task.append((stranger, [*turns, user(drawn.choice(rows[stranger])["context"])]))
    tell("second turn, same task", same_task, "last-user", "conversation", "all")
    tell("second turn, brief", brief, "last-user", "conversation", "all")
    tell("second turn, other task", other_task, "last-user", "conversation", "all")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(row: dict[str, Any]) -> str:
    gold = row["completion"]
    return str(gold if isinstance(gold, str) else gold[0])


def without_instruction(context: str) -> str:
    """The payload alone, of rows that give an instruction, a blank line, labelled lines and the label of the answer."""
    lines = context.split("\n\n", 1)[-1].split("\n")
    return "\n".join(lines[:-1] or lines)


GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ system if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 3)
