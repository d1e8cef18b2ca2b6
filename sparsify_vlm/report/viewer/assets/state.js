// What the reader has chosen, and who wants to know of a change.

export class State {
  constructor(model, marks) {
    this.model = model;
    this.marks = marks;
    this.threshold = model.maxInfluence;
    this.errors = true;
    this.direct = false;
    this.chosen = []; // numbers of nodes; none: the answer is looked at
    this.group = null; // the supernode they are, if they are one
    this.focus = model.answerNode.index;
    this.listeners = [];
    this.forget();
    marks.onChange(() => this.forget());
  }

  // What follows from the rest is worked out once after a change.
  forget() {
    this.known = {};
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  set(changes) {
    Object.assign(this, changes);
    this.forget();
    this.listeners.forEach((listener) => listener(changes));
  }

  choose(indices, group = null) {
    this.set({ chosen: indices, group, focus: indices.length ? indices[0] : this.focus });
  }

  // Whether only tokens are chosen: nothing feeds them, so one looks at where they lead.
  get looksUp() {
    return this.chosen.length > 0 && this.chosen.every((i) => this.model.nodes[i].kind === "token");
  }

  // What everything lit up is about.
  get subject() {
    return this.chosen.length && !this.looksUp ? this.chosen : [this.model.answerNode.index];
  }

  // Effect of every node on the subject, and flow through every link.
  get effects() {
    this.known.effects ??= this.model.effects(this.subject, this.direct);
    return this.known.effects;
  }

  // Numbers of the nodes that are shown: tokens where they lead to one of the others.
  get shownSet() {
    if (!this.known.shown) {
      const { nodes, outputs, target } = this.model;
      const shown = new Set(nodes.filter((node) => this.passes(node)).map((node) => node.index));
      const leads = (node) => outputs[node.index].some((link) => shown.has(target[link]));
      const tokens = nodes.filter((node) => node.kind === "token" && leads(node));
      this.known.shown = new Set([...shown, ...tokens.map((node) => node.index)]);
    }
    return this.known.shown;
  }

  passes(node) {
    if (node.kind === "logit" || this.chosen.includes(node.index)) return true;
    if (this.marks.isPinned(node.id) || this.marks.groupOf(node.id)) return true;
    if (node.kind === "token" || (node.kind === "error" && !this.errors)) return false;
    return node.influence === null || node.influence <= this.threshold + 1e-9;
  }

  shows(node) {
    return this.shownSet.has(node.index);
  }

  get shown() {
    return this.model.nodes.filter((node) => this.shows(node));
  }
}
