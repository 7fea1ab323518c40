"""The texts of a calibration: neutral ones, and unlabelled requests of many kinds.

A calibrated signal compares each adapter's response to a prompt with its responses to the neutral texts. These were
written for this purpose. They are short and spread over prose, questions, instructions, dialogue, code, lists, numbers
and languages, so that no adapter was trained for many of them. The requests rank the points of a pool by how
differently its adapters respond to different requests. They carry no label, answer or adapter name; users with prompts
of their own give those instead (`--calibration-prompts`).

The key of a stored calibration depends on all texts: if one changes, calibrations are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts on which adapters are calibrated.

    Attributes:
        neutral: texts that give the reference and the whitening.
        requests: unlabelled prompts by which points are ranked; none if all points are read.
    """

    neutral: Sequence[Sequence[int]]
    requests: Sequence[Sequence[int]]

    @property
    def rows(self) -> list[Sequence[int]]:
        """All of them, neutral ones first."""
        return [*self.neutral, *self.requests]


NEUTRAL: tuple[str, ...] = (
    # Prose
    "The ferry was late again, and most of the passengers had given up looking at the timetable.",
    "After the storm the garden smelled of wet earth and broken branches.",
    "My uncle collects lamps. He has never been able to say why, and nobody asks any more.",
    "It took the village eleven years to rebuild the bridge, and an afternoon to argue about its name.",
    "She folded the letter twice, put it back into the drawer and locked it.",
    "Glaciers move slowly, but they carry stones the size of houses with them.",
    "In the early morning the market is quiet; the noise begins when the buses arrive.",
    "The committee will publish its report in spring, together with the comments it received.",
    "A violin maker once told me that the varnish matters less than people think.",
    "Most of the rain falls between October and March, mainly on the western slopes.",
    "He had expected a palace and found an office with two chairs and a broken heater.",
    "The museum closes at five, although the last visitors seldom leave before a quarter past.",
    "Old maps show a road here, but there is nothing left of it except a line of trees.",
    "When the power came back, every clock in the house blinked at a different time.",
    "Bees find their way by the position of the sun, even when it is hidden by clouds.",
    "Nobody in the office could remember who had bought the plant or who watered it.",
    "Shares of the shipping company rose on Tuesday after it announced a new route.",
    "The recipe asks for patience more than for skill.",
    "For a long time physicists believed that light needed a medium to travel through.",
    "At the end of the season the players went home, and the stadium stood empty until June.",
    # Questions
    "Why do some rivers change their course after an earthquake?",
    "Could you tell me where the nearest pharmacy is?",
    "What would happen if everybody worked four days a week?",
    "How long does it take until paint is really dry?",
    "Who decides which songs are played on the radio?",
    "Is it worth repairing a ten year old washing machine?",
    "Where do sea turtles go in winter?",
    "Which of the two routes has less traffic on Fridays?",
    "Do you remember the name of the restaurant we went to last summer?",
    "When did people start to use umbrellas against the sun?",
    # Instructions and requests
    "Write a short note to your neighbours about the building work next week.",
    "Explain to a child how a thermometer works.",
    "Please summarise the discussion above in a few lines.",
    "Suggest three names for a small bakery.",
    "Describe the view from your window.",
    "Give me some advice on how to prepare for a job interview.",
    "Compare travelling by train with travelling by car.",
    "Read the following text and say what you think about it.",
    "List what should be packed for a weekend in the mountains.",
    "Complete the form below and send it back to us.",
    "Rewrite the paragraph so that it sounds more friendly.",
    "Think of a title for this story.",
    # Prompts with a frame
    "Input: the blue folder on the second shelf\nOutput:",
    "Question: What is this text about?\nText: The harbour was built in three stages.\nAnswer:",
    "Subject: Your order\n\nDear customer,\nyour parcel left our warehouse this morning.",
    "### Instruction:\nContinue the text.\n\n### Response:\nIt was a cold day",
    "User: Hello, are you there?\nAssistant: Yes, how can I help you?\nUser:",
    "Passage: The library moved into the old station in 1987.\nStatement: The library is in a former station.",
    "Sentence: They painted the fence before it rained.\nLabel:",
    "Q: How far is it?\nA:",
    # Dialogue and messages
    '"Leave it," he said. "It will still be there tomorrow."',
    "Are we still meeting at eight? I might be ten minutes late, sorry!",
    "- Did you see the game?\n- Only the second half.\n- Then you missed the best part.",
    "Thanks for your message. I am out of the office until Monday.",
    "omg the bus just drove past me, this day can not get any better lol",
    "Great service and friendly people, but the room was rather small.",
    # Code and markup
    "def area(width, height):\n    return width * height",
    "for (let i = 0; i < items.length; i++) {\n  console.log(items[i]);\n}",
    "SELECT name, city FROM customers WHERE city = 'Lisbon' ORDER BY name;",
    "#!/bin/sh\nset -e\nmkdir -p build && cd build && cmake ..",
    "<ul>\n  <li>First</li>\n  <li>Second</li>\n</ul>",
    '{"id": 7, "tags": ["red", "round"], "price": 2.5}',
    "# Heading\n\nSome *text* with a [link](https://example.org).",
    "Traceback (most recent call last):\nKeyError: 'name'",
    # Lists, numbers, tables
    "apples, onions, rice, two lemons, olive oil",
    "1. Open the lid.\n2. Remove the filter.\n3. Rinse it under running water.",
    "Monday 9:30, Tuesday 11:00, Thursday 14:15",
    "3, 8, 15, 24, 35",
    "x = 4 and y = 9, so x + y = 13.",
    "Name | Age | Town\nMaria | 41 | Porto\nJonas | 28 | Bergen",
    "Total: 1,284.50 EUR (VAT included)",
    "12 March 1954 - 3 August 2011",
    # Single words and fragments
    "window",
    "yes",
    "the old harbour",
    "Once upon a time",
    "in spite of everything",
    "Dr. Helen Park, Department of Geology",
    # Other languages
    "Der Zug nach Hamburg fährt heute von einem anderen Gleis ab.",
    "Können Sie mir sagen, wie spät es ist?",
    "Le marché se tient chaque samedi sur la place de l'église.",
    "Je voudrais une table pour deux personnes, s'il vous plaît.",
    "Mi hermana vive en un pueblo pequeño cerca del mar.",
    "¿Qué vas a hacer este fin de semana?",
    "Il treno è partito senza di noi.",
    "A chuva começou logo depois do almoço.",
    "Het museum is op maandag gesloten.",
    "Pociąg odjeżdża za pięć minut.",
    "Tåget var försenat och kaffet var kallt.",
    "Завтра утром мы едем на дачу.",
    "Sabah erkenden yola çıktık.",
    "今日は朝から雨が降っています。",
    "这家书店的二楼有一个小咖啡馆。",
    "오늘은 날씨가 참 좋네요.",
    "كان البحر هادئا في ذلك الصباح.",
    "आज बाज़ार में बहुत भीड़ थी।",
)

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
