// The data beside this script. Sites and passes are read at once, the nodes of a graph when they are first looked at.

const report = JSON.parse(document.getElementById("report").textContent);
const drawn = new Map();

function chosen() {
  return report.graphs[Number(state.g ?? 0)] ?? report.graphs[0];
}

/** The nodes of the chosen graph, or null in a dump that has none. */
function nodes() {
  const index = report.graphs.indexOf(chosen());
  if (!drawn.has(index)) {
    const data = JSON.parse(document.getElementById(`graph-${index}`).textContent);
    drawn.set(index, data && new Nodes(data));
  }
  return drawn.get(index);
}

/** `graphs.json`: rows are [body, name, type, call, arguments, place]. */
class Nodes {
  constructor(data) {
    this.data = data;
    this.byLine = new Map(data.places.map(([file, line], i) => [`${data.files[file].file}:${line}`, i]));
    this.lists = new Map();
    this.tables = new Map();
  }

  row(id) {
    const [body, name, type, call, args, place] = this.data.rows[id];
    return { id, body: this.data.bodies[body], name: this.data.names[name], type, call, args, place };
  }

  /** Row numbers of a pass's graph, `stage` being "before" or "after". */
  list(pass, stage) {
    const index = this.data.passes[pass]?.[stage];
    if (index === undefined) return [];
    if (!this.lists.has(index)) {
      const runs = this.data.graphs[index];
      this.lists.set(
        index,
        runs.flatMap(([first, count]) => Array.from({ length: count }, (_, i) => first + i)),
      );
    }
    return this.lists.get(index);
  }

  /** {`body/name`: row number} of a pass's graph. */
  named(pass, stage) {
    const index = this.data.passes[pass]?.[stage];
    if (!this.tables.has(index)) {
      const table = new Map();
      for (const id of this.list(pass, stage)) {
        const { body, name } = this.row(id);
        table.set(`${body}/${name}`, id);
      }
      this.tables.set(index, table);
    }
    return this.tables.get(index);
  }

  /** The row of a node, given as `name` or `body/name`. */
  find(pass, stage, text) {
    const table = this.named(pass, stage);
    if (table.has(text)) return table.get(text);
    const bodies = ["", ...this.data.bodies];
    return bodies.map((body) => table.get(`${body}/${text}`)).find((id) => id !== undefined);
  }

  /** Names that a row's arguments refer to. */
  inputs(row) {
    return row.args.filter((part) => typeof part === "number").map((part) => this.data.names[part]);
  }

  label(place) {
    const [file, line] = this.data.places[place];
    return `${this.data.files[file].file}:${line}`;
  }

  /** The lines about a place: [number, text]. */
  excerpt(place, around = 2) {
    const [file, line] = this.data.places[place];
    const { lines } = this.data.files[file];
    return Array.from({ length: 2 * around + 1 }, (_, i) => line - around + i)
      .filter((number) => lines[number] !== undefined)
      .map((number) => [number, lines[number]]);
  }
}
