// Prompts for the first look.

const NEUTRAL = [
  "What is the capital of Kenya?",
  "Translate to French: good morning, my friend",
  "Positive or negative? The food was cold and the waiter rude.",
  "Put into the past tense: I walk home and sing.",
];

const SHOWN = 5;

/** Adapters of `logo demo`, and requests in phrasings that none of them has seen. */
const DEMO = {
  past_tense: "Write the verb 'climb' in its past form.",
  capital: "Tell me which city is the capital of 'Kenya'.",
  french: "Tell me the French for \"night\".",
  reverse_word: "Please spell the word fence in reverse.",
  find_colour: "What colour is named in Jonas gladly pulled our grey candle?",
  plural: "Tell me how to write the noun \"lake\" in the plural.",
  upper_case: "Can you print poem in upper case?",
  antonym: "Tell me the antonym of cruel.",
};

/** `names`: ids of the pool. */
export function examples(names) {
  const here = new Set(names);
  const known = Object.keys(DEMO).filter((name) => here.has(name));
  return known.length < 3 ? NEUTRAL : known.slice(0, SHOWN).map((name) => DEMO[name]);
}
