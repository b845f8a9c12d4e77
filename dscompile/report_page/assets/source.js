// The source lines that nodes point at, by file: every node and site links to its line here.

function sourceSection() {
  const root = el("section", { id: "source", "aria-label": "Source lines" });
  watch(["g"], () => {
    const places = nodes()?.data.places ?? [];
    root.hidden = !places.length;
    if (places.length) root.replaceChildren(el("h2", {}, "Source lines"), ...files());
  });
  watch(["g", "at"], (keys) => {
    for (const line of root.querySelectorAll(".here")) line.classList.remove("here");
    const line = state.at === undefined ? null : document.getElementById(`place-${state.at}`);
    line?.classList.add("here");
    if (line && keys.includes("at")) {
      line.closest("details").open = true;
      line.scrollIntoView({ block: "center" });
    }
  });
  return root;
}

function files() {
  const { places, files: known } = nodes().data;
  const numbers = known.map(() => new Map());
  places.forEach(([file, line], place) => numbers[file].set(line, place));
  return known.map(({ file, lines }, i) => {
    const found = [...new Set([...Object.keys(lines).map(Number), ...numbers[i].keys()])].sort((a, b) => a - b);
    const shown = found.map((number, at) => {
      const place = numbers[i].get(number);
      const apart = at > 0 && number !== found[at - 1] + 1;
      const id = place === undefined ? null : `place-${place}`;
      const kind = `line ${place === undefined ? "context" : ""} ${apart ? "apart" : ""}`;
      return el(
        "span",
        { class: kind, id },
        el("span", { class: "gutter" }, String(number)),
        lines[number] ?? "",
        "\n",
      );
    });
    const title = el("summary", {}, file, el("span", { class: "count" }, plural(numbers[i].size, "line")));
    return el("details", { class: "file" }, title, el("pre", {}, shown));
  });
}
