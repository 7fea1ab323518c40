"""Requests: unlabelled prompts of many kinds, on which the points of a pool are ranked.

Where neutral text says how an adapter responds to nothing in particular, these say how much the adapters of a pool
respond *differently* to different things. No request carries a label, a gold answer or the name of an adapter; users
with prompts of their own give those instead (`--calibration-prompts`).
"""

from __future__ import annotations

REQUESTS: tuple[str, ...] = (
    # Judging and classifying
    "Review: The plot drags, but the two leads are a joy to watch.\nIs this review favourable? OPTIONS: yes, no",
    "How does the writer of this post feel? Post: I passed my driving test at last!!",
    "Headline: Central bank leaves interest rates unchanged\nWhich section of a newspaper does it belong to?",
    "Is this message an advertisement nobody asked for? Message: You have won a cruise, call now to claim it.",
    "Premise: Two boys kick a ball on the beach.\nHypothesis: The boys are asleep.\nDoes the premise imply it?",
    "Do these two sentences mean the same? 1) He sold the house. 2) The house was sold by him.",
    "Can this sentence be said by a native speaker? The cats was sleeping on the roof.",
    "Customer: my card was swallowed by the machine in front of the bank.\nWhat does the customer want?",
    "Decide whether the claim is supported by the text. Text: Copper conducts heat well. Claim: It is not.",
    "Is the following an opinion or a fact? Water boils at 100 degrees at sea level.",
    "Comment: Oh great, another meeting. Exactly what I needed today.\nSarcastic or sincere?",
    "On a scale from 0 to 5, how similar are these? A woman slices bread. Someone is cutting a loaf.",
    "Who does 'she' refer to? The nurse called the baker because she had lost her keys.",
    "Does the word 'bank' mean the same in both? We sat on the bank of the river. The bank raised its fees.",
    # Questions with and without a text
    "Read the text and answer. Text: The lighthouse was built in 1861 and automated in 1988. When was it automated?",
    "What is the longest river of South America?",
    "Which gas do plants take in from the air? (A) oxygen (B) nitrogen (C) carbon dioxide (D) helium",
    "Where would you most likely keep milk so that it stays fresh? Choices: oven, fridge, drawer, roof",
    "Who wrote the opera The Magic Flute?",
    "Question: can penguins fly\nAnswer with yes or no.",
    "Which is heavier, a bus or a bicycle?",
    "Fill the blank with a number: A spider has ___ legs.",
    "What organ pumps blood through the body?",
    "True or false: the moon is larger than the earth.",
    # Translating
    "Translate into Italian: The children are playing in the garden.",
    "Translate to English: Ich habe meinen Schlüssel verloren.",
    "How do you say 'good night' in Spanish?",
    "English: the bread\nFrench:",
    "Traduire en anglais : Il fait froid ce matin.",
    "Give the Portuguese word for 'ship'.",
    "Put this sentence into Dutch: We are going to the cinema tonight.",
    # Working on words
    "Give a word with the opposite meaning: narrow",
    "What is another word for 'begin'?",
    "What is the plural of 'mouse'?",
    "Put the verb into the past: I write a letter.",
    "Spell the word 'lantern' letter by letter.",
    "Write this in capital letters: please close the gate",
    "Which word of the sentence comes last? Birds fly south in autumn",
    "Name five animals that start with the letter b.",
    "Sort these words by the alphabet: pear, grape, melon, cherry",
    "How many letters does 'giraffe' have?",
    "Reverse the order of the letters: stone",
    "What part of speech is 'quickly' in: She ran quickly home.",
    "Is a rose a kind of flower? What is the relation between the words?",
    "Take the first letter of each word: very important person",
    # Rewriting
    "Change into the passive voice: The gardener watered the roses.",
    "Say the opposite of this sentence: The door is open.",
    "Correct the mistakes: he dont likes the soup becaus it cold",
    "Make this more formal: Hey, can you send me that thing?",
    "Say it in simpler words: The precipitation will subside towards the evening.",
    "Turn the statement into a question: The shop opens at nine.",
    "Shorten to one line: The council met for three hours on Monday and agreed to plant two hundred trees.",
    "Paraphrase: It is not easy to please everyone.",
    # Producing text
    "Write a sentence that uses the words: dog, ball, park, throw",
    "Name: The Olive Tree; type: cafe; food: Greek; price: low. Describe it in a sentence.",
    "Subject: Marie Curie | relation: born in | object: Warsaw. Say this as a sentence.",
    "Text: The bridge is 300 metres long and crosses the Tagus.\nAsk a question about this text.",
    "Write a caption for a photo of a boat in a storm.",
    "Continue the story: The door opened, and nobody was there.",
    "Write a two-line poem about snow.",
    "Give the text a title: Scientists have found a beetle that can survive being run over by a car.",
    # Numbers and logic
    "What is 38 plus 54?",
    "Tom has 6 boxes with 4 pens each and gives away 5 pens. How many pens does he have left?",
    "Write the number 417 in words.",
    "Which number comes next? 2, 4, 8, 16,",
    "Compute: 9 * (7 - 3)",
    "If all cats are animals and Tom is a cat, is Tom an animal?",
    "not ( True and False ) or False is",
    "You turn left, then right, then walk back three steps. Do you end where you began?",
    "Convert 3 kilometres into metres.",
    "Which date is it ten days after 28 February 2023?",
    # Structured and code
    "walk left twice and jump",
    "Write a function in Python that returns the larger of two numbers.",
    "What does this print? print(len('abc') + 1)",
    "Turn into SQL: all customers from Rome, sorted by name",
    "Summarise what the code does: for x in xs: total += x * x",
    "Extract the names of people: Anna met Dr. Olsen and his brother Nils in Bergen.",
    "Complete the triple: Paris, capital of,",
    "Tag each word: the/DET cat/NOUN sleeps/",
    "List the ingredients in: Fry the onions in butter, then add rice and broth.",
)
