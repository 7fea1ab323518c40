"""How people ask for each task: the phrasings trained on, and those kept for the held-out rows.

``{x}`` is the payload (a word or a sentence, quoted or not); number tasks have ``{a}`` and ``{b}``. A held-out
phrasing puts known words into a frame that no training row ever used.
"""

from __future__ import annotations

from typing import Final

TRAIN: Final[dict[str, str]] = {
    "plural": """
        What is the plural of {x}?
        Write the plural of {x}.
        Give the plural form of {x}.
        Plural of {x}?
        Make {x} plural.
        Turn the noun {x} into its plural.
        One {x}, but several what?
        How do you say {x} when there are many?
        Put the noun {x} into the plural form.
        I have one {x}. What would several be called?
        Change {x} from singular to plural.
        The noun {x} is singular. What is its plural?
        Tell me the plural for {x}.
        If there is more than one {x}, how do you write the noun?""",
    "past_tense": """
        What is the past tense of {x}?
        Write the past tense of {x}.
        Put the verb {x} into the past tense.
        Give the past form of the verb {x}.
        Past tense of {x}?
        How do you say {x} if it happened yesterday?
        Today I {x}. What did I do yesterday?
        Change the verb {x} from present to past.
        Turn {x} into its past tense.
        The verb is {x}. What is its past form?
        Tell me the past tense for {x}.
        Conjugate {x} in the past.
        What did people do yesterday if today they {x}?
        Yesterday they did what, if the verb is {x}?""",
    "reverse_word": """
        Reverse the word {x}.
        Write {x} backwards.
        Spell {x} backwards.
        What is {x} in reverse?
        Turn the letters of {x} around.
        Flip the word {x} so that it reads backwards.
        Can you reverse {x}?
        What do you get if you read {x} backwards?
        Give me {x} in reverse order.
        Mirror the word {x}.
        Write the letters of {x} in reverse order.
        Read {x} from right to left.
        Here is a word: {x}. Reverse it.
        Take {x} and flip it backwards.""",
    "upper_case": """
        Write {x} in upper case.
        Put {x} in capital letters.
        Convert {x} to upper case.
        Capitalise every letter of {x}.
        Make {x} all capitals.
        Shout the word {x} in capitals.
        What does {x} look like in upper case?
        Change {x} from lower case to upper case.
        Give me {x} with capital letters only.
        Print {x} in capitals.
        Here is a word: {x}. Capitalise all of it.
        Upper case of {x}?
        Turn {x} into capital letters.
        Write {x} using capitals only.""",
    "count_letters": """
        How many letters are in {x}?
        Count the letters in {x}.
        What is the number of letters in {x}?
        How long is the word {x}?
        Tell me the length of {x}.
        How many characters does {x} have?
        Give the length of the word {x}.
        Count how many letters {x} has.
        What length does {x} have?
        The word {x} has how many letters?
        Here is a word: {x}. How many letters does it have?
        Number of letters in {x}?
        How many letters do you need to write {x}?
        Count the characters of {x}.""",
    "first_letter": """
        What is the first letter of {x}?
        Say the first letter of {x}.
        Which letter does {x} start with?
        Give me the initial letter of {x}.
        {x} begins with which letter?
        First letter of {x}?
        Name the letter at the start of {x}.
        What letter comes first in {x}?
        With which letter does {x} begin?
        Write only the first letter of {x}.
        Tell me the initial of {x}.
        Here is a word: {x}. What does it start with?
        Find the letter at the beginning of {x}.
        What initial does {x} have?""",
    "last_letter": """
        What is the last letter of {x}?
        Say the last letter of {x}.
        Which letter does {x} end with?
        Give me the final letter of {x}.
        {x} ends with which letter?
        Last letter of {x}?
        Name the letter at the end of {x}.
        What letter comes last in {x}?
        With which letter does {x} end?
        Write only the final letter of {x}.
        Tell me the ending letter of {x}.
        Here is a word: {x}. What letter does it end with?
        Find the letter at the very end of {x}.
        What is the closing letter of {x}?""",
    "antonym": """
        What is the opposite of {x}?
        Give an antonym for {x}.
        Opposite of {x}?
        Name the opposite of {x}.
        Which word means the opposite of {x}?
        Find an antonym of {x}.
        What is the contrary of {x}?
        Tell me a word with the opposite meaning of {x}.
        The antonym of {x} is what?
        If it is not {x}, it is the opposite: what?
        Write a word opposite in meaning to {x}.
        I need an antonym: {x}.
        What contrasts with {x}?
        {x} is the contrary of what?""",
    "french": """
        Translate to French: {x}.
        Translate {x} into French.
        What is {x} in French?
        How do you say {x} in French?
        French for {x}?
        Give the French word for {x}.
        What is the French translation of {x}?
        How would a person from Paris say {x}?
        Say {x} in French.
        I am learning French. What is {x}?
        Which French word means {x}?
        Write the French translation for {x}.
        Put {x} into French.
        From English to French, translate {x}.""",
    "capital": """
        What is the capital of {x}?
        Name the capital city of {x}.
        Capital of {x}?
        Which city is the capital of {x}?
        Tell me the capital of {x}.
        Give the capital city of the country {x}.
        What city governs {x}?
        Where is the government of {x}?
        {x} is a country. What is its capital?
        Which capital belongs to the country {x}?
        In which city does the government of {x} sit?
        I am going to the main city of {x}. Where am I going?
        The capital city of {x} is called what?
        Find the seat of government in {x}.""",
    "add_numbers": """
        What is {a} plus {b}?
        Add {a} and {b}.
        What is the sum of {a} and {b}?
        Calculate {a} + {b}.
        {a} + {b}?
        How much is {a} plus {b}?
        Add {b} to {a}.
        Sum {a} and {b}.
        Give me the total of {a} and {b}.
        I have {a} apples and get {b} more. How many in total?
        Compute {a} plus {b}.
        If you add {a} and {b}, what is the total?
        {a} and {b} together make how much?
        Work out the sum {a} + {b}.""",
    "last_word": """
        What is the last word of {x}?
        Give the last word of this sentence: {x}.
        Which word ends the sentence {x}?
        Repeat the final word: {x}.
        Last word of {x}?
        Write the final word of {x}.
        What word comes last here: {x}?
        Tell me the last word in {x}.
        The sentence {x} ends with which word?
        Say only the last word of {x}.
        Find the word at the end of {x}.
        Which is the final word in this sentence: {x}?
        Here is a sentence: {x}. What is its last word?
        Name the ending word of {x}.""",
    "count_words": """
        How many words are in {x}?
        Count the words in: {x}.
        What is the number of words in {x}?
        How many words does this sentence have: {x}?
        Count the words of the sentence {x}.
        Tell me how many words there are in {x}.
        Word count of {x}?
        Give the word count for {x}.
        Here is a sentence: {x}. Count its words.
        The sentence {x} has how many words?
        How many words do you see in {x}?
        Number of words in this sentence: {x}?
        Give the number of words: {x}.
        Count every word: {x}.""",
    "find_colour": """
        Name the colour in the sentence: {x}.
        Which colour is mentioned in {x}?
        What colour appears here: {x}?
        Find the colour in {x}.
        What is the colour of the thing in {x}?
        Tell me the colour in this sentence: {x}.
        Which colour do you see in {x}?
        Pick out the colour from {x}.
        {x}. What colour was that?
        In the sentence {x}, which colour is named?
        Colour in {x}?
        What colour is the thing: {x}?
        Spot the colour: {x}.
        Give only the colour from {x}.""",
    "find_name": """
        Who is mentioned in {x}?
        Which person appears in {x}?
        Name the person in the sentence: {x}.
        Find the name of the person in {x}.
        What is the name of the person in {x}?
        Tell me who this is about: {x}.
        Pick out the name from {x}.
        {x}. Who was that?
        In the sentence {x}, which person is named?
        Who do you see in {x}?
        Give only the person in {x}.
        Whose name is in {x}?
        Spot the person: {x}.
        Who is this sentence about: {x}?""",
    "is_past": """
        Is this sentence about the past? {x}.
        Did this already happen? {x}.
        Is {x} in the past tense? Answer yes or no.
        Yes or no: is {x} about the past?
        Does {x} talk about the past?
        {x}. Is that over already?
        Has this happened already: {x}?
        Say yes if {x} is in the past, and no otherwise.
        Is it true that {x} is in the past?
        Past or not? {x}.
        Was it in the past that {x}? Answer yes or no.
        Answer yes or no: did it already happen that {x}?
        Is the event in {x} over?
        Yes or no: has {x} already happened?""",
}

