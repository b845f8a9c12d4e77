// Each pass's graph before and after, as one text in which what changed is marked. Only the lines in sight are
// elements, so that a graph of many thousand nodes scrolls as a small one does.

const LINE = 22; // pixels
const AROUND = 3; // unchanged lines on either side of a change
const differences = new Map();

function graphSection() {
  const root = el("section", { id: "graphs", "aria-label": "Graphs" });
  let shown = null;
  watch(["g"], () => {
    shown = nodes() && chosen().passes.some((one) => one.drawn) ? graphView(root) : empty(root);
  });
  watch(["g", "view", "whole", "find", "node"], (keys) => shown?.(keys));
  return root;
}

function empty(root) {
  root.replaceChildren(el("h2", {}, "Graphs"), el("p", { class: "soft" }, "The dump of this graph holds no graphs."));
  return null;
}

function viewed() {
  const drawable = chosen().passes.filter((one) => one.drawn);
  const wanted = drawable.find((one) => one.name === state.view);
  return wanted ?? drawable.find((one) => one.added || one.removed) ?? drawable[drawable.length - 1];
}

/** Fills the section and returns what redraws it. */
function graphView(root) {
  const tabs = el("nav", { class: "tabs", "aria-label": "Passes with graphs" });
  const spacer = el("div", { class: "spacer" });
  const list = el(
    "div",
    { class: "rows", tabindex: "0", role: "region", "aria-label": "Nodes", on: { scroll: () => paint() } },
    spacer,
  );
  const mode = el(
    "label",
    { class: "check" },
    el("input", {
      type: "checkbox",
      name: "whole",
      on: { change: (e) => choose({ whole: e.target.checked ? "1" : "" }) },
    }),
    "unchanged nodes, too",
  );
  const find = el("input", {
    type: "search",
    placeholder: "Find a node",
    "aria-label": "Find a node",
    on: { input: (e) => choose({ find: e.target.value }) },
  });
  const count = el("span", { class: "soft", "aria-live": "polite" });
  const one = el("div", { class: "one" });
  root.replaceChildren(el("h2", {}, "Graphs"), tabs, el("div", { class: "filters" }, find, mode, count), list, one);
  let lines = [];

  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / LINE) - 10);
    const last = Math.min(lines.length, first + Math.ceil(list.clientHeight / LINE) + 20);
    const block = el("div", { class: "block" }, lines.slice(first, last).map(lineOf));
    block.style.transform = `translateY(${first * LINE}px)`;
    spacer.style.height = `${lines.length * LINE}px`;
    spacer.replaceChildren(block);
  }

  return (keys) => {
    const pass = viewed();
    tabs.replaceChildren(
      ...chosen()
        .passes.filter((one) => one.drawn)
        .map((one) => passTab(one, pass)),
    );
    mode.firstChild.checked = state.whole === "1";
    if (find.value !== (state.find ?? "")) find.value = state.find ?? "";
    const all = difference(pass.name);
    lines = visible(all);
    const nodesShown = lines.filter((line) => line.id !== undefined).length;
    count.textContent = nodesShown
      ? plural(nodesShown, "line")
      : state.find
        ? "No node is called so."
        : "The pass changed nothing.";
    list.hidden = !lines.length;
    list.style.height = `${Math.min(lines.length, 26) * LINE + 2}px`;
    const target = state.node ? lines.findIndex((line) => isTarget(line)) : -1;
    if (target >= 0) list.scrollTop = Math.max(0, (target - 8) * LINE);
    else if (keys.includes("view") || keys.includes("g")) list.scrollTop = 0;
    paint();
    one.replaceChildren(...all.filter(isTarget).map(whole));
    if (target >= 0 && keys.includes("node")) root.scrollIntoView({ block: "start" });
  };
}

function passTab(one, pass) {
  const title = one.added || one.removed ? el("span", { class: "count" }, changed(one)) : "";
  return link(
    { view: one.name, node: "" },
    { class: "tab", "data-key": `view-${one.name}`, "aria-current": one === pass ? "true" : null },
    one.name,
    " ",
    title,
  );
}

