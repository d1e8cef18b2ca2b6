// One scale for everything signed: vermilion for, blue against, the same two that people with any
// kind of colour blindness tell apart; strength is opacity.

export function scheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["for", "against", "ink", "soft", "line", "paper", "wash", "accent"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export function side(value) {
  return value >= 0 ? "for" : "against";
}

// Opacity of a value beside the largest one: linear, so that half the effect is half the colour.
export function strength(value, most) {
  return most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
}
