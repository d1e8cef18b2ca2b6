// Where nodes stand: a row for each layer, the answer on top; a column for each word, and for each
// picture a lane with a small patch grid in every row.

const GUTTER = 58;
const GAP = 14;
const DOT = 13; // room of one node at a word
const WORD = 24; // least width of a column

export function layout(model, shown, width, height) {
  const lanes = findLanes(model, shown);
  const cells = group(shown.filter((node) => node.kind !== "logit"), (node) => `${node.layer}:${place(node)}`);
  sizeLanes(model, lanes, cells, width, roomForGrid(shown, height));
  const rows = placeRows(model, lanes, cells, shown);
  const total = lanes.length ? lanes[lanes.length - 1].x + lanes[lanes.length - 1].width : GUTTER;
  const at = new Map();
  for (const nodes of cells.values()) placeCell(nodes, lanes, rows, at);
  const used = Math.max(width, total + GAP);
  placeAnswers(model.logits, rows.get(model.topLayer + 1), used, at);
  return { lanes, rows, at, width: used, height: [...rows.values()][0].bottom };
}

// Patches by image and place, everything else by position.
function place({ token, position }) {
  return token.patch ? `image ${token.image} ${token.patch.join(" ")}` : `word ${position}`;
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
    if (!token.patch) lanes.push({ image: -1, positions: [position], token });
    else if (!lanes.some((lane) => lane.image === token.image)) {
      lanes.push({ image: token.image, positions: [], token });
    }
  }
  return lanes;
}

// Height of a patch grid with which all rows fit, if that leaves it readable.
function roomForGrid(shown, height) {
  const rows = new Set(shown.filter((node) => node.token.patch && node.kind !== "logit").map((node) => node.layer));
  return Math.min(120, Math.max(76, (height - 52) / Math.max(1, rows.size) - 12));
}

function sizeLanes(model, lanes, cells, width, room) {
  const perPatch = new Map(); // most nodes that share a patch, by image
  for (const [first] of cells.values()) {
    const { token } = first;
    if (token.patch) {
      const n = cells.get(`${first.layer}:${place(first)}`).length;
      perPatch.set(token.image, Math.max(perPatch.get(token.image) || 1, n));
    }
  }
  const words = lanes.filter((lane) => lane.image < 0);
  for (const lane of lanes) {
    if (lane.image < 0) continue;
    const { rows, columns } = model.images[lane.image];
    lane.across = Math.ceil(Math.sqrt(perPatch.get(lane.image) || 1));
    lane.cell = Math.floor(Math.min(18, Math.max(5, room / Math.max(rows, columns), lane.across * 6)));
    Object.assign(lane, { rows, columns, width: lane.cell * columns + GAP, height: lane.cell * rows });
  }
  const pictures = lanes.reduce((sum, lane) => sum + (lane.width || 0), 0);
  const each = Math.min(110, Math.max(WORD, (width - GUTTER - GAP - pictures) / Math.max(1, words.length)));
  let x = GUTTER;
  for (const lane of lanes) {
    if (lane.image < 0) lane.width = each;
    lane.x = x;
    x += lane.width;
  }
}

function placeRows(model, lanes, cells, shown) {
  const heights = new Map([[-1, 30], [model.topLayer + 1, 46]]);
  for (const node of shown) {
    if (node.kind !== "logit") heights.set(node.layer, Math.max(30, heights.get(node.layer) || 0));
  }
  const withPicture = new Set(shown.filter((node) => node.token.patch).map((node) => node.layer));
  const tallest = Math.max(0, ...lanes.filter((lane) => lane.image >= 0).map((lane) => lane.height));
  for (const layer of withPicture) heights.set(layer, Math.max(heights.get(layer), tallest + 12));
  const wordWidth = lanes.find((lane) => lane.image < 0)?.width || WORD;
  const perLine = Math.max(1, Math.floor(wordWidth / DOT));
  for (const nodes of cells.values()) {
    const [{ layer, token }] = nodes;
    if (!token.patch) heights.set(layer, Math.max(heights.get(layer), Math.ceil(nodes.length / perLine) * DOT + 12));
  }
  const rows = new Map();
  let y = 0;
  for (let layer = model.topLayer + 1; layer >= -1; layer -= 1) {
    const height = heights.get(layer) || 12; // a layer without nodes is a thin line
    rows.set(layer, { layer, top: y, bottom: y + height, middle: y + height / 2, empty: !heights.has(layer), perLine });
    y += height;
  }
  return new Map([...rows].reverse());
}

function placeCell(nodes, lanes, rows, at) {
  const [{ layer, token, position }] = nodes;
  const row = rows.get(layer);
  if (!token.patch) {
    const lane = lanes.find((one) => one.image < 0 && one.positions[0] === position);
    const lines = Math.ceil(nodes.length / row.perLine);
    nodes.forEach((node, i) => {
      const line = Math.floor(i / row.perLine);
      const inLine = Math.min(row.perLine, nodes.length - line * row.perLine);
      at.set(node.index, { r: 5, y: row.middle + (line - (lines - 1) / 2) * DOT,
        x: lane.x + lane.width / 2 + ((i % row.perLine) - (inLine - 1) / 2) * DOT });
    });
    return;
  }
  const lane = lanes.find((one) => one.image === token.image);
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
