// Building elements and writing numbers. Text from the server only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

export const at = (id) => document.getElementById(id);

/** An element. Attributes that are null or false are left out; children are nodes or text. */
export function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function button(text, action, attributes = {}) {
  const node = make("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", () => action(node));
  return node;
}

/** A bar from one share of the width to another. The number beside it says the same, so it is hidden from readers. */
export function bar(from, to, kind) {
  const [left, right] = [Math.min(from, to), Math.max(from, to)];
  const inside = { x: `${left * 100}%`, width: `${(right - left) * 100}%`, height: "100%", rx: 2, class: kind };
  return shape("svg", { class: "bar", "aria-hidden": "true" }, shape("rect", inside));
}

/** A name as a cell that heads its row; long ones may break behind their punctuation. */
export function named(name) {
  const pieces = name.split(/(?<=[_./-])/).flatMap((piece, i) => (i ? [make("wbr"), piece] : [piece]));
  return make("th", { scope: "row", class: "name" }, ...pieces);
}

/** A table that is read to the end of `shown` rows, and then on demand: `rows` may be very many. */
export function rowsOnDemand(body, more, rows, render, shown, step) {
  body.replaceChildren(...rows.slice(0, shown).map(render));
  more.replaceChildren();
  if (rows.length <= shown) return;
  const next = Math.min(step, rows.length - shown);
  const go = () => {
    const first = body.children.length;
    rowsOnDemand(body, more, rows, render, shown + next, step);
    const reached = body.children[first].querySelector("th");
    reached.tabIndex = -1;
    reached.focus({ preventScroll: true });
  };
  more.append(button(`Show ${next} more of ${number(rows.length)}`, go, { class: "plain" }));
}

const plain = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const number = (value) => plain.format(value);
export const short = (value) => compact.format(value);
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export function weight(value) {
  return value > 0 && value < 0.0005 ? "<0.001" : value.toFixed(3);
}

export function score(value) {
  if (value === null) return "none";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : value.toFixed(size < 100 ? 3 : 1);
}

export function bytes(count) {
  const unit = count < 1e6 ? ["kB", 1e3] : count < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  const size = count / unit[1];
  return `${size.toFixed(size < 10 ? 1 : 0)} ${unit[0]}`;
}

export function time(ms) {
  if (ms < 999.5) return `${ms.toFixed(ms < 9.95 ? 1 : 0)} ms`;
  return `${(ms / 1000).toFixed(ms < 9995 ? 2 : 1)} s`;
}
