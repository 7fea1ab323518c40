// The page: what is asked, of whom, and where the answers go.

import { Answer } from "./answer.js";
import { hasKey, json, setKey, Trouble } from "./api.js";
import { at, button, plural } from "./dom.js";
import { examples } from "./examples.js";
import { Pool } from "./pool.js";
import { scoresFailed, showScores } from "./scores.js";

const RETRY_MS = 3000;

const answers = {
  base: new Answer(at("base"), "Base model", redraw),
  logo: new Answer(at("logo"), "LoGo", redraw),
};
const pool = new Pool(force);
const server = { auto: "logo", base: "", k: 0, signal: "" };
let forced = null;
let running = null;
let retry = 0;

// -- loading ---------------------------------------------------------------------------------------------------------

async function load() {
  clearTimeout(retry);
  try {
    const [models, adapters] = await Promise.all([json("v1/models"), json("v1/logo/adapters")]);
    server.auto = models.data.find(({ logo }) => logo?.role === "auto").id;
    server.base = adapters.base_model;
    describe(models.data, adapters);
    show(["ask", "pool"], ["key", "trouble"]);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    if (error.status === 401) return askKey();
    trouble(error);
  } finally {
    document.documentElement.dataset.ready = "yes";
  }
}

function describe(models, { base_model: name, default_k: k, signal, data }) {
  Object.assign(server, { k, signal });
  document.title = `${name} · LoGo`;
  at("name").textContent = name;
  at("k").placeholder = String(k);
  const room = models[0]?.max_model_len;
  if (room) at("max-tokens").max = String(room);
  at("forget").hidden = !hasKey();
  at("spec").hidden = hasKey(); // a link cannot bring the key along
  fill(data);
  const shown = examples(data.map((adapter) => adapter.id));
  at("examples").replaceChildren(...shown.map((text) => button(text, () => {
    at("prompt").value = text;
    at("ask-form").requestSubmit();
  })));
  json("version").then(({ version }) => { at("version").textContent = `· version ${version} ·`; }).catch(() => {});
}

function fill(adapters) {
  pool.update(adapters);
  const picks = Math.min(server.k, adapters.length);
  const those = picks === 1 ? "the one that fits best" : `those that fit best, ${picks} at most, and is answered with their mixture`;
  at("about").textContent = `${plural(adapters.length, "adapter")} in the pool. Every prompt picks ${those}.`;
}

function show(seen, unseen = []) {
  for (const id of seen) at(id).hidden = false;
  for (const id of unseen) at(id).hidden = true;
}

function trouble(error) {
  const box = at("trouble");
  box.hidden = false;
  if (box.firstChild?.textContent !== error.message) {
    box.replaceChildren(document.createTextNode(error.message), " ", button("Try again", load));
  }
  if (error.isPassing) retry = setTimeout(load, RETRY_MS);
}

function askKey() {
  show(["key"], ["trouble", "ask", "pool"]);
  at("key-trouble").textContent = hasKey() ? "This key was refused. Please check it." : "";
  at("forget").hidden = true;
  at("key-text").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("key-text").value.trim();
  if (!/^[\x21-\x7e]+$/.test(text)) {
    at("key-trouble").textContent = "A key has no spaces and only plain letters, digits and signs.";
    return;
  }
  setKey(text);
  load().then(() => {
    if (at("ask").hidden) return;
    at("key-text").value = "";
    at("prompt").focus();
  });
});

at("forget").addEventListener("click", () => {
  setKey("");
  location.reload();
});

// -- asking ----------------------------------------------------------------------------------------------------------

function request(model) {
  const text = at("prompt").value;
  const isChat = at("mode").value === "chat";
  const input = isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const options = at("k").value ? { logo: { k: Number(at("k").value) } } : {};
  const select = { ...input, ...options };
  const body = {
    model,
    ...input,
    ...(model === server.auto ? options : {}),
    max_tokens: Number(at("max-tokens").value),
    temperature: Number(at("temperature").value),
    stream: true,
    return_token_ids: true,
  };
  return { path: isChat ? "v1/chat/completions" : "v1/completions", body, select };
}

async function ask() {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  const right = request(forced ?? server.auto);
  const left = request(server.base);
  answers.base.note.textContent = server.base;
  answers.logo.title.textContent = forced ?? "LoGo";
  answers.logo.note.textContent = forced === null ? "the adapters that fit" : "this adapter only";
  at("asked").textContent = at("prompt").value;
  at("said").textContent = "";
  show(["answers"]);
  at("scores").classList.add("stale");
  busy(true);
  bringIntoView(at("answers"));
  let selecting = null;
  const headed = () => { selecting = select(right.select, signal); };
  try {
    const both = await Promise.all([
      answers.base.ask(left.path, left.body, { signal }),
      answers.logo.ask(right.path, right.body, { signal, headed }),
    ]);
    await selecting;
    if (signal.aborted) at("said").textContent = "Stopped.";
    else if (!both.includes(null)) {
      at("said").textContent = `${forced ?? "LoGo"} answers: ${both[1]} The base model answers: ${both[0]}`;
    }
  } catch (error) {
    running.abort();
    if (!(error instanceof Trouble)) throw error;
    askKey(); // the only one that comes here: the key is no longer good
  } finally {
    if (selecting === null) show([], ["scores"]); // those of an earlier prompt
    busy(false);
    running = null;
    refresh();
  }
}

async function select(body, signal) {
  try {
    showScores(await json("v1/logo/select", { body, signal }), server.signal);
    show(["scores"]);
  } catch (error) {
    if (signal.aborted) return show([], ["scores"]); // those of an earlier prompt
    if (!(error instanceof Trouble)) throw error;
    scoresFailed(error.message);
    show(["scores"]);
  } finally {
    at("scores").classList.remove("stale");
  }
}

async function refresh() {
  try {
    const { data } = await json("v1/logo/adapters");
    fill(data);
    if (forced !== null && !data.some((adapter) => adapter.id === forced)) force(null);
  } catch {
    // the next answer will say what is wrong
  }
}

function busy(isBusy) {
  const [hidden, seen] = isBusy ? ["send", "stop"] : ["stop", "send"];
  const wasFocused = document.activeElement === at(hidden);
  at(seen).hidden = false;
  if (wasFocused) at(seen).focus();
  at(hidden).hidden = true;
}

function bringIntoView(node) {
  const { top } = node.getBoundingClientRect();
  if (top > innerHeight * 0.7) node.scrollIntoView({ block: "start" });
}

function redraw() {
  const both = Object.values(answers);
  const whole = Math.max(...both.map((answer) => answer.length));
  for (const answer of both) answer.drawStrip(whole);
}

function force(name) {
  forced = name;
  pool.setForced(name);
  at("forced-name").textContent = name ?? "";
  at("forced").hidden = name === null;
  at("said").textContent = name === null ? "LoGo chooses again." : `Only ${name} will answer.`;
  if (name !== null) at("prompt").focus();
}

at("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => running?.abort());
at("unforce").addEventListener("click", () => {
  force(null);
  at("prompt").focus();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  at("ask-form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

if (/Mac|iPhone|iPad/.test(navigator.platform)) at("modifier").textContent = "⌘";
load();
