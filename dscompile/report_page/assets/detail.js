// One site: what was decided and why, its source line, what was bound to what, and the region that was replaced.

function detail(site, group) {
  return el(
    "div",
    { class: "panel" },
    group.length > 1 ? members(site, group) : "",
    el(
      "div",
      { class: "columns" },
      el("div", {}, site.matched ? "" : refusal(site), facts(site)),
      el("div", {}, sourceOf(site), site.matched ? proof(site) : ""),
    ),
    figures(site),
  );
}

/** The sites of one line, named by the numbers in which they differ. */
function members(site, group) {
  const all = chosen().sites;
  const paths = group.map((one) => one.module_path.match(/\d+/g) ?? []);
  const differ = (paths[0] ?? []).map((_, i) => new Set(paths.map((path) => path[i])).size > 1);
  const entries = group.map((one, i) =>
    link(
      { site: String(all.indexOf(one)) },
      {
        "aria-current": one === site ? "true" : null,
        title: one.module_path,
        "data-key": `member-${all.indexOf(one)}`,
      },
      paths[i].filter((_, at) => differ[at]).join(".") || String(i),
    ),
  );
  return el(
    "nav",
    { class: "members", "aria-label": "Layers of this line" },
    entries,
    el("code", { class: "soft" }, site.module_path),
  );
}

function refusal(site) {
  return el(
    "div",
    { class: "refusal" },
    el("h3", {}, site.refusal || "Refused"),
    site.proved?.length ? "" : el("p", {}, site.reason),
    proof(site),
    site.hint ? el("p", {}, el("span", { class: "label" }, "What would make it match"), site.hint) : "",
  );
}

/** The facts that were shown, in order, and the one that could not be. */
function proof(site) {
  if (!site.proved?.length && !site.closest) return "";
  const held = (site.proved ?? []).map((fact) => el("li", { class: "held" }, fact));
  const form = site.matched ? "Proved" : "Closest form";
  return el(
    "div",
    { class: "proof" },
    el("p", { class: "soft" }, site.closest ? `${form}: ${site.closest}` : form),
    el("ol", { class: "facts" }, held, site.matched ? "" : el("li", { class: "failed" }, site.reason)),
  );
}

function facts(site) {
  const errors = Object.entries(site.errors ?? {}).map(
    ([what, value]) => `${what} ${value >= 1e-3 || !value ? `${(100 * value).toFixed(1)} %` : value.toExponential(1)}`,
  );
  const entries = [
    ["Form", site.form],
    ["Mask", site.mask],
    ["Decision", site.decision],
    ["Kernel", site.kernel],
    ["Not taken", site.matched ? site.reason : ""],
    ["Predicted", predicted(site)],
    ["Relative errors", errors.join(", ")],
    ["Node", site.node ? nodeLink(site) : ""],
    ["Passes", site.passes.join(", ")],
  ];
  return el(
    "dl",
    {},
    entries.filter(([, value]) => value).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
}

/** Seconds of each choice by the cost model, as bars on one scale. */
function predicted(site) {
  const costs = Object.entries(site.predicted ?? {});
  if (!costs.length) return "";
  const largest = Math.max(...costs.map(([, seconds]) => seconds));
  return el(
    "div",
    { class: "costs" },
    costs.map(([name, seconds]) => [
      el("span", {}, name),
      bar(seconds / largest),
      el("span", { class: "number" }, duration(seconds)),
    ]),
  );
}

/** The pass that first listed a site, if its graph is in the dump; else the first graph with a node of that name. */
function passOf(site) {
  const known = [site.passes[0], ...chosen().passes.map((one) => one.name)];
  return known.find((name) => nodes()?.find(name, "before", site.node) !== undefined);
}

function nodeLink(site) {
  const pass = passOf(site);
  return pass
    ? link({ view: pass, node: site.node }, { "data-key": "site-node" }, el("code", {}, short(site.node)))
    : el("code", {}, site.node);
}

function sourceOf(site) {
  const place = nodes()?.byLine.get(site.source);
  const name = site.source === "?" ? "" : site.source;
  const title = place === undefined ? name : link({ at: String(place) }, { "data-key": "site-source" }, name);
  return el("figure", { class: "source" }, el("figcaption", {}, title), place === undefined ? "" : excerpt(place));
}

function excerpt(place) {
  const [, line] = nodes().data.places[place];
  const lines = nodes().excerpt(place);
  if (!lines.length) return el("p", { class: "soft" }, "The file could not be read when the dump was written.");
  return el(
    "pre",
    {},
    lines.map(([number, text]) =>
      el(
        "span",
        { class: number === line ? "line here" : "line" },
        el("span", { class: "gutter" }, String(number)),
        text,
        "\n",
      ),
    ),
  );
}