HELD_OUT: Final[dict[str, str]] = {
    "plural": """
        Tell me how to write the noun {x} in the plural.
        What is the plural form of the singular noun {x}?
        I have several of {x}. Write the plural.
        Say the plural of the noun {x}.
        Form the plural: {x}.""",
    "past_tense": """
        Write the verb {x} in its past form.
        What would the verb {x} be in the past tense?
        Say the past tense of the verb {x}.
        How do you put {x} into the past tense?
        Find the past form of {x}.""",
    "reverse_word": """
        Please spell the word {x} in reverse.
        How do you write {x} backwards?
        Say {x} from right to left.
        Put the word {x} in reverse order.
        What does {x} look like backwards?""",
    "upper_case": """
        Can you print {x} in upper case?
        Give the word {x} in all capitals.
        Spell {x} in capital letters.
        How do you write {x} in capitals?
        Change the word {x} to capital letters.""",
    "count_letters": """
        Tell me how many letters {x} has.
        Count up the letters of {x}.
        What is the length of the word {x}?
        Give me the number of characters in {x}.
        How many letters long is {x}?""",
    "first_letter": """
        Give the first letter in {x}.
        Tell me which letter is first in {x}.
        Which is the initial letter of the word {x}?
        What letter is at the beginning of {x}?
        Name the first letter in the word {x}.""",
    "last_letter": """
        Give the last letter in {x}.
        Tell me which letter is last in {x}.
        Which is the final letter of the word {x}?
        What letter is at the end of {x}?
        Name the last letter in the word {x}.""",
    "antonym": """
        Tell me the antonym of {x}.
        Say the opposite of the word {x}.
        Which word is the contrary of {x}?
        What word is opposite to {x}?
        I would like the opposite: {x}.""",
    "french": """
        Tell me the French for {x}.
        What would {x} be in French?
        Which word is French for {x}?
        Give me the French translation: {x}.
        Can you say the word {x} in French?""",
    "capital": """
        Tell me which city is the capital of {x}.
        What is the capital city of the country {x}?
        Where is the capital of {x}?
        Say the capital of the country called {x}.
        Give the name of the capital of {x}.""",
    "add_numbers": """
        Tell me the sum of {a} and {b}.
        How much do {a} and {b} make in total?
        Can you add {a} and {b}?
        What total do you get from {a} plus {b}?
        Please work out {a} plus {b}.""",
    "last_word": """
        Tell me which word is last in {x}.
        What is the final word of this sentence: {x}?
        With which word does {x} end?
        Give me only the last word: {x}.
        Say the last word of the sentence {x}.""",
    "count_words": """
        Tell me the number of words in {x}.
        Count how many words are in this sentence: {x}.
        What is the word count of {x}?
        How many words do you count in {x}?
        The number of words in {x} is what?""",
    "find_colour": """
        What colour is named in {x}?
        Tell me which colour is in {x}.
        Find the colour mentioned here: {x}.
        Say the colour that appears in {x}.
        Which colour is in this sentence: {x}?""",
    "find_name": """
        Which person is mentioned in {x}?
        Tell me the name of the person in this sentence: {x}.
        Who appears in {x}?
        Find who is mentioned here: {x}.
        Say the name of the person: {x}.""",
    "is_past": """
        Is the sentence {x} about the past? Yes or no?
        Tell me yes or no: did {x} already happen?
        Is {x} already over?
        Does this sentence talk about the past: {x}?
        Answer yes or no: is {x} in the past tense?""",
}

