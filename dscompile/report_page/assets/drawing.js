// Drawings of a site: what is bound to each operand of the operator, and the region of the graph that it replaces.

const BOX = { height: 40, gap: 12, width: 168 };
const MOST = 48; // nodes of a region that are drawn

function figures(site) {
  const bound = Object.entries(site.bound ?? {});
  const parts = [];
  if (bound.length)
    parts.push(figure("Bound", "the model's values, and the operands that they are", boundDrawing(site, bound)));
  if (site.region?.length > 1 && nodes()) {
    const left = site.region.length > MOST ? `, the last ${MOST} of them drawn` : "";
    parts.push(
      figure(
        "Replaced",
        `${plural(site.region.length, "call")} that only served this result${left}`,
        regionDrawing(site, bound),
      ),
    );
  }
  return el("div", { class: "figures" }, parts);
}

function figure(title, caption, drawing) {
  return el(
    "figure",
    { class: "drawing" },
    el("figcaption", {}, el("b", {}, title), " ", el("span", { class: "soft" }, caption)),
    el("div", { class: "scroll" }, drawing),
  );
}

/** `name: type` as [name, type]; what is no node has no type. */
function typed(text) {
  const found = text.match(/^([\w.]+): (.+)$/s);
  return found ? [found[1], found[2]] : [text, ""];
}

function cut(text, most) {
  return text.length > most ? `…${text.slice(1 - most)}` : text;
}

