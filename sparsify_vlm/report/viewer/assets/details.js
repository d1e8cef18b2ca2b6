// What is chosen: its name, numbers, inputs, outputs and examples; with nothing chosen, how to read
// the page.

import { side, strength } from "./colours.js";
import { clear, count, el, percent, signed, visible } from "./dom.js";
import { nodeName, placeName } from "./names.js";

const FIRST = 12;

export class DetailsView {
  constructor(state, pictures) {
    this.state = state;
    this.pictures = pictures;
    this.root = el("section", { class: "details", "aria-label": "details", tabindex: -1 });
    state.onChange((changes) => this.update("chosen" in changes));
    state.marks.onChange(() => this.updateMarks());
    this.update(true);
  }

  update(changed) {
    if (!changed) return;
    const { state } = this;
    if (state.group) this.showGroup(state.group);
    else this.showNode(state.model.nodes[(state.chosen.length ? state.chosen : state.subject)[0]], state.chosen.length > 0);
    this.root.scrollTop = 0;
  }

  showNode(node, isChosen) {
    this.title = el("h2");
    this.pin = el("button", { type: "button", class: "pin", onclick: () => this.state.marks.togglePin(node.id) });
    const label = el("input", { type: "text", id: "label", maxlength: 2000, value: this.state.marks.label(node.id),
      placeholder: "what does it stand for?", onchange: (event) => this.state.marks.setLabel(node.id, event.target.value) });
    this.node = node;
    clear(this.root, isChosen ? null : guide(this.state.model.images.length > 0), this.title, el("p", { class: "place" }, placeName(node)), facts(node),
      isChosen ? el("div", { class: "field" }, el("label", { for: "label" }, "Label"), label, this.pin) : null,
      this.lists([node.index]), this.examples(node));
    this.updateMarks();
  }

  showGroup(group) {
    const { state } = this;
    const indices = state.chosen;
    this.node = null;
    clear(this.root, el("h2", {}, group.name), el("p", { class: "place" }, `supernode of ${count(indices.length, "node")}`),
      this.list("Its nodes", indices.map((i) => ({ node: state.model.nodes[i], weight: null }))), this.lists(indices));
  }

  updateMarks() {
    const { state, node } = this;
    if (!node) return;
    this.title.textContent = nodeName(state, node);
    const pinned = state.marks.isPinned(node.id);
    this.pin.textContent = pinned ? "Unpin" : "Pin";
    this.pin.setAttribute("aria-pressed", String(pinned));
  }

  lists(indices) {
    const { model } = this.state;
    return ["inputs", "outputs"].map((which) => this.list(which === "inputs" ? "Inputs" : "Outputs",
      model.neighbours(indices, which), which));
  }

  list(heading, entries, which = "nodes") {
    const box = el("ol", { class: "neighbours", "data-list": which, "aria-label": heading.toLowerCase() });
    const most = entries.reduce((most, { weight }) => Math.max(most, Math.abs(weight)), 0);
    const more = el("button", { type: "button", class: "more", onclick: () => show(entries.length) },
      `Show all ${entries.length}`);
    const show = (n) => {
      clear(box, entries.slice(0, n).map((entry) => this.entry(entry, most)));
      more.hidden = n >= entries.length;
    };
    show(FIRST);
    box.addEventListener("keydown", step);
    const empty = entries.length ? null : el("p", { class: "note" }, "none in this graph");
    return el("div", {}, el("h3", {}, `${heading} `, el("span", { class: "note" }, String(entries.length))), box, empty, more);
  }

  entry({ node, weight }, most) {
    const { state } = this;
    const bar = weight === null ? null : el("i", { class: `bar ${side(weight)}` });
    if (bar) bar.style.width = `${100 * strength(weight, most)}%`;
    return el("li", {}, el("button", { type: "button", class: state.shows(node) ? "" : "pruned", "data-node": node.index,
      "data-weight": weight, onclick: () => state.choose([node.index]) },
    el("span", { class: "what" }, el("b", {}, nodeName(state, node)), el("span", {}, placeName(node))),
    weight === null ? null : el("span", { class: `weight ${side(weight)}` }, signed(weight)), bar));
  }

  examples(node) {
    const found = node.kind === "feature" && Object.hasOwn(this.state.model.examples, `${node.layer}_${node.feature}`)
      ? this.state.model.examples[`${node.layer}_${node.feature}`] : [];
    if (!found.length) return null;
    return el("div", { class: "examples" }, el("h3", {}, "Where it is strongest"), found.map((one) => this.example(one)));
  }

  example({ tokens = [], values = [], activation, image, patches }) {
    const most = Math.max(activation, ...values);
    const words = tokens.map((text, i) => {
      const word = el("span", { class: `word ${values[i] ? "for" : ""}`, title: String(values[i]) }, visible(text));
      word.style.setProperty("--strength", `${Math.round(70 * strength(values[i], most))}%`);
      return word;
    });
    return el("div", { class: "example" }, el("span", { class: "note" }, `activation ${activation.toFixed(2)}`),
      image ? lit(this.pictures[image], patches || [], activation) : null, el("p", { class: "words" }, words.flatMap((word) => [word, " "])));
  }
}

// A picture with the patches at which a feature is active left clear.
function lit(source, patches, most) {
  const veil = el("div", { class: "veil" });
  if (patches.length) veil.style.gridTemplateColumns = `repeat(${patches[0].length}, 1fr)`;
  for (const value of patches.flat()) {
    const cell = el("i");
    cell.style.opacity = 0.75 * (1 - strength(value, most));
    veil.append(cell);
  }
  return el("div", { class: "frame" }, el("img", { src: source, alt: "example" }), veil);
}

function facts(node) {
  const found = [];
  if (node.kind === "logit") found.push(["probability", percent(node.probability)]);
  if (node.activation !== null) found.push(["activation", node.activation.toFixed(3)]);
  if (node.influence !== null) found.push(["influence", `top ${percent(node.influence)}`]);
  if (node.kind === "feature") found.push(["feature", `${node.layer} / ${node.feature}`]);
  return el("dl", {}, found.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function guide(hasPicture) {
  return el("div", { class: "guide" }, el("p", {}, `Left: the ${hasPicture ? "patches of the picture" : "words"} that pushed the answer up `,
    el("b", { class: "for" }, "(orange)"), " or down ", el("b", { class: "against" }, "(blue)"),
  `. Middle: the features it went through, from the ${hasPicture ? "picture and the words" : "words"} at the bottom to the answer on top.`),
  el("p", {}, "Choose any node to see what feeds it and where it leads."));
}

// Up and down between the entries of a list.
function step(event) {
  const item = event.target.closest("li");
  const next = { ArrowDown: item?.nextElementSibling, ArrowUp: item?.previousElementSibling }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  next?.querySelector("button").focus();
}
