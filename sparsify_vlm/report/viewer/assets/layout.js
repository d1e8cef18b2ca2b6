// Where nodes stand: a row for each layer, the answer on top; a column for each word, and for each
// picture a lane with a small patch grid in every row.

import { visible } from "./dom.js";

const GUTTER = 58;
const GAP = 14;
const DOT = 13; // room of one node at a word
const WORD = 20; // least width of a column

export function layout(model, shown, width, height) {
  const lanes = findLanes(model, shown);
  const cells = group(shown.filter((node) => node.kind !== "logit"), (node) => `${node.layer}:${place(node)}`);
  sizePictures(model, lanes, cells);
  sizeWords(lanes, cells, width);
  const heights = rowHeights(model, lanes, cells, shown, height);
  const rows = placeRows(model, heights);
  const total = lanes.reduce((sum, lane) => sum + lane.width, GUTTER);
  const at = new Map();
  for (const nodes of cells.values()) placeCell(nodes, lanes, rows, at);
  const used = Math.max(width, total + GAP);
  placeAnswers(model.logits, rows.get(model.topLayer + 1), used, at);
  return { lanes, rows, at, width: used, height: rows.get(-1).bottom };
}

// Patches by image and place, everything else by lane.
function place(node) {
  const { token } = node;
  return token.patch ? `${laneKey(node)} ${token.patch.join(" ")}` : laneKey(node);
}

// What shares a lane: the patches of an image; its other tokens (ends of lines); one word.
function laneKey({ token, position }) {
  if (token.patch) return `picture ${token.image}`;
  return token.role === "image" ? `rest of ${token.image}` : `word ${position}`;
}

function group(items, key) {
  const groups = new Map();
  for (const item of items) {
    if (!groups.has(key(item))) groups.set(key(item), []);
    groups.get(key(item)).push(item);
  }
  return groups;
}

// Lanes in the order of the prompt; words that lead nowhere get none.
function findLanes(model, shown) {
  const used = new Set([...model.nodes.filter((node) => node.kind !== "logit" && model.outputs[node.index].length), ...shown]);
  const positions = [...new Set([...used].filter((node) => node.kind !== "logit").map((node) => node.position))];
  const lanes = [];
  for (const position of positions.sort((a, b) => a - b)) {
    const token = model.tokens[position];
    const key = laneKey({ token, position });
    if (!lanes.some((lane) => lane.key === key)) lanes.push({ key, image: token.patch ? token.image : -1, token });
  }
  return lanes;
}

// Nodes that share the fullest patch decide how fine its cells are divided.
function sizePictures(model, lanes, cells) {
  for (const lane of lanes.filter((one) => one.image >= 0)) {
    const most = fullest(cells, lane);
    const { rows, columns } = model.images[lane.image];
    Object.assign(lane, { rows, columns, across: Math.ceil(Math.sqrt(most)) });
    setCell(lane, 120);
  }
}

function setCell(lane, room) {
  const most = Math.max(lane.rows, lane.columns);
  lane.cell = Math.floor(Math.min(18, Math.max(5, room / most, Math.min(lane.across * 6, 170 / most))));
  lane.width = lane.cell * lane.columns + GAP;
  lane.height = lane.cell * lane.rows;
}

function fullest(cells, { key }) {
  return [...cells.values()].reduce((most, nodes) => (laneKey(nodes[0]) === key ? Math.max(most, nodes.length) : most), 1);
}

// Columns first as wide as their fullest cell asks for, then as their word, within the width there is.
function sizeWords(lanes, cells, width) {
  const words = lanes.filter((lane) => lane.image < 0);
  let room = width - GUTTER - GAP;
  for (const lane of lanes) {
    if (lane.image < 0) lane.width = WORD;
    room -= lane.width;
  }
  const forNodes = (lane) => Math.min(10, fullest(cells, lane)) * DOT + 10;
  const forText = ({ token }) => Math.min(90, 7 * visible(token.text).length + 8);
  for (const wish of [forNodes, forText, ({ width }) => width + 40]) {
    const more = words.map((lane) => Math.max(0, wish(lane) - lane.width));
    const all = more.reduce((sum, one) => sum + one, 0);
    const share = all ? Math.min(1, Math.max(0, room) / all) : 0;
    words.forEach((lane, i) => { lane.width += share * more[i]; });
    room -= share * all;
  }
  setPlaces(lanes);
}

