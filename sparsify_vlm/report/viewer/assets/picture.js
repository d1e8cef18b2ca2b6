// The picture under its patch grid, coloured by what each patch does to the answer or to what is
// chosen.

import { strength, side } from "./colours.js";
import { clear, count, el, percent, signed, svg } from "./dom.js";
import { nodeName, patchName } from "./names.js";

const STRONGEST = 5;

export class PictureView {
  constructor(state, pictures) {
    this.state = state;
    this.look = "heat";
    this.pixels = false; // patches of pixels rather than image tokens, where the graph has them
    this.heading = el("h2");
    this.summary = el("p", { class: "summary", "aria-live": "polite" });
    this.readout = el("p", { class: "readout" });
    this.legend = el("div", { class: "legend" });
    this.list = el("ol", { class: "strongest", "aria-label": "strongest patches" });
    this.figures = state.model.images.map((image, i) => this.figure(image, pictures[image.file], i));
    this.looks = el("div", { class: "segments", role: "group", "aria-label": "how the picture is shown" },
      ...[["heat", "Heat map"], ["plain", "Picture"]].map(([look, text]) =>
        el("button", { type: "button", "data-look": look, onclick: () => this.setLook(look) }, text)));
    this.sources = el("div", { class: "segments", role: "group", "aria-label": "what patches stand for", hidden: !state.model.pixel_effects.length },
      ...[["tokens", "Tokens", "each image token, as the language model reads it"],
        ["pixels", "Pixels", "the picture's own pixels, through the vision tower"]].map(([source, text, title]) =>
        el("button", { type: "button", title, "data-source": source, onclick: () => this.setSource(source) }, text)));
    this.root = el("section", { class: "picture", "aria-label": "picture" }, this.heading, this.summary,
      this.figures.map((figure) => figure.root), this.legend, this.readout, this.looks, this.sources, this.list);
    state.onChange(() => this.update());
    this.setLook("heat");
  }

  figure(image, source, i) {
    const overlay = svg("svg", { class: "overlay", preserveAspectRatio: "none", "aria-hidden": "true" });
    const alt = `picture ${i + 1}, cut into ${image.rows} × ${image.columns} patches`;
    const img = source ? el("img", { src: source, alt }) : el("div", { class: "no-picture" });
    if (!source) img.style.aspectRatio = `${image.columns} / ${image.rows}`;
    overlay.addEventListener("pointermove", (event) => this.read(event.target.dataset, i));
    overlay.addEventListener("pointerleave", () => this.read({}, i));
    overlay.addEventListener("click", (event) => this.pick(event.target.dataset, i));
    return { image, overlay, root: el("div", { class: "frame" }, img, overlay) };
  }

  setLook(look) {
    this.look = look;
    this.root.dataset.look = look;
    for (const button of this.looks.children) {
      button.setAttribute("aria-pressed", String(button.dataset.look === look));
    }
    this.update();
  }

  setSource(source) {
    this.pixels = source === "pixels";
    this.update();
  }

  // The node whose tables of the whole graph are shown; -1 where the drawn links count instead.
  get single() {
    const { state } = this;
    return state.subject.length === 1 && !state.direct ? state.subject[0] : -1;
  }

  // Whether pixels are shown: they are known for targets, over all paths.
  get showsPixels() {
    return this.pixels && this.hasPixels;
  }

  get hasPixels() {
    return this.state.model.images.every((_, i) => this.state.model.exactPatchEffects(this.single, i, true));
  }

  // Values of each picture's patches, and where they come from.
  maps() {
    const { state } = this;
    const { model } = state;
    const { effect } = state.effects;
    const pixels = this.showsPixels;
    return model.images.map((image, i) => {
      const exact = model.exactPatchEffects(this.single, i, pixels);
      if (exact) return { values: exact.values, exact: true };
      const values = Array.from({ length: image.rows }, () => new Array(image.columns).fill(0));
      for (const node of model.tokenNode.values()) {
        const { patch, image: of } = node.token;
        if (patch && of === i) values[patch[0]][patch[1]] += effect[node.index];
      }
      return { values, exact: false };
    });
  }

