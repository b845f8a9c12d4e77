// The schedule as a timeline and the placement of experts as heat maps, where a record holds them.

function scheduleSection() {
  const root = el("section", { id: "schedule", "aria-label": "Schedule" });
  watch(["g"], () => {
    const entries = chosen().schedule ?? [];
    root.hidden = !entries.length;
    root.replaceChildren(...(entries.length ? [el("h2", {}, "Schedule"), timeline(entries)] : []));
  });
  return root;
}

/** One lane a resource (or stream), one colour a micro-batch. */
function timeline(entries) {
  const lanes = [...new Set(entries.map((one) => String(one.resource ?? one.stream ?? "")))];
  const batches = [...new Set(entries.map((one) => one.microbatch ?? 0))].sort();
  const [start, end] = [Math.min(...entries.map((one) => one.start_us)), Math.max(...entries.map((one) => one.end_us))];
  const [left, width, lane] = [120, 880, 34];
  const scale = width / Math.max(end - start, 1e-9);
  const x = (us) => left + (us - start) * scale;
  const bars = entries.map((one) => {
    const [from, to] = [x(one.start_us), x(one.end_us)];
    const y = lanes.indexOf(String(one.resource ?? one.stream ?? "")) * lane + 6;
    const text = `${one.name}: ${one.start_us} to ${one.end_us} µs, micro-batch ${one.microbatch ?? 0}`;
    const kind = `slot batch-${batches.indexOf(one.microbatch ?? 0) % 6}`;
    const room = Math.floor((to - from - 8) / 6.6);
    return svg(
      "g",
      {},
      svg("title", {}, text),
      svg("rect", { class: kind, x: from, y, width: Math.max(1, to - from), height: lane - 10, rx: 3 }),
      room > 2 ? svg("text", { class: "mono slot-name", x: from + 5, y: y + 16 }, one.name.slice(0, room)) : "",
    );
  });
  const height = lanes.length * lane + 30;
  const names = lanes.map((name, i) => svg("text", { class: "mono faint", x: 0, y: i * lane + 22 }, cut(name, 16)));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    const at = left + share * width;
    const text = `${(start + share * (end - start)).toFixed(0)} µs`;
    return [
      svg("path", { class: "tick", d: `M ${at} 2 V ${height - 20}` }),
      svg("text", { class: "faint small", x: at, y: height - 6, "text-anchor": anchor }, text),
    ];
  });
  const drawing = svg(
    "svg",
    { viewBox: `0 0 1000 ${height}`, width: 1000, height, role: "img", "aria-label": "Timeline" },
    ticks.flat(),
    names,
    bars,
  );
  return figure(
    "Timeline",
    `${plural(entries.length, "step")} of ${plural(batches.length, "micro-batch")} on ${plural(lanes.length, "resource")}, ${(end - start).toFixed(1)} µs`,
    drawing,
  );
}

function placementSection() {
  const root = el("section", { id: "placement", "aria-label": "Placement of experts" });
  watch(["g"], () => {
    const layers = Object.entries(chosen().placement ?? {});
    root.hidden = !layers.length;
    root.replaceChildren(
      ...(layers.length
        ? [el("h2", {}, "Placement of experts"), ...layers.map(([layer, loads]) => heatMap(layer, loads))]
        : []),
    );
  });
  return root;
}

/** Rows are ranks, columns experts: `loads[expert][rank]`. */
function heatMap(layer, loads) {
  const ranks = Math.max(...loads.map((row) => row.length));
  const [left, bars] = [64, 120];
  const cell = Math.max(3, Math.min(22, Math.floor(760 / loads.length)));
  const largest = Math.max(...loads.flat(), 1e-9);
  const totals = Array.from({ length: ranks }, (_, rank) => loads.reduce((sum, row) => sum + (row[rank] ?? 0), 0));
  const mean = totals.reduce((a, b) => a + b, 0) / ranks;
  const cells = loads.flatMap((row, expert) =>
    row.map((load, rank) => {
      if (!load) return "";
      const text = `expert ${expert} on rank ${rank}: ${load}`;
      const opacity = (0.12 + (0.88 * load) / largest).toFixed(3);
      return svg(
        "rect",
        { class: "heat", x: left + expert * cell, y: rank * 18, width: cell - 1, height: 17, "fill-opacity": opacity },
        svg("title", {}, text),
      );
    }),
  );
  const end = left + loads.length * cell + 12;
  const sides = totals.map((total, rank) => [
    svg("text", { class: "mono faint", x: 0, y: rank * 18 + 13 }, `rank ${rank}`),
    svg(
      "rect",
      {
        class: "load",
        x: end,
        y: rank * 18 + 4,
        width: Math.max(1, (bars * total) / Math.max(...totals, 1e-9)),
        height: 9,
        rx: 2,
      },
      svg("title", {}, `rank ${rank}: ${total}`),
    ),
  ]);
  const [width, height] = [end + bars, ranks * 18 + 2];
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Loads of ${layer}` },
    svg("rect", { class: "ground", x: left, y: 0, width: loads.length * cell, height }),
    cells,
    sides.flat(),
  );
  const caption = `${plural(loads.length, "expert")} on ${plural(ranks, "rank")}; the fullest rank has ${(Math.max(...totals) / Math.max(mean, 1e-9)).toFixed(2)} of the mean`;
  return figure(layer, caption, drawing);
}