function setPlaces(lanes) {
  lanes.reduce((x, lane) => {
    lane.x = x;
    lane.perLine = Math.max(1, Math.floor((lane.width - 4) / DOT));
    return x + lane.width;
  }, GUTTER);
}

function laneOf(lanes, node) {
  return lanes.find((lane) => lane.key === laneKey(node));
}

// Height of each layer's row; patch grids shrink, while they stay readable, until all rows fit.
function rowHeights(model, lanes, cells, shown, height) {
  const heights = new Map([[-1, 30], [model.topLayer + 1, 46]]);
  for (const nodes of cells.values()) {
    const [{ layer, token }] = nodes;
    const tall = token.patch ? 0 : Math.ceil(nodes.length / laneOf(lanes, nodes[0]).perLine) * DOT + 12;
    heights.set(layer, Math.max(30, heights.get(layer) || 0, tall));
  }
  const layers = new Set(shown.filter((node) => node.token.patch && node.kind !== "logit").map((node) => node.layer));
  if (!layers.size) return stretched(heights, layers, height);
  const others = [...heights].reduce((sum, [layer, tall]) => sum + (layers.has(layer) ? 0 : tall), 0);
  const pictures = lanes.filter((lane) => lane.image >= 0);
  for (const lane of pictures) setCell(lane, Math.min(120, Math.max(76, (height - others) / layers.size - 12)));
  setPlaces(lanes);
  const tallest = Math.max(...pictures.map((lane) => lane.height));
  for (const layer of layers) heights.set(layer, Math.max(heights.get(layer), tallest + 12));
  return stretched(heights, layers, height);
}

// What is left of the height, given to the rows without pictures, up to a comfortable one.
function stretched(heights, pictures, height) {
  const spare = height - [...heights.values()].reduce((sum, tall) => sum + tall, 0);
  const rows = [...heights.keys()].filter((layer) => !pictures.has(layer));
  for (const layer of rows) heights.set(layer, heights.get(layer) + Math.min(40, Math.max(0, spare / rows.length)));
  return heights;
}

function placeRows(model, heights) {
  const rows = new Map();
  let y = 0;
  for (let layer = model.topLayer + 1; layer >= -1; layer -= 1) {
    const height = heights.get(layer) || 12; // a layer without nodes is a thin line
    rows.set(layer, { layer, top: y, bottom: y + height, middle: y + height / 2, empty: !heights.has(layer) });
    y += height;
  }
  return rows;
}

function placeCell(nodes, lanes, rows, at) {
  const [{ layer, token }] = nodes;
  const row = rows.get(layer);
  const lane = laneOf(lanes, nodes[0]);
  if (!token.patch) {
    const { perLine } = lane;
    const lines = Math.ceil(nodes.length / perLine);
    nodes.forEach((node, i) => {
      const line = Math.floor(i / perLine);
      const inLine = Math.min(perLine, nodes.length - line * perLine);
      at.set(node.index, { r: 5, y: row.middle + (line - (lines - 1) / 2) * DOT,
        x: lane.x + lane.width / 2 + ((i % perLine) - (inLine - 1) / 2) * DOT });
    });
    return;
  }
  const across = Math.ceil(Math.sqrt(nodes.length));
  const step = lane.cell / across;
  const [left, top] = [lane.x + token.patch[1] * lane.cell, row.middle - lane.height / 2 + token.patch[0] * lane.cell];
  nodes.forEach((node, i) => {
    at.set(node.index, { r: Math.min(5, Math.max(2.2, step / 2 - 0.5)),
      x: left + ((i % across) + 0.5) * step, y: top + (Math.floor(i / across) + 0.5) * step });
  });
}

function placeAnswers(logits, row, width, at) {
  const step = Math.min(150, (width - GUTTER) / logits.length);
  const start = GUTTER + (width - GUTTER - step * logits.length) / 2;
  logits.forEach((node, i) => at.set(node.index, { x: start + (i + 0.5) * step, y: row.middle, r: 5, wide: step - 8 }));
}
