// All scores of one prompt: a table of bars, best first, and for large pools a picture of the whole.

import { at, bar, make, named, number, plural, rowsOnDemand, score, shape, weight } from "./dom.js";

const ROWS = 20; // shown at first
const MANY = 40; // from here on there is a picture too
const HEIGHT = 100;

/** `reply`: of /v1/logo/select. */
export function showScores(reply, signal) {
  const chosen = new Map(reply.adapters.map((name, i) => [name, reply.weights[i]]));
  const rows = Object.entries(reply.scores).sort((a, b) => (b[1] ?? -Infinity) - (a[1] ?? -Infinity));
  at("scores-trouble").textContent = "";
  const long = reply.tokens === undefined ? "" : ` of ${plural(reply.tokens, "token")}`; // vLLM's server does not count
  at("scores-about").textContent =
    `How strongly each adapter responds to this prompt${long}, by the signal ${signal}. ` +
    `The best ${chosen.size === 1 ? "one is" : `${number(chosen.size)} are`} mixed.`;
  at("scores-body").replaceChildren(...(rows.length > MANY ? [picture(rows, chosen)] : []), ...table(rows, chosen));
}

export function scoresFailed(message) {
  at("scores-trouble").textContent = message;
  at("scores-about").textContent = "";
  at("scores-body").replaceChildren();
}

function range(rows) {
  const values = rows.map(([, value]) => value).filter((value) => value !== null);
  const least = values.reduce((a, b) => Math.min(a, b), 0); // not Math.min(...values): there may be very many
  const most = values.reduce((a, b) => Math.max(a, b), 0);
  return { least, span: most - least || 1 };
}

function table(rows, chosen) {
  const { least, span } = range(rows);
  const place = (value) => (value - least) / span;
  const titles = [["Adapter"], ["Bar", "drawn"], ["Score", "num"], ["Weight", "num wide"]];
  const head = titles.map(([title, kind]) =>
    make("th", { scope: "col", class: kind ?? null }, kind === "drawn" ? make("span", { class: "unseen" }, title) : title));
  const body = make("tbody");
  const more = make("p", { class: "more" });
  const row = ([name, value]) => make("tr", { class: chosen.has(name) ? "chosen" : null },
    named(name),
    make("td", { class: "drawn" }, value === null ? "" : bar(place(0), place(value), chosen.has(name) ? "chosen" : "other")),
    make("td", { class: "num" }, score(value)),
    make("td", { class: "num wide" }, chosen.has(name) ? weight(chosen.get(name)) : "–"));
  rowsOnDemand(body, more, rows, row, ROWS, 100);
  const caption = make("caption", { class: "unseen" }, "Scores of all adapters, best first, and the weights of those chosen");
  return [make("table", { class: "bars scores" }, caption, make("thead", {}, make("tr", {}, ...head)), body), more];
}

/** One column per adapter, best first. */
function picture(rows, chosen) {
  const { least, span } = range(rows);
  const y = (value) => HEIGHT - (((value ?? 0) - least) / span) * HEIGHT;
  const columns = (wanted) => rows
    .map(([name, value], i) => (chosen.has(name) === wanted ? `M${i} ${y(0)}V${y(value)}h1V${y(0)}z` : ""))
    .join("");
  const svg = shape("svg", { viewBox: `0 0 ${rows.length} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    shape("path", { d: columns(false), class: "other" }), shape("path", { d: columns(true), class: "chosen" }));
  const [best, last] = [rows[0], rows[rows.length - 1]];
  const told = `${plural(rows.length, "adapter")}, best first: from ${score(best[1])} to ${score(last[1])}`;
  svg.setAttribute("aria-label", `${told}. The table below has every number.`);
  const reading = make("figcaption", {}, told);
  svg.addEventListener("pointermove", (event) => {
    const seen = svg.getBoundingClientRect();
    const i = Math.floor(((event.clientX - seen.left) / seen.width) * rows.length);
    const [name, value] = rows[Math.max(0, Math.min(rows.length - 1, i))];
    reading.textContent = `${number(i + 1)}. ${name}: ${score(value)}`;
  });
  svg.addEventListener("pointerleave", () => { reading.textContent = told; });
  return make("figure", { class: "columns" }, svg, reading);
}
