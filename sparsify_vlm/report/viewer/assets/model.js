// The graph: links by node, layers, and how much each node adds to a chosen one.
//
// A feature's activation is the sum of what its inputs write into it (and of a bias). So an input
// that loses a share of itself takes the share weight / activation of the feature away, and with it
// that share of all the feature writes. Following this down from a chosen node gives, for every
// node below, its signed effect through all paths of the graph, in units of the chosen node.

export class Model {
  constructor(data) {
    Object.assign(this, data);
    this.nodes.forEach((node, i) => {
      node.index = i;
      node.token = this.tokens[node.position];
    });
    this.source = Int32Array.from(data.links.source);
    this.target = Int32Array.from(data.links.target);
    this.weight = Float64Array.from(data.links.weight);
    this.inputs = linksBy(this.target, this.nodes.length);
    this.outputs = linksBy(this.source, this.nodes.length);
    const features = this.nodes.filter((node) => node.kind === "feature");
    this.hasSigns = features.every((node) => node.activation);
    this.topLayer = Math.max(0, ...features.map((node) => node.layer),
      ...this.nodes.filter((node) => node.kind === "error").map((node) => node.layer));
    this.order = this.nodes.map((node) => node.index).sort((a, b) => this.rank(b) - this.rank(a));
    this.logits = this.nodes.filter((node) => node.kind === "logit")
      .sort((a, b) => b.target - a.target || b.probability - a.probability);
    const main = this.patch_effects.length ? this.patch_effects[0].target : null;
    this.answerNode = main !== null ? this.nodes[main] : this.logits[0] || this.nodes[this.order[0]];
    this.logits.sort((a, b) => (b === this.answerNode) - (a === this.answerNode));
    const known = this.nodes.filter((node) => node.influence !== null && node.kind !== "token");
    this.maxInfluence = known.reduce((most, node) => Math.max(most, node.influence), 0);
    this.minInfluence = known.reduce((least, node) => Math.min(least, node.influence), 1);
    this.tokenNode = new Map();
    for (const node of this.nodes) if (node.kind === "token") this.tokenNode.set(node.position, node);
  }

  rank(index) {
    const node = this.nodes[index];
    return node.kind === "token" ? -1 : node.kind === "logit" ? this.topLayer + 1 : node.layer;
  }

  // Effect of every node, and flow through every link, on the sum of the chosen nodes.
  effects(chosen, direct = false) {
    const effect = new Float64Array(this.nodes.length);
    const flow = new Float64Array(this.weight.length);
    const chosenSet = new Set(chosen);
    for (const j of this.order) {
      const share = (chosenSet.has(j) ? 1 : 0) + (direct ? 0 : this.share(j, effect[j]));
      if (share === 0) continue;
      for (const link of this.inputs[j]) {
        flow[link] = share * (this.hasSigns ? this.weight[link] : Math.abs(this.weight[link]) / this.total(j));
        effect[this.source[link]] += flow[link];
      }
    }
    return { effect, flow };
  }

  share(j, effect) {
    if (effect === 0 || this.nodes[j].kind !== "feature") return 0;
    return this.hasSigns ? effect / this.nodes[j].activation : effect;
  }

  total(j) {
    return this.inputs[j].reduce((sum, link) => sum + Math.abs(this.weight[link]), 0) || 1;
  }

  // Links of one side of some nodes, strongest first; those between the nodes themselves left out.
  neighbours(chosen, side) {
    const inside = new Set(chosen);
    const [links, far] = side === "inputs" ? [this.inputs, this.source] : [this.outputs, this.target];
    const sums = new Map();
    for (const i of chosen) {
      for (const link of links[i]) {
        if (!inside.has(far[link])) sums.set(far[link], (sums.get(far[link]) || 0) + this.weight[link]);
      }
    }
    return [...sums].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]))
      .map(([index, weight]) => ({ node: this.nodes[index], weight }));
  }

  // Tables of effects on a target in the whole graph: of image tokens, or of pixels.
  exactPatchEffects(index, image, pixels = false) {
    const tables = pixels ? this.pixel_effects : this.patch_effects;
    return tables.find((one) => one.target === index && one.image === image) || null;
  }
}

function linksBy(end, n) {
  const lists = Array.from({ length: n }, () => []);
  end.forEach((node, link) => lists[node].push(link));
  return lists;
}
