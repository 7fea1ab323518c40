"""The prompts of evaluation rows in other words: how far does a selection follow the wording of a prompt?

    python tools/reworded.py ROWS OUT           18 tasks, with other instructions, names of fields and ends
    python tools/reworded.py ROWS OUT --cut     every task, with the instruction (the first paragraph) cut off

ROWS has a file NAME.jsonl of `{"context": ..., "completion": ...}` rows per task, whose contexts are an instruction, an
empty line, and `Field: text` lines of which the last is left open. `logo eval study --protocols in-pool` measures the
result (docs/how-selection-works.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# Task -> its prompt in other words, with the text of its first field.
PROMPTS = {
    "active_to_passive": "Please turn this active sentence into a passive one.\nSentence: {}\nIn the passive:",
    "ag_news_topic": "Sort the following article into one of four sections (World, Sports, Business, Sci/Tech).\n"
    "Article: {}\nSection:",
    "antonyms": "Give me the opposite of the word below.\n{}\nIts opposite is",
    "caption_en_de": "How would a German speaker say this? Give a translation of the English text.\nText: {}\n"
    "Translation:",
    "e2e_restaurant": "Write one sentence about a place to eat that has these properties.\nProperties: {}\nSentence:",
    "letters_list": "Separate all characters of the following term by blanks.\nTerm: {}\nSeparated:",
    "number_to_words": "Spell out this numeral as one would say it aloud.\nNumeral: {}\nSpoken:",
    "question_generation": "Here is a sentence. Ask something to which it is the reply.\nSentence: {}\n"
    "The question could be:",
    "sciq_answer": "This comes from a science exam; reply in a few words.\nExam question: {}\nReply:",
    "sentence_negation": "Negate the following statement, so that it claims the contrary.\nStatement: {}\nNegation:",
    "singular_to_plural": "What do we call more than one of these?\nOne: {}\nMany:",
    "sms_spam": "Somebody sent me this text on my phone. Tell me if it is spam or not spam.\nText: {}\nVerdict:",
    "sst2_polarity": "A critic wrote the following about a film. Was the critic's judgement positive or negative?\n"
    "Critic: {}\nJudgement:",
    "tatoeba_de_en": "What does this German sentence mean in English?\nSentence: {}\nMeaning:",
    "tatoeba_en_es": "I am learning Spanish. Put the following English sentence into Spanish for me.\nSentence: {}\n"
    "In Spanish:",
    "trec_question_type": "Which type is the reply to the question going to have? Choose from description, entity, "
    "abbreviation, person, location, number.\nThe question is: {}\nReply type:",
    "tweet_emotion": "Someone posted this on Twitter. Name the feeling in it: anger, joy, optimism or sadness.\n"
    "Post: {}\nFeeling:",
    "verb_past_tense": "Put this verb into the simple past.\nToday: {}\nYesterday:",
}


def cut(context: str) -> str:
    """A prompt without its first paragraph."""
    return context.split("\n\n", 1)[1]


def reworded(task: str, context: str) -> str:
    """A prompt of one of `PROMPTS`, whose first field ends with its line, in other words."""
    field = cut(context).split("\n")[0]
    return PROMPTS[task].format(field.split(": ", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cut", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    for file in sorted(asked.rows.glob("*.jsonl")):
        if not asked.cut and file.stem not in PROMPTS:
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["context"] = cut(row["context"]) if asked.cut else reworded(file.stem, row["context"])
        (asked.out / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
