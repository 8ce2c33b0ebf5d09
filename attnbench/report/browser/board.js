// The leaderboard: which shape and which rows the reader asks for, the table, and what is known of one row.
"use strict";

const PAGE = 300; // rows of the table at a time
const ANY = "all";

addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const families = new Map(data.families.map(([family, day, night]) => [family, { day, night }]));
  const shapes = data.shapes.map(([words, heading, count, machines], number) => ({ number, words, heading, count, machines }));
  const loaded = new Map(); // rows by the number of their shape
  const state = { shape: 0, dtype: ANY, device: ANY, machine: ANY, family: ANY, over: null, text: "", newest: true, show: "speedup",
    sort: null, down: false, limit: PAGE, row: null };
  const place = (id) => document.getElementById(id);

  const kinds = {
    speedup: { name: "Speedup", of: (row) => ({ value: row.ratio, low: row.ratioLow, high: row.ratioHigh }), text: tell.ratio, base: 2, more: true, one: true,
      axis: "Speedup over the baseline" },
    time: { name: "Time", of: (row) => ({ value: row.seconds, low: row.low, high: row.high }), text: tell.seconds, base: 10, axis: "Median time of a call" },
    memory: { name: "Memory", of: (row) => ({ value: row.bytes, low: null, high: null }), text: tell.bytes, base: 2, axis: "Peak memory of a call" },
    error: { name: "Error", of: (row) => ({ value: row.error, low: null, high: null }), text: tell.error, base: 10, axis: "Error against softmax attention" },
  };
  const within = (text, value, low, high) => text(value) + (low === null || high === null ? "" : ` [${text(low)}, ${text(high)}]`);

  function read(row, commands) {
    const [run, plugin, base, dtype, device, threads, ran, command, flags, ...rest] = row;
    const [machine, started, torch, version, asked, source, calibrated, standard] = data.runs[run];
    const [name, family, canonical] = data.plugins[plugin];
    const [seconds, low, high, ratio, ratioLow, ratioHigh, bytes, error] = rest.length === 8 ? rest : Array(8).fill(null);
    const done = rest.length === 8;
    return { run, plugin, base: base === null ? "" : data.plugins[base][0], name, family, canonical, dtype: data.texts[dtype], device: data.texts[device], threads,
      ran: data.texts[ran], command: commands[command], precise: Boolean(flags & 1), emulated: Boolean(flags & 2),
      seconds, low, high, ratio, ratioLow, ratioHigh, bytes, error, status: done ? "ok" : data.texts[rest[0]], reason: done ? "" : data.texts[rest[1]],
      machine, where: data.machines[machine], started, torch, version, asked, source, calibrated, standard,
      looks: { name, ...(families.get(family) ?? families.get("")) } };
  }

  globalThis.arrived = (number, content) => {
    loaded.set(number, content.rows.map((row) => read(row, content.commands)));
    if (number === state.shape) settle();
  };
  function fetched(number) {
    if (loaded.has(number)) return settle();
    place("count").textContent = "Loading …";
    const script = made("script", { src: `data/${number}.js` });
    script.addEventListener("error", () => (place("count").textContent = `data/${number}.js can't be read: the folder data belongs beside this page.`));
    document.head.append(script);
  }

  const FIELD = { machine: "where", over: "base" };

  // What is shown of the shape's rows, without those that a newer run of the same machine stands for.
  function chosen() {
    const rows = loaded.get(state.shape), latest = new Map();
    const key = (row) => [row.machine, row.plugin, row.base, row.dtype, row.device, row.threads].join();
    for (const row of rows) {
      const known = latest.get(key(row));
      if (!known || row.started > known.started || (row.started === known.started && row.run > known.run)) latest.set(key(row), row);
    }
    const words = state.text.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => Object.keys(filters).every((name) => state[name] === ANY || row[FIELD[name] ?? name] === state[name])
      && (!state.newest || latest.get(key(row)).run === row.run)
      && words.every((word) => `${row.canonical} ${row.name} ${row.where} ${row.ran} ${row.source} ${row.status}`.toLowerCase().includes(word));
    return rows.filter(fits);
  }

  const columns = [
    { name: "variant", of: (row) => row.name },
    { name: "speedup", of: (row) => row.ratio, text: (row) => (row.ratio === null ? "-" : within(tell.ratio, row.ratio, row.ratioLow, row.ratioHigh)) },
    { name: "time", of: (row) => row.seconds, text: (row) => (row.seconds === null ? row.status : within(tell.seconds, row.seconds, row.low, row.high)) },
    { name: "machine", of: (row) => row.where },
    { name: "memory", of: (row) => row.bytes, text: (row) => tell.bytes(row.bytes) },
    { name: "error", of: (row) => row.error, text: (row) => tell.error(row.error) },
    { name: "dtype", of: (row) => row.dtype },
    { name: "threads", of: (row) => (row.device === "cpu" ? row.threads : null), text: (row) => (row.device === "cpu" ? String(row.threads) : "-") },
    { name: "over", of: (row) => row.base },
    { name: "what ran", of: (row) => row.ran },
    { name: "measured", of: (row) => row.started, text: (row) => row.started.replace("T", " ") },
  ];
  const at = (name) => columns.findIndex((column) => column.name === name);
  const sorting = () => (state.sort === null ? { by: at(state.show), down: Boolean(kinds[state.show].more) } : { by: state.sort, down: state.down });

  // By a column; what has no value comes last either way.
  function sorted(rows) {
    const { by, down } = sorting(), column = columns[by], sign = down ? -1 : 1;
    const some = (value) => value !== null && value !== "";
    return rows.map((row) => [column.of(row), row]).sort(([a], [b]) => some(b) - some(a) || (a === b ? 0 : sign * (typeof a === "string" ? a.localeCompare(b) : a - b))).map(([, row]) => row);
  }

  function facts(row) {
    const lines = [["machine", row.where], ["inputs", `${row.dtype} on ${row.device}${row.device === "cpu" ? `, ${row.threads} thread${row.threads === 1 ? "" : "s"}` : ""}`]];
    if (row.status !== "ok") lines.push(["status", `${row.status}: ${row.reason}`]);
    if (row.seconds !== null) lines.push(["time", within(tell.seconds, row.seconds, row.low, row.high)]);
    if (row.ratio !== null && row.base) lines.push([`over ${row.base}`, within(tell.ratio, row.ratio, row.ratioLow, row.ratioHigh)]);
    if (row.bytes !== null) lines.push(["peak memory", tell.bytes(row.bytes)]);
    if (row.error !== null) lines.push(["error", tell.error(row.error)]);
    if (row.emulated) lines.push(["emulated", "its time is not the variant's own"]);
    if (row.status === "ok" && !row.precise) lines.push(["precision", "less than was asked for"]);
    if (row.ran) lines.push(["what ran", row.ran]);
    return { title: row.name, lines };
  }

  function about(row) {
    state.row = row;
    const { title, lines } = facts(row), box = place("about");
    const all = [["variant", row.canonical], ...lines, ["measured", row.started.replace("T", " ")], ["torch", row.torch || "not known"], ["version", row.version || "not known"],
      ["calibrated", row.calibrated ? "yes: rates above the machine's ceilings would be wrong" : "no"], ["run", row.asked], ["file", row.source]];
    const copy = made("button", { type: "button", onclick: () => navigator.clipboard?.writeText(row.command).then(() => (copy.textContent = "Copied")) }, "Copy the command");
    const close = made("button", { type: "button", onclick: () => { box.hidden = true; state.row = null; table(); } }, "Close");
    box.replaceChildren(made("h2", { id: "about-title" }, title), made("dl", {}, ...all.flatMap(([name, text]) => [made("dt", {}, name), made("dd", {}, text)])),
      made("pre", {}, row.command), copy, " ", close);
    box.hidden = false;
    table();
  }

  let rows = [];
  function table() {
    const body = document.querySelector("#board tbody");
    body.replaceChildren(...rows.slice(0, state.limit).map((row) => {
      const cells = columns.map((column) => made("td", {}, (column.text ?? ((each) => String(column.of(each) ?? "-")))(row)));
      cells[0].replaceChildren(made("button", { type: "button", class: "pick", onclick: () => { about(row); place("about").scrollIntoView({ block: "nearest" }); } }, row.name));
      if (!row.precise && row.status === "ok") cells[at("speedup")].append(" *");
      if (row.status !== "ok") cells[at("time")].title = row.reason;
      return made("tr", row === state.row ? { "aria-selected": "true" } : {}, ...cells);
    }));
    place("more").hidden = rows.length <= state.limit;
    const { by, down } = sorting();
    [...document.querySelector("#board thead").rows[0].cells].forEach((head, i) => {
      head.removeAttribute("aria-sort");
      if (i === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  }

  const draw = makeStrip(place("chart"), facts, about);
  function settle() {
    const shape = shapes[state.shape], all = loaded.get(state.shape);
    options(all);
    const some = chosen();
    rows = sorted(some);
    const machines = new Set(some.map((row) => row.machine)).size, missing = some.filter((row) => row.seconds === null).length;
    place("heading").textContent = shape.heading;
    place("count").textContent = `${some.length} of ${all.length} rows, ${machines} machine${machines === 1 ? "" : "s"}`
      + (missing ? `; ${missing} without a number, which come last` : "") + `. ${[...new Set(some.map((row) => row.dtype))].sort().join(" and ")}. * less precise than asked.`;
    draw(rows.filter((row) => row.seconds !== null), kinds[state.show]);
    table();
  }

  // Controls: of the shape, then of its rows.
  const labelled = (name, control) => made("label", {}, made("span", {}, name), control);
  const sized = (word) => { const found = /^([\d.]+)([kM]?)/.exec(word); return found ? Number(found[1]) * { k: 1024, M: 2 ** 20 }[found[2] || "k"] / (found[2] ? 1 : 1024) : 0; };
  const pickers = data.choices.map((name, i) => {
    const words = [...new Set(shapes.map((shape) => shape.words[i]))];
    if (name === "length") words.sort((a, b) => sized(a) - sized(b) || a.localeCompare(b));
    const control = made("select", { onchange: () => go(nearest(i, control.value)) }, ...words.map((word) => made("option", { value: word }, word)));
    place("of-shape").append(labelled(name, control));
    return control;
  });
  // The shape that has this word and otherwise as many of the present ones as there is one.
  function nearest(choice, word) {
    const now = shapes[state.shape].words, able = shapes.filter((shape) => shape.words[choice] === word);
    return d3.greatest(able, (shape) => d3.sum(shape.words, (each, i) => each === now[i]) + 1 - shape.number / shapes.length).number;
  }
  function go(number) {
    Object.assign(state, { shape: number, limit: PAGE, row: null });
    place("about").hidden = true;
    pickers.forEach((control, i) => (control.value = shapes[number].words[i]));
    fetched(number);
  }
  const again = () => { state.limit = PAGE; settle(); };
  const filters = {};
  const rowControls = place("of-rows");
  const show = made("select", { onchange: () => { state.show = show.value; state.sort = null; again(); } }, ...Object.entries(kinds).map(([key, { name }]) => made("option", { value: key }, name)));
  rowControls.append(labelled("show", show));
  for (const name of ["over", "dtype", "device", "machine", "family"]) {
    filters[name] = made("select", { onchange: () => { state[name] = filters[name].value; again(); } });
    rowControls.append(labelled(name, filters[name]));
  }
  // What the rows of a shape have; a choice that none has is given up.
  function options(all) {
    for (const [name, control] of Object.entries(filters)) {
      const own = all.map((row) => row[FIELD[name] ?? name]).filter(Boolean), values = [...new Set(own)].sort((a, b) => a.localeCompare(b));
      // Speedups over different baselines do not belong beside each other unless the reader says so.
      if (state[name] !== ANY && !values.includes(state[name])) state[name] = name === "over" ? d3.mode(own) ?? ANY : ANY;
      control.replaceChildren(...[ANY, ...values].map((value) => made("option", { value }, value)));
      control.value = state[name];
    }
  }
  const text = made("input", { type: "search", placeholder: "variant, machine, file …", oninput: () => { state.text = text.value; again(); } });
  const newest = made("input", { type: "checkbox", checked: true, onchange: () => { state.newest = newest.checked; again(); } });
  rowControls.append(labelled("find", text), made("label", { class: "check" }, newest, made("span", {}, "newest run of each machine")));

  document.querySelector("#board thead").append(made("tr", {}, ...columns.map(({ name }, i) =>
    made("th", { scope: "col" }, made("button", { type: "button", class: "sort", onclick: () => {
      const { by, down } = sorting();
      Object.assign(state, { sort: i, down: by === i ? !down : ["speedup", "measured"].includes(name) });
      again();
    } }, name)))));
  place("more").addEventListener("click", () => { state.limit += PAGE; table(); });
  let last = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== last && loaded.has(state.shape)) { last = innerWidth; settle(); } });
  if (shapes.length) go(0);
});
