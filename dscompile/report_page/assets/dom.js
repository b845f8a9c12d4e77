// Elements, made with text only: nothing in this page is ever parsed as markup.

/** An element with attributes; `on` holds listeners, strings among the children become text. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== undefined && value !== null && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** A number as short as it can be without saying something else: six digits. */
function rounded(text) {
  return /^-?\d+\.\d{6,}$/.test(text) ? String(Number(Number(text).toPrecision(6))) : text;
}

/** Microseconds, milliseconds or seconds, whichever reads best. */
function duration(seconds) {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(1)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(1)} ms`;
  return `${seconds.toFixed(2)} s`;
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;
}

/** A name of Dynamo's, shortened to what a reader knows: `layers.0.mlp.gate.weight`. */
function short(name) {
  const path = name.match(/^l_(?:self|fn|args_\d+)_+modules_(.+?)_?$/);
  return path ? path[1].replace(/_(?:modules|parameters|buffers)_/g, ".").replace(/^model\./, "") : name;
}