/** Lines of a pass: {id, sign} with "+" for new, "-" for old and " " for unchanged ones. */
function difference(pass) {
  const key = `${report.graphs.indexOf(chosen())} ${pass}`;
  if (!differences.has(key)) {
    const [before, after] = [nodes().list(pass, "before"), nodes().list(pass, "after")];
    const [old, now] = [new Set(before), new Set(after)];
    const lines = [];
    const moved = new Set();
    for (let i = 0, j = 0; i < before.length || j < after.length;) {
      if (
        i < before.length &&
        (!now.has(before[i]) ||
          (j < after.length && old.has(after[j]) && !moved.has(after[j]) && before[i] !== after[j]))
      ) {
        if (now.has(before[i])) moved.add(before[i]);
        lines.push({ id: before[i++], sign: "-" });
      } else if (j < after.length && (!old.has(after[j]) || moved.has(after[j]))) {
        lines.push({ id: after[j++], sign: "+" });
      } else {
        lines.push({ id: after[j++], sign: " " });
        i++;
      }
    }
    differences.set(key, before.length ? lines : after.map((id) => ({ id, sign: " " })));
  }
  return differences.get(key);
}

/** The lines to show: those that match the search, all, or the changes with what is around them. */
function visible(all) {
  const words = (state.find ?? "").toLowerCase();
  if (words) return all.filter(({ id }) => textOf(id).includes(words));
  const near = new Uint8Array(all.length);
  const mark = (i) => near.fill(1, Math.max(0, i - AROUND), i + AROUND + 1);
  all.forEach((line, i) => (line.sign !== " " || isTarget(line)) && mark(i));
  if (state.whole === "1" || all === difference("shadow")) return all;
  const lines = [];
  let hidden = 0;
  const gap = () => hidden && lines.push({ hidden });
  all.forEach((line, i) => {
    if (near[i]) {
      gap();
      hidden = 0;
      lines.push(line);
    } else {
      hidden++;
    }
  });
  if (lines.length) gap();
  return lines;
}

function textOf(id) {
  const row = nodes().row(id);
  const args = row.args.map((part) => (typeof part === "number" ? nodes().data.names[part] : part)).join("");
  return `${row.body}/${row.name} ${short(row.name)} ${row.type} ${row.call}(${args})`.toLowerCase();
}

function isTarget({ id }) {
  if (!state.node || id === undefined) return false;
  const { body, name } = nodes().row(id);
  return state.node === name || state.node === `${body}/${name}`;
}

function lineOf(line) {
  if (line.hidden)
    return el("div", { class: "row gap" }, link({ whole: "1" }, {}, `${plural(line.hidden, "unchanged node")}`));
  const row = nodes().row(line.id);
  const kind = { "+": "added", "-": "removed", " ": "" }[line.sign];
  const args = row.args.map((part) => (typeof part === "number" ? nodeRef(nodes().data.names[part], row.body) : part));
  return el(
    "div",
    { class: `row ${kind} ${isTarget(line) ? "target" : ""}` },
    el("span", { class: "sign" }, line.sign === "-" ? "−" : line.sign),
    el(
      "span",
      { class: "node" },
      row.body ? el("span", { class: "faint" }, `${row.body}/`) : "",
      nodeRef(row.name, row.body),
    ),
    el("span", { class: "type" }, row.type),
    isInput(row)
      ? el("span", { class: "call faint" }, "input")
      : el("span", { class: "call" }, el("b", {}, row.call), "(", args, ")"),
    row.place < 0
      ? ""
      : link(
          { at: String(row.place) },
          { class: "place", title: nodes().label(row.place) },
          nodes().label(row.place).replace(/^.*\//, ""),
        ),
  );
}

/** Inputs of the graph are spelled as calls of their own names. */
function isInput(row) {
  return !row.args.length && row.call.toLowerCase() === row.name.toLowerCase();
}

/** A chosen node in full, below the list. */
function whole({ id, sign }) {
  const row = nodes().row(id);
  const args = row.args.map((part) => (typeof part === "number" ? nodeRef(nodes().data.names[part], row.body) : part));
  const when = { "+": "after the pass", "-": "before the pass", " ": "" }[sign];
  return el(
    "div",
    { class: "columns whole" },
    el(
      "div",
      { class: "mono" },
      el(
        "p",
        {},
        el("b", {}, row.body ? `${row.body}/${row.name}` : row.name),
        " ",
        el("span", { class: "soft" }, row.type),
      ),
      el("p", {}, row.call, "(", args, ")"),
      el("p", { class: "soft" }, when),
    ),
    row.place < 0
      ? ""
      : el(
          "figure",
          { class: "source" },
          el("figcaption", {}, link({ at: String(row.place) }, {}, nodes().label(row.place))),
          excerpt(row.place),
        ),
  );
}

function nodeRef(name, body) {
  return link({ node: body ? `${body}/${name}` : name, find: "" }, { class: "ref", title: name }, short(name));
}