function boundDrawing(site, bound) {
  const tensors = bound.filter(([, text]) => text.includes(": "));
  const settings = bound.filter(([, text]) => !text.includes(": "));
  const values = [...new Set(tensors.flatMap(([, text]) => text.split("; ")))];
  const rows = Math.max(values.length, tensors.length, 1);
  const height = rows * (BOX.height + BOX.gap) + BOX.gap + (settings.length ? 18 * settings.length + 10 : 0);
  const y = (i, count) => BOX.gap + i * (BOX.height + BOX.gap) + ((rows - count) * (BOX.height + BOX.gap)) / 2;
  const edges = tensors.flatMap(([, text], to) =>
    text.split("; ").map((value) => {
      const [from, end] = [
        y(values.indexOf(value), values.length) + BOX.height / 2,
        y(to, tensors.length) + BOX.height / 2,
      ];
      return svg("path", { class: "edge", d: `M 330 ${from} C 385 ${from}, 385 ${end}, 440 ${end}` });
    }),
  );
  const sources = values.map((value, i) => box(0, y(i, values.length), 330, ...typed(value), "value"));
  const operands = tensors.map(([name], i) => [
    svg("circle", { class: "port", cx: 440, cy: y(i, tensors.length) + BOX.height / 2, r: 3.5 }),
    svg("text", { class: "mono", x: 456, y: y(i, tensors.length) + BOX.height / 2 + 4 }, name),
  ]);
  const first = rows * (BOX.height + BOX.gap) + BOX.gap + 8;
  const constants = settings.map(([name, text], i) =>
    svg("text", { class: "mono faint", x: 456, y: first + 18 * i }, `${name} = ${cut(rounded(text), 18)}`),
  );
  const middle = height / 2;
  return svg(
    "svg",
    { viewBox: `0 0 860 ${height}`, width: 860, height, role: "img", "aria-label": `Operands of ${site.kind}` },
    svg("rect", { class: "operator", x: 440, y: 1, width: 220, height: height - 2, rx: 8 }),
    edges,
    sources,
    operands.flat(),
    constants,
    svg("text", { class: "name", x: 646, y: middle + 5, "text-anchor": "end" }, site.kind),
    svg("path", { class: "edge", d: `M 660 ${middle} L 700 ${middle}` }),
    site.node ? box(700, middle - BOX.height / 2, 158, site.node.replace(/^.*\//, ""), "replaced", "result") : "",
  );
}

function box(x, y, width, name, below, kind) {
  const most = Math.floor((width - 20) / 7);
  const label = svg("text", { class: "mono", x: x + 10, y: y + (below ? 17 : 24) }, cut(short(name), most));
  const type = below ? svg("text", { class: "mono faint", x: x + 10, y: y + 32 }, cut(below, most)) : "";
  return svg(
    "g",
    {},
    svg("title", {}, below ? `${name}: ${below}` : name),
    svg("rect", { class: `box ${kind}`, x, y, width, height: BOX.height, rx: 5 }),
    label,
    type,
  );
}

/** The region as layers from what it reads to what it made. */
function regionDrawing(site, bound) {
  const graph = nodes();
  const body = site.node.includes("/") ? site.node.replace(/\/[^/]*$/, "") : "";
  const table = graph.named(passOf(site) ?? site.passes[0], "before");
  const at = (name) => table.get(`${body}/${name}`) ?? graph.find(passOf(site) ?? site.passes[0], "before", name);
  const region = site.region.slice(-MOST).filter((name) => at(name) !== undefined);
  const roles = new Map();
  for (const [operand, text] of bound) {
    for (const value of text.split("; ")) {
      const [name, type] = typed(value);
      if (type) roles.set(name, [...(roles.get(name) ?? []), operand]);
    }
  }
  const inside = new Set(region);
  const rows = new Map(region.map((name) => [name, graph.row(at(name))]));
  const read = [...new Set(region.flatMap((name) => graph.inputs(rows.get(name))))].filter(
    (name) => !inside.has(name) && at(name) !== undefined,
  );
  for (const name of read) rows.set(name, graph.row(at(name)));
  const order = [...read, ...region];
  const known = new Set(order);
  const edges = region.flatMap((name) =>
    [...new Set(graph.inputs(rows.get(name)))].filter((from) => known.has(from)).map((from) => [from, name]),
  );
  return layered(order, edges, rows, inside, roles, site.node.replace(/^.*\//, ""));
}

function layered(order, edges, rows, inside, roles, result) {
  const level = new Map(order.map((name) => [name, 0]));
  for (const name of [...order].reverse()) {
    const after = edges.filter(([from]) => from === name).map(([, to]) => level.get(to) + 1);
    if (after.length) level.set(name, Math.max(...after)); // as far from the result as its readers make it
  }
  const deepest = Math.max(...level.values());
  const layers = [];
  for (const name of order) (layers[deepest - level.get(name)] ??= []).push(name);
  const place = settle(layers.filter(Boolean), edges);
  const width = Math.max(...[...place.values()].map((p) => p.x)) + BOX.width + 4;
  const height = Math.max(...[...place.values()].map((p) => p.y)) + 56;
  const lines = edges.map(([from, to]) => {
    const [a, b] = [place.get(from), place.get(to)];
    return svg("path", {
      class: "edge",
      d: `M ${a.x} ${a.y + 40} C ${a.x} ${a.y + 56}, ${b.x} ${b.y - 16}, ${b.x} ${b.y}`,
      transform: `translate(${BOX.width / 2} 0)`,
    });
  });
  const boxes = order.map((name) => {
    const role = roles.get(name);
    const kind = name === result ? "result" : role ? "value" : inside.has(name) ? "inner" : "outer";
    const { x, y } = place.get(name);
    return box(x, y, BOX.width, name, role ? role.join(", ") : rows.get(name).call, kind);
  });
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Region that was replaced" },
    lines,
    boxes,
  );
}

/** Places of nodes, layer by layer: under the middle of what they read, as far as there is room. */
function settle(layers, edges) {
  const place = new Map();
  layers.forEach((layer, depth) => {
    const wanted = layer.map((name, i) => {
      const above = edges.filter(([from, to]) => to === name && place.has(from)).map(([from]) => place.get(from).x);
      return { name, x: above.length ? above.reduce((a, b) => a + b) / above.length : i * (BOX.width + 10) };
    });
    let next = 1;
    for (const { name, x } of wanted.sort((a, b) => a.x - b.x)) {
      place.set(name, { x: Math.max(next, x), y: 8 + depth * 62 });
      next = place.get(name).x + BOX.width + 10;
    }
  });
  return place;
}
