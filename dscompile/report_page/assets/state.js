// What is chosen on the page lives in the URL's hash, so that a link shows the same again.

const state = {};
const watchers = [];

function readHash() {
  for (const key of Object.keys(state)) delete state[key];
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) state[key] = value;
}

/** The hash of the present state with some values changed; empty ones are left out. */
function hashWith(changes) {
  const kept = Object.entries({ ...state, ...changes }).filter(([, value]) => value !== "" && value !== undefined);
  return `#${new URLSearchParams(kept)}`;
}

/** Changes some values and draws what depends on them. */
function choose(changes) {
  history.replaceState(null, "", hashWith(changes));
  readHash();
  draw(Object.keys(changes));
}

/** A link to another state: it can be copied, and opened in another window. */
function link(changes, attributes, ...children) {
  const go = (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    choose(changes);
  };
  return el("a", { href: hashWith(changes), ...attributes, on: { click: go } }, ...children);
}

/** `redraw(changed)` is called when one of `keys` changed; all of them after the hash was edited. */
function watch(keys, redraw) {
  watchers.push({ keys, redraw });
}

function draw(changed) {
  const focused = document.activeElement?.dataset?.key;
  for (const { keys, redraw } of watchers) {
    if (!changed || keys.some((key) => changed.includes(key))) redraw(changed ?? keys);
  }
  if (focused && document.activeElement?.dataset?.key !== focused) {
    document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }
}
