// The server's page: asks one model, shows its answer as it streams and the adapters that gave it, and lists the pool.
// Whatever comes from the server is written with textContent or as a text node, never as HTML: names are untrusted.

const AUTO = "logo"; // the model for which the prompt selects the adapters

const at = (id) => document.getElementById(id);

let key = ""; // of the API, in memory only
let base = "";
let adapters = []; // of /v1/logo/adapters
let running = null; // the AbortController of the answer that is streaming

function make(name, { className = "", text = "", ...attributes } = {}, ...children) {
  const node = Object.assign(document.createElement(name), { className, textContent: text });
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}

/** Sends a request, and throws what is wrong as one line; `status` is HTTP's. */
async function send(path, { body, signal } = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store" };
  const answer = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Error("The server cannot be reached. Is it still running?");
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({})); // something between us and the server may answer with no JSON
  const line = said.error?.message ?? `The server answered ${answer.status} ${answer.statusText}`;
  throw Object.assign(new Error(line), { status: answer.status });
}

/** The objects of a stream of server-sent events, up to its [DONE]. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Shows an error as one line in its place; without a valid key, asks for one. */
function fail(error, place) {
  const refused = error.status === 401;
  at(refused ? "trouble" : place).textContent = refused && !key ? "" : error.message;
  at("key-form").hidden = !refused;
  at("inside").hidden = refused || !base;
  if (refused) at("key").focus();
}

async function ask() {
  running?.abort();
  const own = running = new AbortController();
  const began = performance.now();
  const text = at("prompt").value;
  const isChat = at("chat").checked;
  const body = {
    model: at("model").value,
    ...(isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    max_tokens: Number(at("longest").value), temperature: 0, stream: true, stream_options: { include_usage: true },
  };
  for (const id of ["answer", "error", "trouble", "confidence", "mixture"]) at(id).replaceChildren();
  at("answer").setAttribute("aria-busy", "true"); // a screen reader speaks when it is complete
  at("status").textContent = "Selecting …";
  at("stop").disabled = false;
  let end = "";
  try {
    const answer = await send(isChat ? "v1/chat/completions" : "v1/completions", { body, signal: own.signal });
    let tokens = 0;
    for await (const { logo, choices, usage } of events(answer)) {
      if (own !== running) return;
      if (logo ?? body.model === base) showMixture(logo || { adapters: [], weights: [] }); // vLLM says nothing of its base
      tokens = usage?.completion_tokens ?? tokens;
      write(choices[0]?.text ?? choices[0]?.delta?.content ?? "");
      if (choices[0]?.finish_reason === "length") end = "; cut at max tokens";
    }
    end = `${tokens} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s${end}`;
  } catch (error) {
    end = own.signal.aborted ? "Stopped." : "";
    if (!own.signal.aborted) fail(error, "error");
  } finally {
    own.abort(); // a stream that is left early ends on the server, too
    if (own === running) {
      running = null;
      at("status").textContent = end;
      at("answer").setAttribute("aria-busy", "false");
      if (document.activeElement === at("stop")) at("prompt").focus();
      at("stop").disabled = true;
      if (at("key-form").hidden) load(); // how often adapters were selected has changed
    }
  }
}

function write(piece) {
  if (!piece) return;
  const box = at("answer");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  at("status").textContent = "Answering …";
  box.append(box.textContent ? piece : piece.trimStart());
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

function showMixture({ adapters: names, weights, confidence }) {
  const widest = Math.max(...weights.map(Math.abs)) || 1;
  at("mixture").replaceChildren(...names.map((name, i) => {
    const bar = make("span", { "aria-hidden": "true" });
    bar.style.width = `${(Math.abs(weights[i]) / widest) * 100}%`;
    const weight = make("td", { className: "number", text: weights[i].toFixed(3) });
    return make("tr", {}, make("th", { scope: "row" }, make("bdi", { text: name }), bar), weight);
  }));
  const sure = typeof confidence === "number" ? `Confidence ${confidence.toFixed(2)}` : "";
  at("confidence").textContent = names.length ? sure : "None: the base model alone.";
}

async function load() {
  try {
    const found = await (await send("v1/logo/adapters")).json();
    ({ base_model: base, data: adapters } = found);
    document.title = `${base} · LoGo`;
    at("name").textContent = base;
    at("about").textContent = `Every prompt picks from ${adapters.length} adapters, by the signal ${found.signal}, ` +
      `up to ${Math.min(found.default_k, adapters.length)} at a time.`;
    const chosen = at("model").value || AUTO;
    const names = [[AUTO, `${AUTO} (the prompt selects)`], [base, `${base} (no adapter)`], ...adapters.map(({ id }) => [id, id])];
    at("model").replaceChildren(...names.map(([value, text]) => make("option", { value, text })));
    at("model").value = names.some(([value]) => value === chosen) ? chosen : AUTO;
    showPool();
    at("key-form").hidden = true;
    at("inside").hidden = false;
  } catch (error) {
    fail(error, "trouble");
  }
}

function showPool() {
  const wanted = at("search").value.trim().toLowerCase();
  const found = adapters.filter(({ id }) => id.toLowerCase().includes(wanted));
  at("count").textContent = `${found.length} of ${adapters.length} adapters`;
  at("pool").replaceChildren(...found.map(({ id, rank, selected }) => make("tr", {},
    make("th", { scope: "row" }, make("bdi", { text: id })),
    make("td", { className: "number", text: rank }),
    make("td", { className: "number", text: selected }),
    make("td", { className: "act" }, make("button", { type: "button", value: id, text: "Use", "aria-label": `Use ${id} alone` })))));
}

function on(id, event, then) {
  at(id).addEventListener(event, (seen) => {
    if (event === "submit") seen.preventDefault();
    then(seen);
  });
}

on("pool", "click", ({ target }) => { at("model").value = target.value || at("model").value; });
on("search", "input", showPool);
on("stop", "click", () => running?.abort());
on("ask", "submit", ask);
on("key-form", "submit", () => {
  key = at("key").value.trim();
  at("key").value = "";
  load().then(() => at("key-form").hidden && at("prompt").focus());
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === at("prompt")) at("ask").requestSubmit();
});

load().finally(() => { document.documentElement.dataset.ready = "yes"; });
