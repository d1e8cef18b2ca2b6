// The prompt as a strip of words, coloured by what each does to the subject through the links.

import { side, strength } from "./colours.js";
import { clear, count, el, signed, visible } from "./dom.js";

export class WordsView {
  constructor(state) {
    this.state = state;
    this.strip = el("p", { class: "words" });
    this.root = el("section", { "aria-label": "words" }, el("h2", {}, "Words"), this.strip,
      el("p", { class: "note" }, "Coloured by effect through the links of this graph."));
    state.onChange(() => this.update());
    this.update();
  }

  update() {
    const { model, effects: { effect } } = this.state;
    const pieces = runs(model.tokens).map((run) => ({ ...run, value: run.positions.reduce((sum, p) =>
      sum + (model.tokenNode.has(p) ? effect[model.tokenNode.get(p).index] : 0), 0) }));
    const most = pieces.filter((piece) => piece.image < 0)
      .reduce((most, piece) => Math.max(most, Math.abs(piece.value)), 0);
    clear(this.strip, pieces.flatMap((piece) => [this.chip(piece, most), " "]));
  }

  chip({ positions, image, text, value }, most) {
    const { model } = this.state;
    const shown = image < 0 ? visible(text) : `picture${model.images.length > 1 ? ` ${image + 1}` : ""}: ${count(positions.length, "token")}`;
    const node = image < 0 ? model.tokenNode.get(positions[0]) : null;
    const chip = el("button", { type: "button", class: `word ${value ? side(value) : ""} ${image < 0 ? "" : "run"} ${this.state.chosen.includes(node?.index) ? "chosen" : ""}`,
      disabled: !node, title: `${shown} ${signed(value)}`, "data-value": value,
      onclick: () => this.state.choose([node.index]) },
    shown, image < 0 ? null : el("b", {}, ` ${signed(value)}`));
    if (image < 0) chip.style.setProperty("--strength", `${Math.round(70 * strength(value, most))}%`);
    return chip;
  }
}

// Words one by one, an image's tokens together.
function runs(tokens) {
  const found = [];
  tokens.forEach((token, position) => {
    const last = found[found.length - 1];
    if (token.role === "image" && last && last.image === token.image) last.positions.push(position);
    else found.push({ positions: [position], image: token.role === "image" ? token.image : -1, text: token.text });
  });
  return found;
}
