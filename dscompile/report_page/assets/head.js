// Head of the page: what was compiled on what, the graphs, and what each pass did.

function header() {
  const root = el("header");
  watch(["g"], () => {
    const graph = chosen();
    const lowered = graph.sites.filter((site) => site.state === "lowered").length;
    root.replaceChildren(
      el("p", { class: "eyebrow" }, "dscompile report", el("span", {}, report.directory)),
      el("h1", {}, el("strong", {}, `${lowered} of ${proper(graph)}`), " sites lowered"),
      el("p", { class: "soft" }, [graph.device, ...versions(graph), ...settings(graph)].filter(Boolean).join("  ·  ")),
      graph.error ? el("p", { class: "alert" }, `Analysis stopped, the rest is Inductor's: ${graph.error}`) : "",
      ...report.broken.map((why) => el("p", { class: "alert" }, why)),
      graphList(),
    );
  });
  return root;
}

/** Number of sites, without what only looks like one. */
function proper(graph) {
  return graph.sites.filter((site) => site.state === "lowered" || site.state === "refused").length;
}

function versions(graph) {
  return Object.entries(graph.versions ?? {}).map(([name, version]) => `${name} ${version}`);
}

function settings(graph) {
  const changed = Object.entries(graph.settings ?? {});
  return changed.length ? changed.map(([name, value]) => `${name}=${value}`) : ["default options"];
}

function graphList() {
  if (report.graphs.length === 1) return "";
  const entries = report.graphs.map((graph, i) =>
    link(
      { g: i || "", site: "", view: "", node: "", at: "" },
      { class: "tab", "data-key": `graph-${i}`, "aria-current": graph === chosen() ? "true" : null },
      graph.name.replace("graph_", "graph "),
      " ",
      el("span", { class: "count" }, plural(proper(graph), "site")),
    ),
  );
  return el("nav", { class: "tabs", "aria-label": "Graphs" }, entries);
}

function passTable() {
  const root = el("section", { id: "passes", "aria-label": "Passes" });
  watch(["g"], () => {
    const graph = chosen();
    const longest = Math.max(...graph.passes.map((one) => one.seconds ?? 0), 1e-9);
    const rows = graph.passes.map((one) =>
      el(
        "tr",
        {},
        el(
          "th",
          { scope: "row" },
          one.drawn ? link({ view: one.name, node: "" }, { class: "quiet" }, one.name) : one.name,
        ),
        el("td", { class: "number" }, duration(one.seconds ?? 0)),
        el("td", { class: "wide" }, bar((one.seconds ?? 0) / longest)),
        el("td", { class: "number" }, one.considered ? `${one.matched} of ${one.considered}` : ""),
        el("td", { class: "number" }, changed(one)),
        el("td", { class: "soft note" }, one.note ?? ""),
      ),
    );
    const heads = ["Pass", "Time", "", "Lowered", "Lines", ""];
    const counts = Object.entries(graph.op_counts ?? {});
    root.replaceChildren(
      el("h2", {}, "Passes"),
      rows.length
        ? el(
            "table",
            { class: "passes" },
            el(
              "thead",
              {},
              el(
                "tr",
                {},
                heads.map((h) => el("th", {}, h)),
              ),
            ),
            el("tbody", {}, rows),
          )
        : el("p", { class: "soft" }, "No pass ran: the graph holds no attention, product by expert or FP8 layer."),
      counts.length
        ? el(
            "p",
            { class: "ops" },
            el("span", { class: "soft" }, "In the graph now "),
            ...counts.map(([name, n]) => el("span", {}, `${n} × ${name}`)),
          )
        : "",
    );
  });
  return root;
}

function bar(share) {
  const inner = el("span", {});
  inner.style.width = `${Math.max(1, 100 * share)}%`;
  return el("span", { class: "bar", "aria-hidden": "true" }, inner);
}

function changed(one) {
  if (one.added === undefined) return "";
  if (!one.added && !one.removed) return el("span", { class: "soft" }, "unchanged");
  return [el("span", { class: "good" }, `+${one.added}`), " ", el("span", { class: "bad" }, `−${one.removed}`)];
}
