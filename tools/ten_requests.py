"""Ten requests to the model "logo" of a server, with the adapters that answered: the recording in the README.

    python benchmarks/instruct_pool.py DATA M instruct --usual 10 --steps 20 --batch-size 4 --lr 5e-4
    logo serve --base-model M --adapters instruct/pool --encoder all-MiniLM-L6-v2 --when-unsure base &
    termtosvg docs/images/ten-requests.svg -g 76x31 -c "python tools/ten_requests.py http://localhost:8000"

M is Qwen2.5-Coder-1.5B-Instruct. No request is worded as the adapters' training data is, and the last one belongs to no
adapter: the server lets the base model answer it.
"""

from __future__ import annotations

import sys

from openai import OpenAI

REQUESTS = (
    "What's the contrary of generous? One word, please.",
    "Sort these for me, lowest first: 31, 7, 58, 12, 40",
    "Put this into German: A dog is running on the beach.",
    "How would you say this in French? Two children are playing football.",
    "What does this mean in English: Ich habe heute leider keine Zeit.",
    "Yesterday I ... to school. Which form of 'go' belongs here?",
    "Did this person like the film? 'The plot never comes together.'",
    "Which desk of the newspaper gets this? Shares of chip makers fell on Monday.",
    "A client writes: the machine has kept my card! What's the matter?",
    "Write a haiku about rain.",
)


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for request in REQUESTS:
        messages: list = [{"role": "user", "content": request}]
        reply = client.chat.completions.create(model="logo", messages=messages, temperature=0, max_tokens=32)
        chosen = reply.model_extra["logo"]  # type: ignore[index]
        mixture = zip(chosen["adapters"], chosen["weights"], strict=True)
        names = " + ".join(f"{weight:.2f} {name}" for name, weight in mixture) or "base model alone"
        added = chosen["probe_ms"] + chosen["queue_ms"]
        answer = " ".join((reply.choices[0].message.content or "").split())
        print(f"> {request}\n  {answer:.70}")
        print(f"  {names} · confidence {chosen['confidence']:.2f} · {added:.0f} ms", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
