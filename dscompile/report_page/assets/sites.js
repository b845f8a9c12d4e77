// The table of sites: filters, layers that differ only in their number as one line, details on demand.

const FILTERS = [
  ["kind", "Kind", (site) => [site.kind]],
  ["state", "State", (site) => [site.state]],
  ["refusal", "Refusal", (site) => (site.refusal ? [site.refusal] : [])],
  ["pass", "Pass", (site) => site.passes],
];
// What is no site, but looks like one, is shown as a near miss, or, where it is common, on request.
const STATES = { lowered: "good", refused: "bad", "near miss": "near", "passed over": "soft" };
const SAME = [
  "kind",
  "state",
  "refusal",
  "source",
  "form",
  "mask",
  "decision",
  "kernel",
  "reason",
  "hint",
  "closest",
  "proved",
];

function siteSection() {
  const controls = el("form", { class: "filters", role: "search", on: { submit: (event) => event.preventDefault() } });
  const count = el("p", { class: "soft", "aria-live": "polite" });
  const body = el("tbody");
  const heads = ["State", "Kind", "Where", "What was found", "Runs as"];
  const table = el(
    "table",
    { class: "sites" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        heads.map((h) => el("th", { scope: "col" }, h)),
      ),
    ),
    body,
  );
  watch(["g"], () => controls.replaceChildren(...filters()));
  watch(["g", "q", "site", ...FILTERS.map(([key]) => key)], () => {
    const all = chosen().sites.filter((site) => site.state !== "passed over" || state.state === "passed over");
    const shown = all.filter(passesFilters);
    const groups = grouped(shown);
    for (const control of controls.querySelectorAll("[name]")) {
      if (control.value !== (state[control.name] ?? "")) control.value = state[control.name] ?? "";
    }
    count.textContent = summary(all, shown, groups);
    body.replaceChildren(...groups.flatMap((group) => siteRows(group)));
    table.hidden = !groups.length;
  });
  return el("section", { id: "sites", "aria-label": "Sites" }, el("h2", {}, "Sites"), controls, count, table);
}

function summary(all, shown, groups) {
  if (!all.length) return "No attention, expert layer or FP8 layer was found in this graph.";
  if (!shown.length) return "No site passes the filters.";
  const others = all.length - proper({ sites: all });
  const near = others ? ` and ${others} that only ${others === 1 ? "looks" : "look"} like one` : "";
  const what =
    shown.length === all.length ? plural(all.length - others, "site") + near : `${shown.length} of ${all.length} shown`;
  return groups.length < shown.length
    ? `${what}; those that differ only in the number of their layer share a line`
    : what;
}

function filters() {
  const search = el("input", {
    type: "search",
    name: "q",
    placeholder: "Find in sites",
    "aria-label": "Find in sites",
    on: { input: (event) => choose({ q: event.target.value }) },
  });
  const selects = FILTERS.map(([key, label, values]) => {
    const known = [...new Set(chosen().sites.flatMap(values))].sort();
    if (known.length < 2 && !state[key]) return "";
    const options = known.map((value) => el("option", { value }, value));
    const change = (event) => choose({ [key]: event.target.value });
    return el(
      "select",
      { name: key, "aria-label": label, on: { change } },
      el("option", { value: "" }, `${label}: all`),
      options,
    );
  });
  return [search, ...selects].filter(Boolean);
}

function passesFilters(site) {
  const words = (state.q ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const text = words.length ? JSON.stringify(site).toLowerCase() : "";
  return (
    FILTERS.every(([key, , values]) => !state[key] || values(site).includes(state[key])) &&
    words.every((word) => text.includes(word))
  );
}

/** Sites that agree in all that is shown and whose paths differ only in numbers. */
function grouped(sites) {
  const groups = new Map();
  for (const site of sites) {
    const key = JSON.stringify([...SAME.map((name) => site[name]), site.module_path.replace(/\d+/g, "#")]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(site);
  }
  return [...groups.values()];
}

function siteRows(group) {
  const all = chosen().sites;
  const site = group.find((one) => String(all.indexOf(one)) === state.site) ?? group[0];
  const index = all.indexOf(site);
  const open = state.site === String(index);
  const toggle = () => choose({ site: open ? "" : String(index) });
  const button = el(
    "button",
    { type: "button", class: "where", "aria-expanded": String(open), "data-key": `site-${all.indexOf(group[0])}` },
    pathOf(group),
    " ",
    group.length > 1 ? el("span", { class: "count" }, `× ${group.length}`) : "",
  );
  const row = el(
    "tr",
    { class: `site ${open ? "open" : ""}`, on: { click: toggle } },
    el("td", {}, el("span", { class: `state ${STATES[site.state]}` }, site.state)),
    el("td", { class: "kind" }, site.kind),
    el("td", {}, button),
    el("td", { class: "what" }, site.matched ? site.form : [el("b", {}, site.refusal), " ", site.reason]),
    el("td", { class: "kernel" }, site.matched ? site.kernel || site.decision : site.decision),
  );
  return open ? [row, el("tr", { class: "detail" }, el("td", { colspan: 5 }, detail(site, group)))] : [row];
}

/** The path of a group of sites, the numbers that differ as ranges. */
function pathOf(group) {
  const paths = group.map((site) => (site.module_path || "(top)").split(/(\d+)/));
  return paths[0].map((part, i) => {
    const found = [...new Set(paths.map((path) => path[i]))];
    return found.length > 1 ? el("i", {}, ranges(found.map(Number))) : part;
  });
}

function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const runs = [];
  for (const n of sorted) {
    const last = runs[runs.length - 1];
    if (last && n === last[1] + 1) last[1] = n;
    else runs.push([n, n]);
  }
  const texts = runs.map(([a, b]) => (a === b ? `${a}` : b === a + 1 ? `${a},${b}` : `${a}–${b}`));
  return texts.length > 4 ? `${texts.slice(0, 3).join(",")},…${sorted[sorted.length - 1]}` : texts.join(",");
}
