// Numbers as people read them, and a few words for making elements: what the other scripts of the page share.
"use strict";

// As report/units.py: three digits, and zeros at the end where they are digits that are known.
const decimals = (number, digits) => (number ? Math.min(Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(number))), 0), 9) : digits - 1);
const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);
const scaled = (value, steps) => {
  if (!isKnown(value)) return "-";
  const [factor, unit] = steps.find(([size]) => Math.abs(value) >= size * 0.9995) || steps[steps.length - 1];
  const number = value / factor;
  return number.toFixed(decimals(Number(number.toPrecision(3)), 3)) + unit;
};
const SECONDS = [[1, " s"], [1e-3, " ms"], [1e-6, " µs"], [1e-9, " ns"]];
const BYTES = [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"]];
const tell = {
  seconds: (value) => (value === 0 ? "0 s" : scaled(value, SECONDS)),
  bytes: (value) => (isKnown(value) && Math.abs(value) < 1024 ? `${value.toFixed(0)} B` : scaled(value, BYTES)),
  ratio: (value) => (value === 1 ? "1x" : scaled(value, [[1, "x"]])),
  error: (value) => {
    if (!isKnown(value)) return "-";
    if (value === 0) return "0";
    return Math.abs(value) >= 1e-3 ? value.toFixed(decimals(value, 2)) : value.toExponential(1);
  },
  // Of an axis, whose numbers are exact: without zeros at the end.
  tick: (text) => text.replace(/\.(\d*?)0+(?!\d)/, (_, kept) => (kept ? `.${kept}` : "")),
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
