"""Asks a running server with the official OpenAI client (`pip install openai`):

logo serve --base-model demo
python examples/serve_openai.py [http://127.0.0.1:8000]
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("LOGO_API_KEY", "none"))

# "logo" selects adapters for this prompt; which ones comes with the answer.
answer = client.chat.completions.create(
    model="logo", messages=[{"role": "user", "content": "What is 7 plus 5?"}], temperature=0
)
print("logo:", answer.choices[0].message.content, answer.logo["adapters"], answer.logo["weights"])

# The base model alone, streamed: its name is the id that has no parent and is not "logo".
base = next(model.id for model in client.models.list() if model.logo["role"] == "base")
stream = client.completions.create(model=base, prompt="What is 7 plus 5?", temperature=0, stream=True)
print("base:", "".join(chunk.choices[0].text for chunk in stream if chunk.choices))

# A mixture of your own, by adapters of this server's pool.
names = [model.id for model in client.models.list() if model.logo["role"] == "adapter"][:2]
forced = client.completions.create(
    model="logo",
    prompt="What is 7 plus 5?",
    temperature=0,
    extra_body={"logo": {"adapters": dict.fromkeys(names, 0.5)}},
)
print("forced:", forced.choices[0].text, forced.logo["adapters"])
