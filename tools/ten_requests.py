"""Ten requests to the model "logo" of a server, with the adapters that answered: the recording in the README.

    logo serve --base-model demo --when-unsure base &
    termtosvg docs/images/ten-requests.svg -g 52x31 -c "python tools/ten_requests.py http://localhost:8000"

The last prompt is no adapter's, and the server lets the base model answer it.
"""

from __future__ import annotations

import sys

from openai import OpenAI

PROMPTS = (
    "What is the opposite of cold?",
    "What is 7 plus 5?",
    "Name the capital of Sweden.",
    "Write lamp in capital letters.",
    "What is the plural of lamp?",
    "How do you say bread in French?",
    "Spell stone backwards.",
    "How many letters are in river?",
    "What is the past tense of walk?",
    "Which train leaves for Lisbon on Friday?",
)


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for prompt in PROMPTS:
        reply = client.completions.create(model="logo", prompt=prompt, temperature=0)
        chosen = reply.model_extra["logo"]  # type: ignore[index]
        mixture = zip(chosen["adapters"], chosen["weights"], strict=True)
        names = " + ".join(f"{weight:.2f} {name}" for name, weight in mixture) or "base model alone"
        added = chosen["probe_ms"] + chosen["queue_ms"]
        print(f"> {prompt}\n  {reply.choices[0].text.strip()}")
        print(f"  {names} · confidence {chosen['confidence']:.2f} · {added:.0f} ms", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
