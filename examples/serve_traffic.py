"""Sends the traffic of a day to a running server of the demo: test prompts of most tasks, and some of no task.

logo serve --base-model demo --log-json --log-prompts 2> day.log
python examples/serve_traffic.py [http://127.0.0.1:8000]
"""

import json
import random
import sys
import urllib.request

from logo.demo import heldout

# Three things that no adapter of the demo was made for.
UNSERVED = [f"Book a table for {n} at seven tonight." for n in ("two", "four", "six")]
UNSERVED += [f"How warm will it be in {city} tomorrow?" for city in ("Oslo", "Lima", "Rome")]
UNSERVED += [f"Divide {n} apples among {n // 3} children." for n in (12, 21, 30)]

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
rows = {task: found for task, found in heldout().items() if task not in ("is_past", "reverse_word")}
prompts = UNSERVED + [row["context"] for found in rows.values() for row in found[:8]]
random.Random(0).shuffle(prompts)
for prompt in prompts:
    body = json.dumps({"model": "logo", "prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()
print(f"{len(prompts)} prompts answered")