  update() {
    const maps = this.maps();
    const patches = maps.flatMap(({ values }, image) => values.flatMap((line, row) =>
      line.map((value, column) => ({ image, row, column, value }))));
    const most = patches.reduce((most, patch) => Math.max(most, Math.abs(patch.value)), 0);
    const carriers = strong(patches, most);
    this.patches = patches;
    this.figures.forEach((figure, i) => {
      const { values } = maps[i];
      figure.drawn = { rows: values.length, columns: values.length ? values[0].length : 0 };
      draw(figure, values, most, carriers.filter((patch) => patch.image === i));
    });
    for (const button of this.sources.children) {
      button.setAttribute("aria-pressed", String((button.dataset.source === "pixels") === this.showsPixels));
      if (button.dataset.source === "pixels") button.disabled = !this.hasPixels;
    }
    const chosen = this.state.chosen.map((i) => this.state.model.nodes[i]).filter((node) => node.kind === "token");
    for (const { token: { patch, image } } of chosen) {
      if (!patch) continue;
      const { image: { rows, columns }, drawn, overlay } = this.figures[image];
      const [height, width] = [drawn.rows / rows, drawn.columns / columns];
      overlay.append(svg("rect", { class: "chosen", x: patch[1] * width, y: patch[0] * height, width, height }));
    }
    this.write(patches, carriers, most, maps.every((map) => map.exact));
  }

  subjectName() {
    const { state } = this;
    if (state.group && !state.looksUp) return `“${state.group.name}”`;
    return state.subject.length === 1 ? nodeName(state, state.model.nodes[state.subject[0]])
      : count(state.subject.length, "node");
  }

  write(patches, carriers, most, exact) {
    const { state } = this;
    const name = this.subjectName();
    const answer = state.subject.every((i) => state.model.nodes[i].kind === "logit");
    this.heading.textContent = answer ? `Which patches made it say ${name}?` : `Patches that feed ${name}`;
    if (most === 0) {
      this.summary.textContent = state.direct ? "No patch feeds it directly." : "No patch of the graph feeds it.";
    } else if (carriers.length) {
      const sum = (list) => list.reduce((all, patch) => all + Math.max(0, patch.value), 0);
      this.summary.textContent = `Outlined: ${count(carriers.length, "patch", "patches")} of ${patches.length}, with ` +
        `${percent(sum(carriers) / sum(patches))} of the push ${answer ? `towards ${name}` : "that raises it"}.`;
    } else {
      this.summary.textContent = "Hardly a patch pushes it up.";
    }
    const unit = answer ? "logits" : "of its activation";
    this.legend.hidden = most === 0;
    clear(this.legend, el("div", { class: "scale" }), el("div", { class: "ends" },
      el("span", {}, `${signed(-most)} against`), el("span", {}, "0"), el("span", {}, `for ${signed(most)}`)),
    el("p", { class: "note" }, this.showsPixels
      ? `In logits: everything the patch's pixels do, gradient × pixel through the vision tower${state.model.patch_gradient === "frozen" ? ", its attention patterns and norm scales held fixed" : ""}.`
      : exact ? `In ${unit}: everything the patch's token does, on all paths of the whole graph.`
      : state.model.hasSigns
        ? `In ${answer ? "logits" : "units " + unit}: ${state.direct ? "direct links from the patches" : "all paths through this pruned graph"}.`
        : "Shares of influence, without signs: the graph's file holds no activations."));
    this.tellOver();
    const top = patches.filter((patch) => patch.value).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    clear(this.list, top.slice(0, STRONGEST).map((patch) => this.entry(patch)));
  }

