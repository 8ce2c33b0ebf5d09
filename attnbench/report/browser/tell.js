// Numbers as people read them, and a few words for making elements: what the other scripts of the page share.
"use strict";

const scaled = (value, steps) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  const [factor, unit] = steps.find(([size]) => Math.abs(value) >= size * 0.9995) || steps[steps.length - 1];
  const number = value / factor;
  return Number(number.toPrecision(3)).toString() + unit;
};
const SECONDS = [[1, " s"], [1e-3, " ms"], [1e-6, " µs"], [1e-9, " ns"]];
const BYTES = [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"], [1, " B"]];
const tell = {
  seconds: (value) => scaled(value, SECONDS),
  bytes: (value) => scaled(value, BYTES),
  ratio: (value) => scaled(value, [[1, "x"]]),
  error: (value) => (value === null ? "-" : value >= 1e-3 ? String(Number(value.toPrecision(2))) : value.toExponential(1)),
  length: (value) => {
    for (const [unit, name] of [[2 ** 20, "M"], [2 ** 10, "k"]])
      if (value >= unit && value % (unit / 2) === 0) return value / unit + name;
    return String(value);
  },
};

// An element with attributes (on...: what it does) and children; text is text, whatever it holds.
function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
