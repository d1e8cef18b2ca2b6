// The graph itself: nodes one can point at or walk through with the keyboard, links beneath.

import { strength } from "./colours.js";
import { clear, el, percent, setChildren, svg, visible } from "./dom.js";
import { layout } from "./layout.js";
import { drawGround, drawLinks, strongest } from "./links.js";
import { answerText, nodeName, placeName, spokenName } from "./names.js";

const MOST_PIXELS = 2e7; // of the canvas: browsers refuse much larger ones

export class GraphView {
  constructor(state, sources) {
    this.state = state;
    this.pictures = state.model.images.map((image) => {
      const picture = new Image();
      picture.onload = () => this.paint();
      if (image.file) picture.src = sources[image.file];
      return picture;
    });
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.nodes = svg("svg", { class: "nodes", role: "group",
      "aria-label": "Nodes by layer and token. Left and right: in the layer; down: strongest input; up: strongest output; Enter: choose; P: pin." });
    this.header = el("div", { class: "columns", "aria-hidden": "true" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.board = el("div", { class: "board" }, this.canvas, this.nodes, this.tip);
    this.scroll = el("div", { class: "scroll" }, this.board, this.header);
    this.elements = new Map();
    this.listen();
    state.onChange(() => this.update());
    state.marks.onChange(() => this.update());
    new ResizeObserver(() => this.update()).observe(this.scroll);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
  }

  listen() {
    const at = (event) => event.target.closest?.("[data-node]");
    this.nodes.addEventListener("click", (event) => {
      const node = at(event);
      const chosen = node ? [+node.dataset.node] : [];
      this.state.choose(chosen.length && this.state.chosen.join() === chosen.join() ? [] : chosen);
    });
    this.nodes.addEventListener("pointerover", (event) => this.point(at(event)));
    this.nodes.addEventListener("pointerout", () => this.point(null));
    // Not on the svg itself: a browser would take it for something that wants the focus.
    this.board.addEventListener("focusin", (event) => this.point(at(event)));
    this.board.addEventListener("focusout", () => this.point(null));
    this.scroll.addEventListener("scroll", () => this.stickNames());
    this.nodes.addEventListener("keydown", (event) => this.key(event));
  }

  update() {
    const { state } = this;
    const width = this.scroll.clientWidth;
    if (!width) return;
    const { model } = state;
    const shown = state.shown;
    this.shown = state.shownSet;
    if (!this.shown.has(state.focus)) state.focus = model.answerNode.index;
    this.place = layout(model, shown, width, this.scroll.clientHeight - this.header.offsetHeight - 2);
    this.links = strongest(model, state.looksUp ? null : state.effects.flow, state.chosen, this.shown);
    this.drawNodes(shown);
    this.drawHeader();
    this.paint();
  }

  drawNodes(shown) {
    const { state, place } = this;
    const hadFocus = this.nodes.contains(document.activeElement);
    this.nodes.setAttribute("width", place.width);
    this.nodes.setAttribute("height", place.height);
    const near = this.near();
    this.mostOfTokens = shown.reduce((most, node) => (node.kind === "token" ? Math.max(most, Math.abs(state.effects.effect[node.index])) : most), 0);
    const before = this.elements;
    this.elements = new Map(shown.map((node) => [node.index, this.drawNode(node, near, before.get(node.index))]));
    const top = state.model.topLayer + 1;
    const names = [...place.rows.values()].filter((row) => !row.empty).map((row) => svg("text", {
      class: "layer", x: 6, y: row.middle + 4 }, row.layer === top ? "answer" : row.layer < 0 ? "input" : `layer ${row.layer}`));
    // In the order of reading, so that assistive technology meets them so.
    const ordered = [...this.elements.values()].sort((a, b) => a.place.y - b.place.y || a.place.x - b.place.x);
    this.names = svg("g", {}, names);
    this.stickNames();
    setChildren(this.nodes, [svg("rect", { class: "ground", width: place.width, height: place.height }), this.names,
      ...ordered.map((one) => one.element)]);
    if (hadFocus) this.elements.get(state.focus)?.element.focus({ preventScroll: true });
  }

  // Nodes that stay bright: the chosen, their neighbours that are drawn, and what feeds them most.
  near() {
    const { state } = this;
    if (!state.chosen.length) return null;
    const near = new Set(state.chosen);
    for (const { link } of this.links.flat()) {
      near.add(state.model.source[link]);
      near.add(state.model.target[link]);
    }
    return near;
  }

  // Elements are kept from one drawing to the next: a click that first ends the writing of a label
  // must still find what it was aimed at, and the focus stays.
  drawNode(node, near, before) {
    const { state } = this;
    const place = this.place.at.get(node.index);
    const chosen = state.chosen.includes(node.index);
    const group = state.marks.groupOf(node.id);
    const classes = ["node", node.kind, chosen ? "chosen" : "", near && !near.has(node.index) ? "far" : "",
      state.marks.isPinned(node.id) ? "pinned" : "", group ? "grouped" : ""];
    before?.element.querySelector(".label")?.remove();
    const same = before && before.place.r === place.r && before.place.wide === place.wide;
    const element = same ? before.element : svg("g", { "data-node": node.index, role: "button" }, shape(node, place));
    const attributes = { class: classes.filter(Boolean).join(" "), "aria-label": spokenName(state, node),
      tabindex: node.index === state.focus ? 0 : -1, "aria-pressed": String(chosen),
      transform: `translate(${place.x} ${place.y})` };
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (node.kind === "token") { // as strong as what it adds, so that the patches show here too
      element.lastChild.style.fillOpacity = chosen ? 1 : 0.25 + 0.75 * strength(state.effects.effect[node.index], this.mostOfTokens);
    }
    const text = state.marks.label(node.id) || (group?.nodes[0] === node.id ? group.name : "");
    if (text) element.append(svg("text", { class: "label", x: place.r + 4, y: 4 }, text.slice(0, 24)));
    return { element, place };
  }

  // The layers' names stay at the edge when the graph is wider than its place.
  stickNames() {
    this.names?.setAttribute("transform", `translate(${this.scroll.scrollLeft} 0)`);
  }

  drawHeader() {
    const { lanes, width } = this.place;
    this.header.style.width = `${width}px`;
    clear(this.header, el("span", { class: "corner" }, "token"), lanes.map((lane) => {
      const which = this.state.model.images.length > 1 ? ` ${lane.token.image + 1}` : "";
      const name = lane.image >= 0 ? `picture${which}` : visible(lane.token.text);
      const label = el("span", { class: turned(lane) ? "turned" : "", title: name }, name);
      label.style.left = `${lane.x}px`;
      label.style.width = `${lane.image >= 0 ? lane.cell * lane.columns : lane.width}px`;
      return label;
    }));
    const longest = lanes.reduce((most, lane) => Math.max(most, turned(lane) ? Math.min(14, visible(lane.token.text).length) : 0), 0);
    this.header.style.height = `${Math.max(24, 7.4 * longest + 10)}px`;
  }

  paint() {
    if (!this.place) return;
    const { width, height } = this.place;
    const ratio = Math.min(2, window.devicePixelRatio || 1, Math.sqrt(MOST_PIXELS / (width * height)));
    Object.assign(this.canvas, { width: Math.ceil(width * ratio), height: Math.ceil(height * ratio) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    Object.assign(this.board.style, { width: `${width}px`, height: `${height}px` });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    drawGround(context, this.place, this.pictures, this.state.shown);
    drawLinks(context, this.state.model, this.place.at, this.links);
  }

  point(element) {
    this.tip.hidden = !element;
    if (!element) return;
    const node = this.state.model.nodes[+element.dataset.node];
    const place = this.place.at.get(node.index);
    const lines = [placeName(node)];
    if (node.activation !== null) lines.push(`activation ${node.activation.toFixed(2)}`);
    if (node.kind === "logit") lines.push(`probability ${percent(node.probability)}`);
    clear(this.tip, el("b", {}, nodeName(this.state, node)), lines.map((line) => el("span", {}, line)));
    const right = place.x > this.place.width - 220;
    this.tip.style.left = right ? "auto" : `${place.x + 12}px`;
    this.tip.style.right = right ? `${this.place.width - place.x + 12}px` : "auto";
    this.tip.style.top = `${Math.max(0, place.y - 14)}px`;
  }

  key(event) {
    const { state } = this;
    const { model } = state;
    const steps = { ArrowLeft: () => this.beside(-1), ArrowRight: () => this.beside(1),
      ArrowDown: () => this.along("inputs"), ArrowUp: () => this.along("outputs") };
    if (steps[event.key]) this.moveTo(steps[event.key]());
    else if (event.key === "Enter" || event.key === " ") state.choose([state.focus]);
    else if (event.key === "p" || event.key === "P") state.marks.togglePin(model.nodes[state.focus].id);
    else return;
    event.preventDefault();
  }

  moveTo(index) {
    if (index === undefined) return;
    this.state.focus = index;
    for (const [i, { element }] of this.elements) element.setAttribute("tabindex", i === index ? 0 : -1);
    const { element } = this.elements.get(index);
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  // The next node of the same layer.
  beside(step) {
    const { model, focus } = this.state;
    const row = [...this.shown].filter((i) => model.rank(i) === model.rank(focus));
    const at = (i) => this.place.at.get(i);
    row.sort((a, b) => at(a).x - at(b).x || at(a).y - at(b).y);
    return row[row.indexOf(focus) + step];
  }

  along(side) {
    const near = this.state.model.neighbours([this.state.focus], side);
    return near.find(({ node }) => this.shown.has(node.index))?.node.index;
  }
}

// Whether a word does not fit across its column.
function turned(lane) {
  return lane.image < 0 && lane.width < 7.2 * visible(lane.token.text).length + 6;
}

function shape(node, { r, wide }) {
  if (node.kind === "logit") {
    const text = `“${visible(answerText(node)).slice(0, Math.max(3, Math.floor((wide - 66) / 8)))}”`;
    const half = Math.min(wide, 8.6 * text.length + 66) / 2;
    return [svg("rect", { x: -half, y: -13, width: 2 * half, height: 26, rx: 13 }),
      svg("text", { "text-anchor": "middle", y: 4.5 }, `${text} ${percent(node.probability)}`)];
  }
  const hit = svg("circle", { class: "hit", r: Math.max(r, 6) });
  if (node.kind === "feature") return [hit, svg("circle", { r })];
  if (node.kind === "token") return [hit, svg("rect", { x: -r, y: -r, width: 2 * r, height: 2 * r, rx: 1 })];
  return [hit, svg("path", { d: `M0 ${-r - 1}L${r + 1} 0L0 ${r + 1}L${-r - 1} 0Z` })];
}
