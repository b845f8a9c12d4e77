// The page: what can be seen at once is drawn at once, the graphs when the browser has shown it.

readHash();
const early = [header(), siteSection(), passTable(), scheduleSection(), placementSection()];
document.getElementById("page").replaceChildren(...early);
document.title = `dscompile report: ${report.directory}`;
draw();
performance.mark("first-table");

setTimeout(() => {
  const known = watchers.length;
  document.getElementById("page").append(graphSection(), sourceSection());
  for (const { keys, redraw } of watchers.slice(known))
    redraw(keys.filter((key) => state[key] !== undefined || key === "g"));
  performance.mark("graphs");
});

window.addEventListener("hashchange", () => {
  readHash();
  draw();
});
window.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input, select, textarea")) {
    event.preventDefault();
    document.querySelector("#sites input[type=search]").focus();
  }
});
