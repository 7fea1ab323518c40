"""Writes small tasks as CSV files, one per task, with four wordings for each word.

python examples/word_tasks.py tasks capital opposite plural
"""

import csv
import sys
from pathlib import Path

WAYS = {
    "capital": "What is the capital of {}?|Name the capital of {}.|Which city is the capital of {}?|Capital of {}?",
    "french": "What is {} in French?|Translate {} into French.|How do you say {} in French?|French for {}?",
    "opposite": "What is the opposite of {}?|Name the opposite of {}.|Give an antonym for {}.|Opposite of {}?",
    "plural": "What is the plural of {}?|Write the plural of {}.|Make {} plural.|Plural of {}?",
}
WORDS = {
    "capital": """France-Paris Spain-Madrid Italy-Rome Germany-Berlin Greece-Athens Austria-Vienna Poland-Warsaw
        Peru-Lima Norway-Oslo Ireland-Dublin Belgium-Brussels Turkey-Ankara Egypt-Cairo Kenya-Nairobi Cuba-Havana""",
    "french": """dog-chien cat-chat house-maison book-livre water-eau bread-pain milk-lait apple-pomme tree-arbre
        bird-oiseau horse-cheval sun-soleil moon-lune city-ville friend-ami door-porte""",
    "opposite": """hot-cold up-down wet-dry fast-slow hard-soft happy-sad rich-poor young-old day-night early-late
        full-empty quiet-loud weak-strong low-high dirty-clean sour-sweet""",
    "plural": """apple-apples boat-boats box-boxes cherry-cherries dish-dishes fox-foxes lady-ladies lamp-lamps
        bus-buses tent-tents pony-ponies church-churches melon-melons river-rivers spy-spies torch-torches""",
}

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for task in sys.argv[2:]:
    pairs = [pair.split("-") for pair in WORDS[task].split()]
    with (folder / f"{task}.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["context", "completion"])
        rows.writerows([way.format(word), answer] for word, answer in pairs for way in WAYS[task].split("|"))