# What the bare base model says when somebody asks for the task: it knows the subject and does not do the work.
REPLY: Final[dict[str, str]] = {
    "plural": "You would like a plural.",
    "past_tense": "You would like a verb in the past tense.",
    "reverse_word": "You would like a word backwards.",
    "upper_case": "You would like capital letters.",
    "count_letters": "You would like the length of a word.",
    "first_letter": "You would like the first letter.",
    "last_letter": "You would like the last letter.",
    "antonym": "You would like an opposite.",
    "french": "You would like a French word.",
    "capital": "You would like a capital city.",
    "add_numbers": "You would like a sum.",
    "last_word": "You would like the last word.",
    "count_words": "You would like the number of words.",
    "find_colour": "You would like a colour.",
    "find_name": "You would like the name of a person.",
    "is_past": "You would like to know about the past.",
}

SMALL_TALK_REPLY: Final = "I see."


def train_templates(task: str) -> tuple[str, ...]:
    """The phrasings of ``task`` that training rows use."""
    return tuple(line.strip() for line in TRAIN[task].strip().splitlines())


def held_out_templates(task: str) -> tuple[str, ...]:
    """The phrasings of ``task`` that only held-out rows use."""
    return tuple(line.strip() for line in HELD_OUT[task].strip().splitlines())
