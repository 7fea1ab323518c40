// One answer: its text as it streams, what it was mixed from, and how long each stage took.

import { events, Trouble } from "./api.js";
import { bar, make, named, number, plural, rowsOnDemand, shape, time, weight } from "./dom.js";

const WEIGHTS = 6; // shown at first
const STAGES = [
  ["queue", "Queue", "waiting for a place"],
  ["probe", "Selection", "probing the prompt and choosing adapters"],
  ["first", "First token", "from sending to the first token, queue and selection included"],
  ["speed", "Speed", "after the first token"],
  ["total", "Total", "from sending to the end"],
  ["tokens", "Tokens", "of the answer"],
];

const FEW = 4; // tokens that come in one go have no speed

const stage = (ms) => (ms === undefined ? "–" : ms === 0 ? "none" : time(ms));

export class Answer {
  /** `root`: an empty article; `retime`: called whenever its times have changed. */
  constructor(root, title, retime) {
    this.root = root;
    this.retime = retime;
    this.title = make("h3", { id: `${root.id}-title`, class: "name" }, title);
    this.note = make("p", { class: "note" });
    this.text = make("div", { class: "text" });
    this.error = make("p", { class: "error", role: "alert" });
    this.end = make("p", { class: "end" });
    this.strip = make("div", { class: "strip", "aria-hidden": "true" });
    this.cells = new Map();
    const list = make("dl", { class: "stages" });
    for (const [kind, label, meaning] of STAGES) {
      const cell = make("dd", {}, "–");
      this.cells.set(kind, cell);
      list.append(make("div", { class: kind }, make("dt", { title: meaning }, label), cell));
    }
    this.mixture = make("div", { class: "mixture" });
    const said = make("div", { class: "said" }, this.text, this.error, this.end);
    const times = make("div", { class: "times" }, this.strip, list);
    root.append(make("div", { class: "head" }, this.title, this.note), said, times, this.mixture);
  }

  /** Streams an answer to its end, and resolves to its text, or to null if it failed or was stopped. */
  async ask(path, body, { signal, headed = () => {} }) {
    this.clear();
    this.root.setAttribute("aria-busy", "true");
    const written = this.text.appendChild(document.createTextNode(""));
    try {
      for await (const event of events(path, { body, signal })) {
        if (event.logo) {
          this.times = { ...this.times, queue: event.logo.queue_ms, probe: event.logo.probe_ms };
          this.showMixture(event.logo);
          headed(event.logo);
        }
        const choice = event.choices[0];
        if (!choice) continue;
        this.take(choice, written);
      }
      this.finish();
      if (!written.data.trim()) this.end.textContent = "The answer is empty.";
      return written.data;
    } catch (error) {
      this.finish();
      if (signal.aborted) {
        this.end.textContent = "Stopped.";
      } else if (error instanceof Trouble) {
        this.error.textContent = error.message;
        if (error.status === 401) throw error;
      } else {
        throw error;
      }
      return null;
    } finally {
      this.root.removeAttribute("aria-busy");
    }
  }

  clear() {
    this.began = performance.now();
    this.times = {};
    this.tokens = 0;
    for (const part of [this.text, this.error, this.end, this.mixture]) part.replaceChildren();
    this.showTimes();
  }

  take(choice, written) {
    const text = choice.text ?? choice.delta?.content ?? "";
    const tokens = choice.token_ids?.length ?? (text ? 1 : 0);
    if (tokens && this.times.first === undefined) {
      this.times.first = performance.now() - this.began;
      this.showTimes();
    }
    this.tokens += tokens;
    if (text) written.appendData(written.length ? text : text.trimStart());
    if (choice.finish_reason === "length") this.end.textContent = "Cut at max tokens.";
  }

  finish() {
    if (this.tokens) this.times.total = performance.now() - this.began;
    this.showTimes();
  }

  // -- what it was mixed from --------------------------------------------------------------------------------------

  showMixture({ adapters, weights }) {
    if (!adapters.length) {
      this.mixture.append(make("p", { class: "none" }, "No adapter: the base model alone."));
      return;
    }
    const widest = Math.max(...weights.map(Math.abs)) || 1;
    const head = ["Adapter", "Share", "Weight"].map((title) => make("th", { scope: "col" }, title));
    const body = make("tbody");
    const more = make("p", { class: "more" });
    const caption = make("caption", {}, `Answered with ${plural(adapters.length, "adapter")}`);
    const columns = make("colgroup", {}, ...["", "drawn", "num"].map((kind) => make("col", { class: kind })));
    const titles = make("thead", { class: "unseen" }, make("tr", {}, ...head));
    this.mixture.append(make("table", { class: "bars" }, caption, columns, titles, body), more);
    const row = ([name, share]) => make("tr", {},
      named(name),
      make("td", { class: "drawn" }, bar(0, Math.abs(share) / widest, "chosen")),
      make("td", { class: "num" }, weight(share)));
    rowsOnDemand(body, more, adapters.map((name, i) => [name, weights[i]]), row, WEIGHTS, adapters.length);
  }

  // -- how long it took --------------------------------------------------------------------------------------------

  showTimes() {
    const { queue, probe, first, total } = this.times;
    const rest = total - first;
    const speed = this.tokens > FEW && rest > 0 ? `${number(Math.round((this.tokens - 1) / (rest / 1000)))}/s` : "–";
    const told = {
      ...Object.fromEntries(Object.entries({ queue, probe, first, total }).map(([kind, ms]) => [kind, stage(ms)])),
      speed,
      tokens: total === undefined ? "–" : number(this.tokens),
    };
    for (const [kind, text] of Object.entries(told)) this.cells.get(kind).textContent = text;
    this.retime();
  }

  get length() {
    return this.times?.total ?? this.times?.first ?? 0;
  }

  /** The stages as a strip whose whole width is `whole` milliseconds. */
  drawStrip(whole) {
    const { queue = 0, probe = 0, first } = this.times ?? {};
    const picture = shape("svg");
    if (whole > 0 && first !== undefined) {
      const ends = [queue, queue + probe, Math.max(first, queue + probe), this.length];
      let from = 0;
      ["queue", "probe", "first", "speed"].forEach((kind, i) => {
        const width = Math.max(0, ends[i] - from);
        const box = { x: `${(from / whole) * 100}%`, width: `${(width / whole) * 100}%`, height: "100%", class: kind };
        picture.append(shape("rect", box));
        from += width;
      });
    }
    this.strip.replaceChildren(picture);
  }
}
