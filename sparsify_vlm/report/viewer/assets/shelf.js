// Pinned nodes, and groups of them under one name.

import { el, setChildren } from "./dom.js";
import { nodeName, placeName } from "./names.js";

export class ShelfView {
  constructor(state, download) {
    this.state = state;
    this.ticked = new Set();
    this.pins = el("ul", { class: "pins", "aria-label": "pinned nodes" });
    this.groups = el("ul", { class: "groups", "aria-label": "supernodes" });
    this.name = el("input", { type: "text", id: "group-name", maxlength: 2000, placeholder: "name of the group" });
    this.make = el("button", { type: "submit" }, "Group ticked");
    this.form = el("form", { class: "field", onsubmit: (event) => this.group(event) },
      el("label", { for: "group-name" }, "Supernode"), this.name, this.make);
    this.hint = el("p", { class: "note" }, "Press P on a node, or Pin beside its label, to keep it here.");
    this.status = el("p", { class: "note status", role: "status" });
    this.root = el("section", { class: "shelf", "aria-label": "pinned nodes and supernodes" }, el("h2", {}, "Pinned"), this.hint,
      this.pins, this.form, this.groups, this.status,
      download ? el("button", { type: "button", class: "download", onclick: () => save(state.marks.text()) }, "Download marks.json") : null);
    this.kept = new Map(); // entries by what they stand for: a click may be on its way to them
    state.marks.onChange(() => this.update());
    state.marks.onStatus = (status) => { this.status.textContent = status; };
    this.update();
  }

  nodes(ids) {
    return this.state.model.nodes.filter((node) => ids.includes(node.id));
  }

  update() {
    const { marks } = this.state;
    const pinned = this.nodes(marks.value.pinned);
    this.ticked = new Set([...this.ticked].filter((id) => marks.isPinned(id)));
    this.hint.hidden = pinned.length > 0;
    this.form.hidden = !pinned.length;
    const groups = marks.value.supernodes;
    const wanted = new Map([...pinned.map((node) => [`pin ${node.id} ${nodeName(this.state, node)}`, () => this.pin(node)]),
      ...groups.map((group, i) => [`group ${i} ${JSON.stringify(group.nodes)}`, () => this.supernode(i)])]);
    this.kept = new Map([...wanted].map(([key, make]) => [key, this.kept.get(key) || make()]));
    const entries = [...this.kept.values()];
    setChildren(this.pins, entries.slice(0, pinned.length));
    setChildren(this.groups, entries.slice(pinned.length));
    this.make.disabled = !this.ticked.size;
  }

  pin(node) {
    const { state } = this;
    const tick = el("input", { type: "checkbox", "aria-label": `group ${nodeName(state, node)}`, onchange: () => {
      if (tick.checked) this.ticked.add(node.id);
      else this.ticked.delete(node.id);
      this.make.disabled = !this.ticked.size;
    } });
    tick.checked = this.ticked.has(node.id);
    return el("li", {}, tick, el("button", { type: "button", class: "go", onclick: () => state.choose([node.index]) },
      el("b", {}, nodeName(state, node)), el("span", {}, placeName(node))),
    el("button", { type: "button", class: "drop", "aria-label": `unpin ${nodeName(state, node)}`,
      onclick: () => state.marks.togglePin(node.id) }, "×"));
  }

  supernode(i) {
    const { state } = this;
    const current = () => state.marks.value.supernodes[i];
    const nodes = this.nodes(current().nodes);
    const name = el("input", { type: "text", class: "rename", maxlength: 2000, value: current().name, "aria-label": "name of the supernode",
      onchange: () => state.marks.rename(current(), name.value.trim() || current().name) });
    return el("li", {}, name, el("button", { type: "button", class: "go", disabled: !nodes.length,
      onclick: () => state.choose(nodes.map((node) => node.index), current()) }, `show ${nodes.length}`),
    el("button", { type: "button", class: "drop", "aria-label": "ungroup", onclick: () => {
      state.marks.ungroup(current());
      if (state.group) state.choose([]);
    } }, "×"));
  }

  group(event) {
    event.preventDefault();
    if (!this.ticked.size) return;
    const number = this.state.marks.value.supernodes.length + 1;
    this.state.marks.group(this.name.value.trim() || `group ${number}`, [...this.ticked]);
    this.ticked.clear();
    for (const box of this.pins.querySelectorAll("input")) box.checked = false;
    this.name.value = "";
    this.update();
  }
}

function save(text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: "marks.json" }).click();
  URL.revokeObjectURL(url);
}