  entry(patch) {
    const text = [patchName([patch.row, patch.column]), el("b", { class: side(patch.value) }, signed(patch.value))];
    const node = this.nodeAt(patch.image, patch.row, patch.column);
    const show = () => this.mark(patch);
    return el("li", {}, el("button", { type: "button", disabled: !node, onfocus: show, onpointerenter: show,
      onclick: () => this.state.choose([node.index]) }, ...text));
  }

  mark({ image, row, column }) {
    for (const figure of this.figures) figure.overlay.querySelector(".marked")?.classList.remove("marked");
    const rect = this.rect(image, row, column);
    rect?.classList.add("marked");
    rect?.parentNode.append(rect);
  }

  rect(image, row, column) {
    return this.figures[image].overlay.querySelector(`[data-row="${row}"][data-column="${column}"]`);
  }

  read({ row, column }, image) {
    this.over = row === undefined ? null : { row: +row, column: +column, image };
    this.tellOver();
  }

  tellOver() {
    if (!this.over) {
      this.readout.textContent = "Point at a patch to read its value.";
      return;
    }
    const { row, column, image } = this.over;
    const patch = this.patches.find((one) => one.image === image && one.row === row && one.column === column);
    const all = this.patches.reduce((sum, one) => sum + Math.abs(one.value), 0);
    const share = all ? `, ${percent(Math.abs(patch.value) / all)} of all patches' effects` : "";
    this.readout.textContent = `${patchName([row, column])}: ${signed(patch.value)}${share}`;
  }

  // The image token at a patch; of patches of pixels, the one around its middle.
  nodeAt(image, drawnRow, drawnColumn) {
    const { image: { rows, columns }, drawn } = this.figures[image];
    const [row, column] = [Math.floor((drawnRow + 0.5) * rows / drawn.rows), Math.floor((drawnColumn + 0.5) * columns / drawn.columns)];
    for (const node of this.state.model.tokenNode.values()) {
      const { patch, image: of } = node.token;
      if (patch && of === image && patch[0] === row && patch[1] === column) return node;
    }
    return null;
  }

  pick({ row, column }, image) {
    const node = row === undefined ? null : this.nodeAt(image, +row, +column);
    if (node) this.state.choose([node.index]);
  }
}

// Patches that push at least half as much as the strongest one.
function strong(patches, most) {
  const best = patches.reduce((best, patch) => Math.max(best, patch.value), 0);
  return best < most / 20 ? [] : patches.filter((patch) => patch.value >= best / 2 && patch.value > 0);
}

function draw({ overlay }, values, most, carriers) {
  const [rows, columns] = [values.length, values.length ? values[0].length : 0];
  overlay.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
  const rects = values.flatMap((line, row) => line.map((value, column) => svg("rect", {
    x: column, y: row, width: 1, height: 1, class: `patch ${side(value)}`, "data-row": row,
    "data-column": column, "data-value": value, "data-strong": carriers.some((one) => one.row === row && one.column === column), "fill-opacity": 0.9 * strength(value, most) })));
  const border = borderOf(carriers);
  const outline = ["edge", "carrier"].map((name) => svg("path", { class: name, d: border }));
  const minus = values.flatMap((line, row) => line.map((value, column) =>
    (value < 0 && strength(value, most) > 0.25 ? svg("path", { class: "minus",
      d: `M${column + 0.3} ${row + 0.5}h0.4` }) : null)));
  clear(overlay, rects, outline, minus);
}

// The border around all of some patches together, as an SVG path.
function borderOf(patches) {
  const inside = new Set(patches.map(({ row, column }) => `${row} ${column}`));
  const sides = [[-1, 0, 0, 0, "h1"], [1, 0, 0, 1, "h1"], [0, -1, 0, 0, "v1"], [0, 1, 1, 0, "v1"]];
  return patches.flatMap(({ row, column }) => sides
    .filter(([down, right]) => !inside.has(`${row + down} ${column + right}`))
    .map(([, , x, y, line]) => `M${column + x} ${row + y}${line}`)).join("");
}
