// Pins, groups and labels. On a server they are saved with every change; a standalone page keeps
// them until it is closed and gives them as a file.

export class Marks {
  constructor(value, save) {
    this.value = value;
    this.save = save;
    this.listeners = [];
    this.onStatus = () => {};
    this.onStale = () => {};
    this.status = "";
    this.pending = Promise.resolve();
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  isPinned(id) {
    return this.value.pinned.includes(id);
  }

  label(id) {
    return Object.hasOwn(this.value.labels, id) ? this.value.labels[id] : "";
  }

  groupOf(id) {
    return this.value.supernodes.find((group) => group.nodes.includes(id)) || null;
  }

  togglePin(id) {
    const { pinned } = this.value;
    this.change({ pinned: pinned.includes(id) ? pinned.filter((x) => x !== id) : [...pinned, id] });
  }

  setLabel(id, text) {
    const labels = Object.entries(this.value.labels).filter(([key]) => key !== id);
    if (text.trim()) labels.push([id, text.trim()]);
    this.change({ labels: Object.fromEntries(labels) });
  }

  group(name, ids) {
    const others = this.value.supernodes
      .map((group) => ({ ...group, nodes: group.nodes.filter((id) => !ids.includes(id)) }))
      .filter((group) => group.nodes.length);
    this.change({ supernodes: [...others, { name, nodes: ids }] });
  }

  ungroup(group) {
    this.change({ supernodes: this.value.supernodes.filter((one) => one !== group) });
  }

  rename(group, name) {
    const supernodes = this.value.supernodes.map((one) => (one === group ? { ...one, name } : one));
    this.change({ supernodes });
  }

  change(changes) {
    this.value = { ...this.value, ...changes };
    this.listeners.forEach((listener) => listener());
    this.tell("saving …");
    // One after the other, so that the last change is the last one written.
    this.pending = this.pending.then(() => this.save(this.value)).then(
      (status) => this.tell(status),
      (error) => {
        this.tell(`not saved: ${error.message}`);
        if (error instanceof StaleError) this.onStale();
      },
    );
  }

  tell(status) {
    this.status = status;
    this.onStatus(status);
  }

  text() {
    return `${JSON.stringify(this.value, null, 1)}\n`;
  }
}

// The marks of the folder have changed since this page read them.
class StaleError extends Error {}

// Saves marks whose version on the server was `version` when they were read.
export function savingToServer(version) {
  let known = version;
  return async (value) => {
    const headers = { "Content-Type": "application/json", "If-Match": known };
    const reply = await fetch("marks.json", { method: "POST", headers, body: JSON.stringify(value) });
    if (reply.status === 409) throw new StaleError(await reply.text());
    if (!reply.ok) throw new Error(await reply.text());
    known = reply.headers.get("ETag");
    return "saved in marks.json";
  };
}

export async function keepInPage() {
  return "kept in this page only: download them before you close it";
}
