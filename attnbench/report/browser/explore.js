// What the reader chose, who is the fastest there, and the controls; chart.js draws.
"use strict";

addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const commands = [...document.querySelectorAll("pre.commands")].map((pre) =>
    pre.textContent.split(/\n(?=# )/).map((entry) => entry.slice(entry.indexOf("\n") + 1)),
  );
  const plugins = data.plugins.map(([name, family, day, night]) => ({ name, family, day, night }));
  const panels = data.panels.map((panel, at) => ({ ...panel, rows: panel.rows.map((row, i) => read(row, commands[at][i])) }));
  if (!panels.some((panel) => panel.rows.some((row) => row.seconds !== null))) return;

  function read(row, command) {
    const [plugin, length, seconds, low, high, ratio, ratioLow, ratioHigh, bytes, error, flags, status, reason] = row;
    const told = { precise: Boolean(flags & 1), emulated: Boolean(flags & 2), status: status ?? "ok", reason, command };
    return { plugin, length, seconds, low, high, ratio, ratioLow, ratioHigh, bytes, error, ...told };
  }

  const state = { panel: panels.findIndex((panel) => panel.rows.some((row) => row.seconds !== null)), show: "speedup",
    baseline: null, log: true, length: null, off: new Set() };

  // What the chart can show: a row's value with its interval, its text, and what the axis says.
  const panel = () => panels[state.panel];
  const paired = () => state.baseline === panel().baseline;
  const baseName = () => (state.baseline === null ? "no baseline" : plugins[state.baseline].name);
  function speedup(row) {
    if (paired()) return { value: row.ratio, low: row.ratioLow, high: row.ratioHigh };
    const base = panel().rows.find((other) => other.plugin === state.baseline && other.length === row.length);
    return { value: base?.seconds && row.seconds ? base.seconds / row.seconds : null, low: null, high: null };
  }
  const kinds = {
    speedup: { name: "Speedup", of: speedup, text: tell.ratio, base: 2, better: "higher is faster",
      axis: () => `speedup over ${baseName()}${paired() ? "" : " (unpaired)"}` },
    time: { name: "Time", of: (row) => ({ value: row.seconds, low: row.low, high: row.high }), text: tell.seconds, base: 10,
      better: "lower is faster", axis: () => "median time of a call" },
    memory: { name: "Memory", of: (row) => ({ value: row.bytes, low: null, high: null }), text: tell.bytes, base: 2,
      better: "lower is leaner", axis: () => "peak memory of a call" },
    error: { name: "Error", of: (row) => ({ value: row.error, low: null, high: null }), text: tell.error, base: 10,
      better: "lower is closer to softmax attention", axis: () => "error against softmax attention" },
  };

  const interval = (text, { low, high }) => (low === null || high === null ? "" : ` [${text(low)}, ${text(high)}]`);

  // What is told of a row under the pointer.
  function facts(row) {
    const over = speedup(row);
    const lines = [["time", tell.seconds(row.seconds) + interval(tell.seconds, row)]];
    if (row.plugin !== state.baseline && over.value !== null)
      lines.push([`over ${baseName()}`, tell.ratio(over.value) + (paired() ? interval(tell.ratio, over) : " (unpaired, no interval)")]);
    if (row.bytes !== null) lines.push(["peak memory", tell.bytes(row.bytes)]);
    if (row.error !== null) lines.push(["error", tell.error(row.error)]);
    if (row.emulated) lines.push(["emulated", "its time is not the variant's own"]);
    if (!row.precise) lines.push(["precision", "less than was asked for"]);
    return { title: `${plugins[row.plugin].name} at ${tell.length(row.length)}`, lines, command: row.command };
  }

  const shown = () => panel().rows.filter((row) => !state.off.has(plugins[row.plugin].family));
  const chart = makeChart(document.getElementById("chart"), plugins, facts);

  function settle() {
    const rows = panel().rows, has = new Set(rows.filter((row) => row.seconds !== null).map((row) => row.plugin));
    if (state.baseline === null || !has.has(state.baseline)) state.baseline = has.has(panel().baseline) ? panel().baseline : [...has][0] ?? null;
    const lengths = [...new Set(rows.filter((row) => row.seconds !== null).map((row) => row.length))];
    if (!lengths.includes(state.length)) {
      const sure = rows.filter((row) => row.ratioLow !== null && row.plugin !== panel().baseline).map((row) => row.length);
      state.length = Math.max(...(sure.length ? sure : lengths));
    }
    return { has, lengths: [...lengths].sort((a, b) => a - b) };
  }

  function render() {
    const { has, lengths } = settle(), kind = kinds[state.show];
    fillControls(has);
    const series = [...has].filter((plugin) => !state.off.has(plugins[plugin].family)).map((plugin) => ({
      plugin,
      points: shown().filter((row) => row.plugin === plugin && kind.of(row).value > 0).map((row) => ({ row, ...kind.of(row) })),
    }));
    chart({ series: series.filter((each) => each.points.length), kind, log: state.log, axis: panel().axis, length: state.length,
      ticks: [...new Set(panel().rows.map((row) => row.length))], one: state.show === "speedup" });
    rank(lengths);
    gone();
    document.getElementById("paired").textContent = paired() || state.baseline === null ? "" :
      `Unpaired: the run measured in pairs with ${panel().baseline === null ? "no one baseline" : plugins[panel().baseline].name}. ` +
      `Over ${baseName()} this is a ratio of two medians, without an interval.`;
  }

  // The variants at one length, fastest first, and the verdict above them.
  function rank(lengths) {
    const at = shown().filter((row) => row.length === state.length && row.seconds !== null);
    const worth = (row) => speedup(row).value ?? 1 / row.seconds;
    at.sort((a, b) => worth(b) - worth(a));
    const exact = at.find((row) => plugins[row.plugin].family === "exact");
    const said = (row) => {
      const over = speedup(row), name = made("strong", {}, plugins[row.plugin].name);
      const error = plugins[row.plugin].family === "exact" || row.error === null ? "" : `, error ${tell.error(row.error)}`;
      return [name, ` ${over.value === null || row.plugin === state.baseline ? tell.seconds(row.seconds) : `${tell.ratio(over.value)} ${baseName()}`}${error}`];
    };
    const verdict = document.getElementById("winner");
    verdict.replaceChildren();
    if (at.length) verdict.append(`Fastest at ${tell.length(state.length)}: `, ...said(at[0]));
    if (exact && exact !== at[0]) verdict.append("; of the exact: ", ...said(exact));
    const most = Math.max(...at.map(worth));
    document.getElementById("rank").replaceChildren(...at.map((row) => {
      const over = speedup(row), plugin = plugins[row.plugin];
      const bar = made("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${(100 * worth(row)) / most}%`;
      bar.style.setProperty("--day", plugin.day);
      bar.style.setProperty("--night", plugin.night);
      const value = over.value === null ? tell.seconds(row.seconds) : tell.ratio(over.value);
      return made("li", {}, made("span", { class: "who" }, plugin.name, row.emulated ? " (emulated)" : ""), made("span", { class: "value" }, value), bar);
    }));
    const choose = document.getElementById("lengths");
    choose.replaceChildren(made("legend", {}, `${panel().axis[0].toUpperCase()}${panel().axis.slice(1)}`), ...lengths.map((length) =>
      made("label", {}, made("input", { type: "radio", name: "length", value: length, checked: length === state.length,
        onchange: () => { state.length = length; render(); choose.querySelector(":checked")?.focus(); } }), made("span", {}, tell.length(length)))));
  }

  function gone() {
    const lost = d3.groups(panel().rows.filter((row) => row.seconds === null), (row) => row.plugin, (row) => `${row.status}${row.reason ? `: ${row.reason}` : ""}`);
    const all = new Set(panel().rows.map((row) => row.length)).size;
    const told = lost.flatMap(([plugin, why]) => why.map(([reason, rows]) =>
      `${plugins[plugin].name}${rows.length === all ? "" : ` at ${rows.map((row) => tell.length(row.length)).join(", ")}`} (${reason})`));
    document.getElementById("gone").textContent = told.length ? `No number: ${told.join("; ")}.` : "";
  }

  // Controls: each select keeps what it can of the other choices.
  const controls = document.getElementById("controls"), families = document.getElementById("families");
  function select(label, options, value, onchange) {
    const element = made("select", { onchange: (event) => { onchange(event.target.value); render(); }, disabled: options.length < 2 },
      ...options.map(([key, text]) => made("option", { value: key, selected: String(key) === String(value) }, text)));
    return made("label", { "data-choice": label }, made("span", {}, label), element);
  }
  function toPanel(name, word) {
    const agrees = (one) => data.choices.filter((each) => each !== name && one.words[each] === panel().words[each]).length;
    const fitting = panels.map((one, i) => [agrees(one), i]).filter(([, i]) => panels[i].words[name] === word);
    state.panel = fitting.sort((a, b) => b[0] - a[0] || a[1] - b[1])[0][1];
    state.baseline = null;
  }
  function fillControls(has) {
    const held = document.activeElement?.closest("[data-choice]")?.dataset.choice;
    controls.replaceChildren(
      select("show", Object.entries(kinds).map(([key, { name }]) => [key, name]), state.show, (key) => (state.show = key)),
      select("baseline", [...has].map((plugin) => [plugin, plugins[plugin].name + (plugin === panel().baseline ? " (the run's)" : "")]),
        state.baseline, (plugin) => (state.baseline = Number(plugin))),
      ...data.choices.map((name) => select(name, [...new Set(panels.map((one) => one.words[name]))].map((word) => [word, word]),
        panel().words[name], (word) => toPanel(name, word))),
      select("scale", [["log", "logarithmic"], ["linear", "linear"]], state.log ? "log" : "linear", (key) => (state.log = key === "log")),
    );
    if (held) controls.querySelector(`[data-choice="${held}"] select`)?.focus();
    const present = new Set([...has].map((plugin) => plugins[plugin].family));
    if (families.childElementCount) return;
    families.append(made("legend", { class: "unseen" }, "Families shown"), ...data.families.filter(([name]) => name && plugins.some((plugin) => plugin.family === name)).map(([name, day, night]) => {
      const swatch = made("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--day", day);
      swatch.style.setProperty("--night", night);
      return made("label", {}, made("input", { type: "checkbox", checked: true, value: name, disabled: present.size < 2 && present.has(name),
        onchange: (event) => { state.off[event.target.checked ? "delete" : "add"](name); render(); } }), swatch, name);
    }));
  }

  document.getElementById("explore").hidden = false;
  document.getElementById("to-explore").hidden = false;
  render();
  addEventListener("theme", render);
  for (const event of ["beforeprint", "afterprint"]) addEventListener(event, render);
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now !== width) render();
    width = now;
  }).observe(document.getElementById("chart"));
});
