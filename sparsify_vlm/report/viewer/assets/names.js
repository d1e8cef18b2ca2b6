// What nodes are called.

import { visible } from "./dom.js";

export function answerText(node) {
  const match = /^(?:Output "([\s\S]*)" \(p=[\d.]+\)|Target "([\s\S]*)")$/.exec(node.text);
  return match ? match[1] ?? match[2] : node.text || node.id;
}

export function nodeName(state, node) {
  const label = state.marks.label(node.id);
  if (label) return label;
  if (node.kind === "logit") return `“${visible(answerText(node))}”`;
  if (node.kind === "token") return tokenName(node.token);
  if (node.kind === "error") return "error";
  return node.text || `feature ${node.feature}`;
}

export function tokenName(token) {
  return token.patch ? patchName(token.patch) : `“${visible(token.text)}”`;
}

export function patchName([row, column]) {
  return `row ${row + 1}, column ${column + 1}`;
}

export function placeName(node) {
  if (node.kind === "logit") return "answer";
  const where = tokenName(node.token);
  if (node.kind === "token") return node.token.patch ? "patch of the picture" : `token ${node.position + 1}`;
  return `layer ${node.layer} · ${where}`;
}

export function spokenName(state, node) {
  const kind = { token: "input", logit: "answer", error: "reconstruction error", feature: "feature" };
  const parts = [`${kind[node.kind]} ${nodeName(state, node)}`, placeName(node)];
  if (node.activation !== null) parts.push(`activation ${node.activation.toFixed(2)}`);
  if (state.marks.isPinned(node.id)) parts.push("pinned");
  return parts.join(", ");
}
