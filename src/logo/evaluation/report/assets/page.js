
"use strict";
// Text from data only ever becomes text nodes. Blocks of data are unpacked when somebody looks at them.
(() => {
  const PAGE = 20;
  const BARS = 8;
  const RIGHT = 0.5;
  const at = (id) => document.getElementById(id);

  // -- data ---------------------------------------------------------------------------------------------------------

  const cache = new Map();

  function block(name) {
    if (!cache.has(name)) cache.set(name, unpack(at(`b-${name}`).textContent));
    return cache.get(name);
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function make(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  // -- instances ----------------------------------------------------------------------------------------------------

  const FRESH = { dataset: -1, run: 0, show: "all", order: "dataset", text: "", page: 0 };
  let index = null;
  let state = { ...FRESH };
  let entries = [];
  let turn = 0; // what was asked last wins, whatever is ready first
  const haystacks = new Map();

  const isRight = (value) => value !== null && value >= RIGHT;

  function passes(set, row) {
    const value = set.values[state.run][row];
    const others = set.values.filter((values, run) => values && run !== state.run && values[row] !== null);
    const elsewhere = others.map((values) => isRight(values[row]));
    switch (state.show) {
      case "right": return isRight(value);
      case "wrong": return !isRight(value);
      case "lost": return !isRight(value) && elsewhere.includes(true);
      case "won": return isRight(value) && elsewhere.includes(false);
      case "failed": return set.errors[state.run].includes(row);
      default: return true;
    }
  }

  async function haystack(dataset, run) {
    const key = `${run}-${dataset}`;
    if (!haystacks.has(key)) {
      const [prompts, answers] = await Promise.all([block(`p${dataset}`), block(`a${key}`)]);
      haystacks.set(key, answers.map((answer, row) => {
        if (!answer) return "";
        const [context, golds] = prompts[row] ?? ["", []];
        const names = answer[1].map((number) => index.adapters[number]);
        return [context, ...golds, answer[0], ...names].join("\n").toLowerCase();
      }));
    }
    return haystacks.get(key);
  }

  async function search() {
    const chosen = state.dataset < 0 ? index.datasets.map((_, number) => number) : [state.dataset];
    const wanted = state.text.trim().toLowerCase();
    const found = [];
    for (const dataset of chosen) {
      const set = index.datasets[dataset];
      const values = set.values[state.run];
      if (!values) continue;
      const texts = wanted ? await haystack(dataset, state.run) : null;
      values.forEach((value, row) => {
        if (value !== null && passes(set, row) && (!texts || texts[row].includes(wanted))) found.push([dataset, row, value]);
      });
    }
    if (state.order === "worst") found.sort((a, b) => a[2] - b[2]);
    if (state.order === "best") found.sort((a, b) => b[2] - a[2]);
    return found;
  }

  async function choose(change) {
    state = { ...state, page: 0, ...change };
    const mine = ++turn;
    if (state.text) at("status").textContent = "Searching …";
    const found = await search();
    if (mine !== turn) return;
    entries = found;
    fillControls();
    await draw(mine);
  }

  async function draw(mine = ++turn) {
    const shown = entries.slice(state.page * PAGE, (state.page + 1) * PAGE);
    const lines = await Promise.all(shown.map((entry) => line(...entry)));
    if (mine !== turn) return;
    at("list").replaceChildren(...lines);
    const total = entries.length;
    const pages = Math.max(1, Math.ceil(total / PAGE));
    const range = total ? `${state.page * PAGE + 1}–${state.page * PAGE + shown.length} of ${total}` : "No such instance";
    at("status").textContent = total ? `${range} instances` : "No such instance.";
    at("page").textContent = `page ${state.page + 1} of ${pages}`;
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page >= pages - 1;
  }

  function worth(set, value) {
    const kind = isRight(value) ? "yes" : "no";
    const text = set.graded ? (100 * value).toFixed(1) : isRight(value) ? "✓" : "✗";
    const told = set.graded ? ` ${set.metric}` : isRight(value) ? "right" : "wrong";
    return make("span", { class: `worth ${kind}` },
      make("span", { "aria-hidden": set.graded ? null : "true" }, text), make("span", { class: "unseen" }, told));
  }

  async function line(dataset, row, value) {
    const set = index.datasets[dataset];
    const [prompts, answers] = await Promise.all([block(`p${dataset}`), block(`a${state.run}-${dataset}`)]);
    const prompt = prompts[row];
    const said = answers[row][0];
    const gist = prompt ? prompt[0].trim().replaceAll(/\s+/g, " ").slice(0, 400) : "(the prompt is not at hand)";
    const gold = prompt ? ` · gold: ${prompt[1][0]}` : "";
    const button = make("button", { type: "button", class: "line", "aria-expanded": "false" },
      worth(set, value),
      make("span", { class: "where" }, `${set.name} ${row + 1}`),
      make("span", { class: "gist" },
        make("span", {}, ...marked(gist)),
        make("span", { class: "said" }, ...marked(`${said || "(no answer)"}`.slice(0, 300)), ...marked(gold.slice(0, 300)))));
    const item = make("li", { "data-place": `${dataset}/${row}` }, button);
    button.addEventListener("click", () => toggle(item, dataset, row));
    return item;
  }

  async function toggle(item, dataset, row) {
    const button = item.firstChild;
    const opens = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(opens));
    if (!opens) {
      item.lastChild.remove();
      return;
    }
    const holder = make("div", { class: "open" });
    item.append(holder);
    holder.append(...(await opened(dataset, row)));
    try {
      history.replaceState(null, "", `#i/${encodeURIComponent(index.datasets[dataset].name)}/${row + 1}`);
    } catch { /* a page without an address of its own */ }
  }

  async function opened(dataset, row) {
    const set = index.datasets[dataset];
    const prompt = (await block(`p${dataset}`))[row];
    const asked = prompt
      ? [make("h4", {}, "Prompt"), make("div", { class: "prompt text", tabindex: "0" }, ...marked(prompt[0]))]
      : [make("p", { class: "notice" }, `The prompt is not at hand: ${set.why || "the result does not hold it"}.`)];
    const parts = [make("div", {}, ...asked)];
    if (prompt) {
      const golds = prompt[1].map((text) => make("li", { class: "text" }, ...marked(text)));
      parts.push(make("div", {}, make("h4", {}, golds.length > 1 ? "Gold texts" : "Gold text"), make("ul", { class: "golds" }, ...golds)));
    }
    const runs = index.runs.map((_, run) => run).filter((run) => set.values[run] && set.values[run][row] !== null);
    runs.sort((a, b) => (b === state.run) - (a === state.run) || a - b);
    const cards = await Promise.all(runs.map((run) => answerCard(set, dataset, row, run)));
    parts.push(make("div", { class: "answers" }, ...cards));
    return parts;
  }

  async function answerCard(set, dataset, row, run) {
    const [said, adapters, weights, values, own, rank, scored, error] = (await block(`a${run}-${dataset}`))[row];
    const card = make("div", { class: "answer" },
      make("p", { class: "head" },
        make("bdi", { class: run === state.run ? "chosen" : null }, index.runs[run]), worth(set, set.values[run][row])),
      make("p", { class: "text" }, ...marked(said || "(no answer)")));
    if (error !== null) card.append(make("p", { class: "small no" }, `Failed: ${error}`));
    const told = Object.entries(values).map(([name, value]) => `${name} ${(100 * value).toFixed(1)}`).join(" · ");
    if (set.graded) card.append(make("p", { class: "small" }, told));
    if (own !== null && rank !== null) {
      card.append(make("p", { class: "small" }, "Right adapter: ", make("b", {}, own), `, score ranked ${rank} of ${scored}`));
    }
    if (!adapters.length) card.append(make("p", { class: "small" }, "No adapter: the base model alone."));
    else card.append(...bars(adapters.map((number) => index.adapters[number]), weights, own));
    return card;
  }

  function bars(names, weights, own) {
    const heaviest = Math.max(...weights.map(Math.abs), 1e-9);
    const rows = names.map((name, number) => {
      const fill = make("i");
      fill.style.width = `${(100 * Math.abs(weights[number])) / heaviest}%`;
      return make("li", {},
        make("bdi", { class: name === own ? "name right" : "name", title: name }, ...marked(name)),
        make("span", { class: "bar", "aria-hidden": "true" }, fill),
        make("span", { class: "value" }, weights[number].toFixed(3)));
    });
    const list = make("ol", { class: "bars", "aria-label": "Adapters and their weights" }, ...rows.slice(0, BARS));
    if (rows.length <= BARS) return [list];
    const more = make("button", { type: "button", class: "more" }, `${rows.length - BARS} more`);
    more.addEventListener("click", () => {
      list.append(...rows.slice(BARS));
      more.remove();
    });
    return [list, more];
  }

  function marked(text) {
    const wanted = state.text.trim().toLowerCase();
    const lower = text.toLowerCase();
    if (!wanted || lower.length !== text.length) return [text];
    const parts = [];
    let from = 0;
    for (let found = lower.indexOf(wanted); found >= 0; found = lower.indexOf(wanted, from)) {
      parts.push(text.slice(from, found), make("mark", {}, text.slice(found, found + wanted.length)));
      from = found + wanted.length;
    }
    parts.push(text.slice(from));
    return parts;
  }

  // -- controls -----------------------------------------------------------------------------------------------------

  function fillControls() {
    at("f-dataset").value = String(state.dataset);
    at("f-run").value = String(state.run);
    at("f-show").value = state.show;
    at("f-order").value = state.order;
    if (at("f-text").value !== state.text) at("f-text").value = state.text;
  }

  function turnPage(step) {
    const last = Math.max(0, Math.ceil(entries.length / PAGE) - 1);
    const page = Math.max(0, Math.min(last, state.page + step));
    if (page === state.page) return;
    state = { ...state, page };
    draw().then(() => at("browser").scrollIntoView({ block: "start" }));
  }

  function move(step) {
    const buttons = [...at("list").querySelectorAll(".line")];
    const here = buttons.findIndex((button) => button.parentElement.contains(document.activeElement));
    const next = buttons[here < 0 ? 0 : Math.max(0, Math.min(buttons.length - 1, here + step))];
    if (next) next.focus();
  }

  function listen() {
    const changed = { "f-dataset": "dataset", "f-run": "run", "f-show": "show", "f-order": "order" };
    for (const [id, key] of Object.entries(changed)) {
      at(id).addEventListener("change", (event) => {
        const value = event.target.value;
        choose({ [key]: key === "dataset" || key === "run" ? Number(value) : value });
      });
    }
    let timer = 0;
    at("f-text").addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => choose({ text: event.target.value }), 120);
    });
    at("f-reset").addEventListener("click", () => choose(FRESH));
    at("previous").addEventListener("click", () => turnPage(-1));
    at("next").addEventListener("click", () => turnPage(1));
    // Only while the focus is among the instances, so that no letter is taken from anybody else.
    at("browser").setAttribute("tabindex", "-1");
    at("browser").addEventListener("keydown", (event) => {
      const writing = ["INPUT", "SELECT"].includes(event.target.tagName);
      if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = {
        j: () => move(1), k: () => move(-1), n: () => turnPage(1), p: () => turnPage(-1), "/": () => at("f-text").focus(),
      }[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
    for (const link of document.querySelectorAll("a[data-dataset]")) {
      link.addEventListener("click", () => {
        choose({ ...FRESH, dataset: index.datasets.findIndex((set) => set.name === link.dataset.dataset) });
      });
    }
  }

  async function openAddressed() {
    const [kind, name, number] = location.hash.slice(1).split("/");
    if (kind !== "i" || !number) return false;
    const dataset = index.datasets.findIndex((set) => set.name === decodeURIComponent(name));
    const row = Number(number) - 1;
    if (dataset < 0) return false;
    const run = index.datasets[dataset].values.findIndex((values) => values && (values[row] ?? null) !== null);
    if (run < 0) return false;
    await choose({ ...FRESH, dataset, run });
    const place = entries.findIndex((entry) => entry[1] === row);
    state = { ...state, page: Math.floor(place / PAGE) };
    await draw();
    const item = [...at("list").children].find((each) => each.dataset.place === `${dataset}/${row}`);
    await toggle(item, dataset, row);
    item.scrollIntoView({ block: "start" });
    return true;
  }

  async function start() {
    index = await block("index");
    at("f-dataset").append(new Option("all", "-1"), ...index.datasets.map((set, number) => new Option(set.name, number)));
    at("f-run").append(...index.runs.map((label, number) => new Option(label, number)));
    if (index.runs.length < 2) {
      for (const option of at("f-show").querySelectorAll("[value=lost], [value=won]")) option.remove();
    }
    if (!index.datasets.some((set) => set.errors.some((rows) => rows.length))) {
      at("f-show").querySelector("[value=failed]").remove();
    }
    listen();
    at("browser").hidden = false;
    if (!(await openAddressed())) await choose({});
    document.documentElement.dataset.ready = "yes";
  }

  // What is folded on the screen is not folded on paper.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const each of folded) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of folded) each.open = false;
  });

  if (typeof DecompressionStream === "undefined") {
    const notice = make("p", { class: "notice" }, "Browsing instances needs a newer browser (one that has DecompressionStream).");
    at("browser").before(notice);
  } else {
    start();
  }
})();
