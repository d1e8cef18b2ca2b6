// Elements and numbers. Text from data only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue; // no such attribute
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

export function clear(element, ...children) {
  element.replaceChildren(...children.flat().filter(Boolean));
  return element;
}

// Make `wanted` the children without taking out those that stay: that would end a click on them, or
// the focus.
export function setChildren(element, wanted) {
  const stays = new Set(wanted);
  for (const child of [...element.childNodes]) if (!stays.has(child)) child.remove();
  wanted.forEach((child, i) => {
    if (element.childNodes[i] !== child) element.insertBefore(child, element.childNodes[i] || null);
  });
}

// A signed number of about three digits, with a true minus sign.
export function signed(value) {
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 100 ? size.toFixed(0) : size >= 10 ? size.toFixed(1)
    : size >= 0.01 ? size.toFixed(2) : size.toExponential(0);
  return (value > 0 ? "+" : value < 0 ? "−" : "") + text;
}

export function percent(share) {
  if (share > 0.995 && share < 1) return ">\u00a099\u00a0%"; // with spaces that do not break
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}\u00a0%`;
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// A token's text with what cannot be seen made visible.
export function visible(text) {
  const shown = text.replace(/[\u2581\u0120]/g, " ").replace(/\n|\u010a/g, "⏎").replace(/\t/g, "⇥");
  return shown.trim() || (shown ? "␣" : "∅");
}
