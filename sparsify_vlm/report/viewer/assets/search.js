// Finding nodes by label, feature, layer or word.

import { clear, el } from "./dom.js";
import { nodeName, placeName } from "./names.js";

const MOST_FOUND = 30;

export class SearchView {
  constructor(state) {
    this.state = state;
    this.input = el("input", { type: "search", placeholder: "Search nodes   ( / )", "aria-label": "search by label, feature, layer or word",
      autocomplete: "off", oninput: () => this.update(), onkeydown: (event) => this.key(event) });
    this.results = el("ul", { class: "results", "aria-label": "search results", hidden: true });
    this.root = el("div", { class: "search", role: "search", onfocusout: (event) => {
      if (!this.root.contains(event.relatedTarget)) this.results.hidden = true;
    } }, this.input, this.results);
    this.results.addEventListener("keydown", (event) => this.key(event));
  }

  update() {
    const query = this.input.value.trim().toLowerCase();
    const found = query ? this.state.model.nodes.filter((node) => this.text(node).includes(query)) : [];
    this.results.hidden = !query;
    clear(this.results, found.slice(0, MOST_FOUND).map((node) => el("li", {}, el("button", { type: "button", "data-node": node.index,
      onclick: () => this.choose(node) }, el("b", {}, nodeName(this.state, node)), el("span", {}, placeName(node))))),
    found.length ? null : el("li", { class: "note" }, "no node of this name"),
    found.length > MOST_FOUND ? el("li", { class: "note" }, `and ${found.length - MOST_FOUND} more`) : null);
  }

  text(node) {
    const { marks } = this.state;
    const parts = [nodeName(this.state, node), node.text, node.id, placeName(node), marks.groupOf(node.id)?.name];
    if (node.kind === "feature") parts.push(`${node.layer}/${node.feature}`, `feature ${node.feature}`);
    return parts.filter(Boolean).join("\n").toLowerCase();
  }

  choose(node) {
    this.input.value = "";
    this.results.hidden = true;
    this.state.choose([node.index]);
    this.onChosen?.(node.index);
  }

  key(event) {
    const buttons = [...this.results.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "Enter" && at < 0) buttons[0]?.click();
    else if (event.key === "ArrowDown") buttons[at + 1]?.focus();
    else if (event.key === "ArrowUp") (buttons[at - 1] || this.input).focus();
    else if (event.key === "Escape") {
      this.input.value = "";
      this.results.hidden = true;
      this.onLeft?.();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
