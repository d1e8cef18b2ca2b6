// Puts the page together, from the server's data or from what stands in the page.

import { clear, count, el, percent, visible } from "./dom.js";
import { DetailsView } from "./details.js";
import { GraphView } from "./graph.js";
import { Marks, keepInPage, savingToServer } from "./marks.js";
import { Model } from "./model.js";
import { answerText } from "./names.js";
import { PictureView } from "./picture.js";
import { SearchView } from "./search.js";
import { ShelfView } from "./shelf.js";
import { State } from "./state.js";
import { WordsView } from "./words.js";

async function read() {
  const inline = document.getElementById("data");
  if (inline) {
    const marks = JSON.parse(document.getElementById("marks").textContent);
    return { data: JSON.parse(inline.textContent), marks: new Marks(marks, keepInPage), standalone: true };
  }
  const [data, marks] = await Promise.all(["data.json", "marks.json"].map(async (name) => {
    const reply = await fetch(name);
    if (!reply.ok) throw new Error(await reply.text());
    return { value: await reply.json(), version: reply.headers.get("ETag") };
  }));
  return { data: data.value, marks: new Marks(marks.value, savingToServer(marks.version)), standalone: false };
}

function title(state) {
  const { model } = state;
  const answer = model.answer || (model.answerNode.kind === "logit" ? answerText(model.answerNode) : "");
  const question = model.question || model.prompt || model.slug;
  document.title = `${question} ${visible(answer)}`;
  const thumb = model.images.filter((image) => image.file).map((image) => el("img", { class: "thumb", src: model.pictures[image.file], alt: "the picture asked about" }));
  const sure = model.answerNode.kind === "logit" ? el("span", { class: "sure" }, `probability ${percent(model.answerNode.probability)}`) : null;
  const made = [model.model, model.coder].filter(Boolean).join(" · ");
  return el("header", {}, thumb, el("div", {}, el("h1", {}, el("span", { class: "question" }, question), " ",
    el("span", { class: "answer" }, visible(answer))), el("p", { class: "made" }, sure, made ? ` · ${made}` : "")), scores(model.scores));
}

const SCORES = {
  from_images: ["from the picture", "share of the answer's influence that comes from image tokens", percent],
  from_words: ["from words", "share of the answer's influence that comes from words", percent],
  from_errors: ["from errors", "share of the answer's influence that the coder does not explain", percent],
  replacement: ["replacement", "share of paths to the answer that start at tokens, not at errors", percent],
  completeness: ["completeness", "share of all inputs of nodes that are not errors", percent],
  mean_path_length: ["mean path", "links from a token to the answer, on average", (value) => value.toFixed(1)],
};

function scores(values) {
  const known = Object.entries(SCORES).filter(([key]) => key in values);
  return el("dl", { class: "scores" }, known.map(([key, [name, meaning, write]]) =>
    el("div", { title: meaning }, el("dt", {}, name), el("dd", {}, write(values[key])))));
}

function controls(state) {
  const { model } = state;
  const [least, most] = [100 * model.minInfluence, 100 * model.maxInfluence];
  const slider = el("input", { type: "range", id: "threshold", min: Math.floor(least), max: Math.ceil(most), step: 0.5, value: Math.ceil(most),
    oninput: () => state.set({ threshold: slider.value / 100 }) });
  const share = el("output", { for: "threshold" });
  const shown = el("span", { class: "shown", role: "status" });
  const errors = el("input", { type: "checkbox", id: "errors", checked: true, onchange: () => state.set({ errors: errors.checked }) });
  const paths = [["All paths", false], ["Direct links", true]].map(([text, direct]) =>
    el("button", { type: "button", "data-direct": String(direct), onclick: () => state.set({ direct }) }, text));
  const update = () => {
    share.textContent = `${Math.min(slider.value, 100)} % of influence`;
    shown.textContent = `${state.shown.length.toLocaleString("en")} of ${count(model.nodes.length, "node")}`;
    for (const button of paths) button.setAttribute("aria-pressed", String((button.dataset.direct === "true") === state.direct));
  };
  state.onChange(update);
  state.marks.onChange(update);
  update();
  return [el("div", { class: "field" }, el("label", { for: "threshold", title: "the fewest nodes that together hold this share of the influence on the answer" },
    "Show"), slider, share, shown), el("label", { class: "check", for: "errors" }, errors, "errors"),
  el("div", { class: "segments", role: "group", "aria-label": "what lights up" }, paths)];
}

// Said where it cannot be missed, once another page has written the marks.
function staleNotice(marks) {
  const notice = el("p", { class: "notice stale", role: "alert", hidden: true },
    "Not saved: another page, or a program, has changed marks.json since this page read it. Reloading shows what is saved there, without this page's last changes. ",
    el("button", { type: "button", class: "reload", onclick: () => location.reload() }, "Reload"));
  marks.onStale = () => { notice.hidden = false; };
  return notice;
}

function legend() {
  const item = (kind, text) => el("span", {}, el("i", { class: `mark ${kind}`, "aria-hidden": "true" }), text);
  return el("p", { class: "key" }, item("feature", "feature"), item("token", "input"), item("error", "error (unexplained)"),
    item("line for", "pushes up"), item("line against", "pushes down"), el("span", {}, "width: strength"));
}

function keys(event, state, views) {
  const typing = event.target.matches("input[type=text], input[type=search]");
  if (event.key === "/" && !typing) {
    views.search.input.focus();
    event.preventDefault();
  } else if (event.key === "Escape") {
    state.choose([]);
    views.graph.moveTo(state.focus);
  }
}

async function start() {
  const { data, marks, standalone } = await read();
  const model = new Model(data);
  const state = new State(model, marks);
  const views = { graph: new GraphView(state, model.pictures), search: new SearchView(state) };
  const picture = model.images.length ? new PictureView(state, model.pictures) : null;
  views.search.onChosen = (index) => views.graph.moveTo(index);
  views.search.onLeft = () => views.graph.moveTo(state.focus);
  const notice = model.repeated_ids ? el("p", { class: "notice" },
    `${count(model.repeated_ids, "node")} left out: the file gives them the id of another one, so their links cannot be told apart.`) : null;
  const skip = el("button", { type: "button", class: "skip", onclick: () => views.graph.moveTo(state.focus) }, "Go to the graph");
  clear(document.getElementById("app"), skip, title(state), el("div", { class: "bar-top" }, controls(state), views.search.root), notice, staleNotice(marks),
    el("main", {}, el("div", { class: "left" }, picture?.root, new WordsView(state).root),
      el("div", { class: "middle" }, legend(), views.graph.scroll),
      el("div", { class: "right" }, new DetailsView(state, model.pictures).root, new ShelfView(state, standalone).root)));
  document.addEventListener("keydown", (event) => keys(event, state, views));
  views.graph.update();
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  clear(document.getElementById("app"), el("p", { class: "loading", role: "alert" }, `This graph cannot be shown: ${error.message}`));
  throw error;
});
