// The pool: searched, sorted, and one adapter of it made to answer alone.

import { at, button, bytes, make, named, number, plural, rowsOnDemand, short } from "./dom.js";

const ROWS = 50; // shown at first
const byName = new Intl.Collator("en", { numeric: true }).compare;
const COLUMNS = [
  { key: "id", title: "Adapter", text: true },
  { key: "rank", title: "Rank", cell: (a) => number(a.rank) },
  { key: "parameters", title: "Parameters", cell: (a) => short(a.parameters), wide: true },
  { key: "modules", title: "Modules", cell: (a) => number(a.modules), wide: true },
  { key: "targets", title: "Targets", cell: (a) => a.targets.join(", "), text: true, wide: true },
  { key: "size_bytes", title: "Size", cell: (a) => bytes(a.size_bytes), wide: true },
  { key: "selected", title: "Selected", cell: (a) => number(a.selected) },
];

export class Pool {
  /** `force`: called with the adapter that is to answer alone, or null. */
  constructor(force) {
    this.force = force;
    this.adapters = [];
    this.forced = null;
    this.order = { key: "id", down: false };
    this.body = make("tbody");
    this.more = make("p", { class: "more" });
    this.heads = COLUMNS.map((column) => this.head(column));
    const use = make("th", { scope: "col" }, make("span", { class: "unseen" }, "Use"));
    const caption = make("caption", { class: "unseen" }, "Adapters of the pool");
    at("pool-body").append(
      make("table", { class: "pool" }, caption, make("thead", {}, make("tr", {}, ...this.heads, use)), this.body),
      this.more,
    );
    at("search").addEventListener("input", () => this.show());
  }

  head(column) {
    const sort = button(column.title, () => this.sort(column), { class: "sort" });
    return make("th", { scope: "col", class: kind(column), "aria-sort": column.key === "id" ? "ascending" : null }, sort);
  }

  sort(column) {
    const same = this.order.key === column.key;
    this.order = { key: column.key, down: same ? !this.order.down : !column.text };
    COLUMNS.forEach((each, i) => {
      if (each !== column) this.heads[i].removeAttribute("aria-sort");
      else this.heads[i].setAttribute("aria-sort", this.order.down ? "descending" : "ascending");
    });
    this.show();
  }

  /** `adapters`: of /v1/logo/adapters. What is searched, sorted, forced and focused stays. */
  update(adapters) {
    this.adapters = adapters;
    this.show();
  }

  setForced(name) {
    this.forced = name;
    this.show();
  }

  show() {
    const wanted = at("search").value.trim().toLowerCase();
    const matches = (adapter) => [adapter.id, ...adapter.targets].some((text) => text.toLowerCase().includes(wanted));
    const found = this.adapters.filter(matches);
    const { key, down } = this.order;
    const compare = (a, b) => (typeof a === "number" ? a - b : byName(String(a), String(b)));
    found.sort((a, b) => (down ? -1 : 1) * compare(a[key], b[key]) || byName(a.id, b.id));
    const total = this.adapters.length;
    at("count").textContent = wanted ? `${number(found.length)} of ${plural(total, "adapter")}` : plural(total, "adapter");
    const focused = document.activeElement?.closest("tr")?.dataset.adapter;
    const shown = Math.max(ROWS, wanted ? 0 : this.body.children.length);
    rowsOnDemand(this.body, this.more, found, (adapter) => this.row(adapter), shown, 100);
    if (focused !== undefined && document.activeElement === document.body) {
      [...this.body.children].find((row) => row.dataset.adapter === focused)?.querySelector("button").focus();
    }
  }

  row(adapter) {
    const isForced = adapter.id === this.forced;
    const details = `${short(adapter.parameters)} parameters, ${bytes(adapter.size_bytes)}`;
    const name = named(adapter.id);
    name.append(make("small", { class: "narrow" }, details));
    const cells = COLUMNS.slice(1).map((column) => make("td", { class: kind(column) }, column.cell(adapter)));
    const use = button("Use", () => this.force(isForced ? null : adapter.id),
      { class: "use", "aria-pressed": String(isForced) });
    use.append(make("span", { class: "unseen" }, ` only ${adapter.id}`));
    return make("tr", { "data-adapter": adapter.id }, name, ...cells, make("td", { class: "act" }, use));
  }
}

function kind(column) {
  return [column.text ? "words" : "num", column.wide ? "wide" : ""].join(" ").trim();
}
