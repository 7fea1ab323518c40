// Talking to the server: the key, JSON, server-sent events, and every failure as one line.

const KEY = "logo-key";
const LOST = "The connection to the server was lost. Is it still running?";
const CUT = "The connection ended before the answer did.";

let key = stored();

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // the browser keeps nothing for this page
  }
}

export const hasKey = () => key !== "";

export function setKey(text) {
  key = text;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // then it lasts until the page is left
  }
}

/** What went wrong, in one line. `status` is HTTP's; 0: there was no answer. */
export class Trouble extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }

  get isPassing() {
    return this.status === 0 || this.status === 429 || this.status === 503;
  }
}

async function send(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  const answer = await reached(() => fetch(path, options), signal);
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function reached(work, signal) {
  try {
    return await work();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Trouble(LOST);
  }
}

async function refusal(answer) {
  let message = `The server answered ${answer.status} ${answer.statusText}`.trim() + ".";
  try {
    const { error } = await answer.json();
    if (typeof error?.message === "string") message = sentence(error.message);
  } catch {
    // not JSON: something between us and the server
  }
  const again = answer.status === 429 || answer.status === 503;
  if (again && !/try again/i.test(message)) message += ` Try again${wait(answer.headers.get("Retry-After"))}.`;
  return new Trouble(message, answer.status);
}

function sentence(text) {
  const begun = /^[a-z]+[' ]/.test(text) ? text[0].toUpperCase() + text.slice(1) : text;
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}

const wait = (seconds) => (/^\d+$/.test(seconds ?? "") ? ` in ${seconds} s` : " in a moment");

export async function json(path, options = {}) {
  const answer = await send(path, options);
  return reached(() => answer.json(), options.signal);
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Trouble("The server sent something that is not JSON.", 200);
  }
}

/** The objects of a stream, up to its [DONE]. */
export async function* events(path, options) {
  const answer = await send(path, options);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reached(() => reader.read(), options.signal);
      if (done) throw new Trouble(CUT);
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = parsed(data);
        if (event.error) throw new Trouble(sentence(event.error.message), 200);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
