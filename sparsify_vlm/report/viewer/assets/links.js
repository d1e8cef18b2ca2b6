// Links on a canvas: the strongest only, so that tens of thousands stay as quick as a few hundred.

import { scheme } from "./colours.js";

const MOST_LINKS = 120;
const LEAST = 0.02; // of the strongest: thinner ones only make a fog

// The links to draw: how much of the subject's effect runs through each, and outputs of the chosen.
export function strongest(model, flow, chosen, shown) {
  const links = [];
  for (let link = 0; flow && link < flow.length; link += 1) {
    if (flow[link] !== 0 && shown.has(model.source[link]) && shown.has(model.target[link])) links.push(link);
  }
  const top = keep(links, flow).map((link) => ({ link, value: flow[link] }));
  const outputs = chosen.flatMap((i) => model.outputs[i]).filter((link) => shown.has(model.target[link]));
  return [top, keep(outputs, model.weight).map((link) => ({ link, value: model.weight[link] }))];
}

function keep(links, by) {
  const sorted = links.sort((a, b) => Math.abs(by[b]) - Math.abs(by[a])).slice(0, MOST_LINKS);
  return sorted.filter((link) => Math.abs(by[link]) >= LEAST * Math.abs(by[sorted[0]]));
}

export function drawLinks(context, model, at, groups) {
  const colours = scheme();
  for (const links of groups) {
    const most = links.length ? Math.abs(links[0].value) : 1;
    for (let i = links.length - 1; i >= 0; i -= 1) { // the strongest last, on top
      const { link, value } = links[i];
      const share = Math.abs(value) / most;
      const [from, to] = [at.get(model.source[link]), at.get(model.target[link])];
      const bend = (from.y - to.y) * 0.45;
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.bezierCurveTo(from.x, from.y - bend, to.x, to.y + bend, to.x, to.y);
      context.lineWidth = 0.5 + 5 * share;
      context.globalAlpha = 0.12 + 0.6 * Math.sqrt(share);
      context.strokeStyle = value >= 0 ? colours.for : colours.against;
      context.setLineDash(value >= 0 ? [] : [5, 3]);
      context.stroke();
    }
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

// Rows, and each picture, pale, under the nodes at its patches.
export function drawGround(context, { lanes, rows, width, at }, pictures, shown) {
  const colours = scheme();
  for (const row of rows.values()) {
    if (row.layer % 2 === 0) {
      context.fillStyle = colours.wash;
      context.fillRect(0, row.top, width, row.bottom - row.top);
    }
  }
  const layers = new Map();
  for (const node of shown) {
    if (node.token.patch && node.kind !== "logit") layers.set(`${node.layer} ${node.token.image}`, node);
  }
  for (const { layer, token } of layers.values()) {
    const lane = lanes.find((one) => one.image === token.image);
    const top = rows.get(layer).middle - lane.height / 2;
    const [w, h] = [lane.cell * lane.columns, lane.height];
    context.globalAlpha = 0.28;
    if (pictures[lane.image].naturalWidth) context.drawImage(pictures[lane.image], lane.x, top, w, h);
    context.globalAlpha = 1;
    context.strokeStyle = colours.line;
    context.lineWidth = 0.5;
    context.beginPath();
    for (let row = 0; row <= lane.rows; row += 1) {
      context.moveTo(lane.x, top + row * lane.cell);
      context.lineTo(lane.x + w, top + row * lane.cell);
    }
    for (let column = 0; column <= lane.columns; column += 1) {
      context.moveTo(lane.x + column * lane.cell, top);
      context.lineTo(lane.x + column * lane.cell, top + h);
    }
    context.stroke();
  }
}
