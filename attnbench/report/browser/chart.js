// The chart: lines against length that are named at their ends, points to point at or to walk through by arrow keys.
"use strict";

const SYMBOLS = ["symbolCircle", "symbolSquare", "symbolTriangle", "symbolDiamond", "symbolStar", "symbolWye", "symbolCross"];

// Ticks of a logarithmic scale: powers of the base, fewer of them or some between until there are three to eight.
function logTicks(scale, base) {
  const [low, high] = scale.domain().map((value) => Math.log(value) / Math.log(base));
  const powers = d3.range(Math.ceil(low), Math.floor(high) + 1), stride = Math.ceil(powers.length / 8);
  if (powers.length >= 3) return powers.filter((power) => power % stride === 0).map((power) => base ** power);
  const some = d3.range(Math.floor(low) - 1, Math.ceil(high) + 1).flatMap((power) => (base === 2 ? [1, 1.5] : [1, 2, 5]).map((n) => n * base ** power));
  const within = some.filter((value) => value >= scale.domain()[0] && value <= scale.domain()[1]);
  return within.length >= 2 ? within : scale.ticks(4);
}

// Heights at least `step` apart, in their order, near to where they were, and not below `last`.
function apart(heights, step, last) {
  const order = d3.range(heights.length).sort((a, b) => heights[a] - heights[b]), placed = [...heights];
  for (let round = 0; round < 200; round++) {
    let moved = false;
    for (const [one, other] of d3.pairs(order)) {
      const lack = step - (placed[other] - placed[one]);
      if (lack > 0.1) { placed[one] -= lack / 2; placed[other] += lack / 2; moved = true; }
    }
    const over = placed[order[order.length - 1]] - last;
    if (over > 0.1) { placed[order[order.length - 1]] -= over; moved = true; }
    if (!moved) break;
  }
  return placed;
}

// A function that draws what it is given into `holder`. facts: what is told of a row.
function makeChart(holder, plugins, facts) {
  const tip = made("div", { id: "tip", role: "status", hidden: true });
  const picture = made("div", { id: "picture" });
  holder.append(picture, tip);
  let pinned = false, points = [], now = null;
  const hide = () => { pinned = false; tip.hidden = true; mark(null); };

  function tellOf(point, pin = false) {
    const { title, lines, command } = facts(point.row);
    const copy = made("button", { type: "button", onclick: () => navigator.clipboard?.writeText(command).then(() => (copy.textContent = "Copied")) }, "Copy the command");
    tip.replaceChildren(made("strong", {}, title), made("dl", {}, ...lines.flatMap(([name, text]) => [made("dt", {}, name), made("dd", {}, text)])),
      made("code", {}, command), ...(pin ? [copy] : []));
    tip.hidden = false;
    tip.classList.toggle("pinned", pin);
    pinned = pin;
    const room = holder.clientWidth - tip.offsetWidth, right = point.x + 16;
    tip.style.left = `${Math.max(0, right <= room ? right : Math.min(room, point.x - tip.offsetWidth - 16))}px`;
    const above = point.y - tip.offsetHeight - 14;
    tip.style.top = `${point.y > holder.clientHeight / 2 && above > -120 ? above : point.y + 16}px`;
    mark(point);
  }

  function mark(point) {
    now = point;
    d3.select(picture).select("svg").classed("marked", Boolean(point)).selectAll("g.series")
      .classed("on", (series) => Boolean(point) && series.plugin === point.row.plugin);
  }

  function walk(event) {
    if (event.key === "Escape") return hide();
    const at = points.find((point) => point.node === event.target);
    if (!at) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tellOf(at, true); return tip.querySelector("button").focus(); }
    const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key], across = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!along && !across) return;
    event.preventDefault();
    const others = points.filter((point) => (along ? point.row.plugin === at.row.plugin : point.row.length === at.row.length));
    others.sort((a, b) => (along ? a.x - b.x : a.y - b.y));
    const next = others[others.indexOf(at) + (along ?? across)];
    if (!next) return;
    at.node.setAttribute("tabindex", -1);
    next.node.setAttribute("tabindex", 0);
    next.node.focus();
  }

  function nearest(event) {
    const [x, y] = d3.pointer(event, picture);
    const best = d3.least(points, (point) => Math.hypot(point.x - x, point.y - y));
    return best && Math.hypot(best.x - x, best.y - y) < 40 ? best : null;
  }

  picture.addEventListener("pointermove", (event) => {
    if (pinned) return;
    const point = nearest(event);
    if (point && point !== now) tellOf(point);
    if (!point && now) hide();
  });
  picture.addEventListener("pointerleave", () => !pinned && hide());
  picture.addEventListener("click", (event) => { const point = nearest(event); point ? tellOf(point, true) : hide(); });
  tip.addEventListener("keydown", (event) => { if (event.key === "Escape") { const node = now?.node; node?.focus(); hide(); } });

  return function draw({ series, kind, log, axis, length, ticks, one }) {
    hide();
    points = [];
    if (!series.length) return picture.replaceChildren(made("p", { class: "dim" }, "Nothing here has a number of this kind."));
    const dark = theme.isDark && !matchMedia("print").matches;
    const colour = (plugin) => plugins[plugin][dark ? "night" : "day"];
    const width = Math.max(280, picture.clientWidth || 640), narrow = width < 520;
    const edge = { top: 26, right: narrow ? 92 : 128, bottom: 44, left: narrow ? 54 : 66 };
    const height = Math.max(narrow ? 340 : 420, 17 * series.length + edge.top + edge.bottom);
    const svg = d3.create("svg").attr("width", width).attr("height", height).attr("role", "group")
      .attr("aria-label", `${kind.axis()} against ${axis}; arrow keys walk from point to point`).on("keydown", walk);
    const values = series.flatMap((each) => each.points.flatMap((point) => [point.value, ...(log ? [point.low, point.high] : [])])).filter((value) => value > 0);
    if (one) values.push(1);
    const [least, most] = d3.extent(values), first = d3.min(ticks), last = d3.max(ticks);
    const x = (log ? d3.scaleLog().base(2) : d3.scaleLinear()).domain(log ? [first / 1.15, last * 1.1] : [0, last * 1.03]).range([edge.left, width - edge.right]);
    const spread = Math.max((most / least) ** 0.05, 1.05);
    const y = (log ? d3.scaleLog().base(kind.base) : d3.scaleLinear()).domain(log ? [least / spread, most * spread] : [0, most * 1.05]).range([height - edge.bottom, edge.top]);
    const heights = log ? logTicks(y, kind.base) : y.ticks(6);
    axes(svg, { x, y, edge, width, height, ticks: thinned(ticks, x), heights, text: kind.text });
    svg.append("text").attr("class", "label").attr("x", 4).attr("y", 12).text(`${kind.axis()}: ${kind.better}`);
    svg.append("text").attr("class", "label").attr("x", (edge.left + width - edge.right) / 2).attr("y", height - 6).attr("text-anchor", "middle").text(`${axis} (tokens)`);
    if (one) svg.append("line").attr("class", "one").attr("x1", edge.left).attr("x2", width - edge.right).attr("y1", y(1)).attr("y2", y(1));
    if (length >= x.domain()[0]) svg.append("line").attr("class", "chosen").attr("x1", x(length)).attr("x2", x(length)).attr("y1", edge.top).attr("y2", height - edge.bottom);
    const groups = svg.selectAll("g.series").data(series).join("g").attr("class", "series").style("color", (each) => colour(each.plugin));
    groups.each(function (each) { points.push(...lineOf(d3.select(this), each, { x, y, floor: height - edge.bottom, plugins, kind })); });
    names(groups, series, { x, y, edge, width, height, plugins });
    points.forEach((point, i) => {
      point.node.setAttribute("tabindex", i ? -1 : 0);
      point.node.addEventListener("focus", () => tellOf(point));
      point.node.addEventListener("blur", () => !pinned && hide());
    });
    picture.replaceChildren(svg.node());
  };
}

function thinned(ticks, x) {
  const kept = [];
  for (const tick of [...ticks].sort((a, b) => b - a)) if (!kept.length || x(kept[kept.length - 1]) - x(tick) >= 34) kept.push(tick);
  return kept;
}

function axes(svg, { x, y, edge, width, height, ticks, heights, text }) {
  const across = svg.append("g").attr("class", "axis").selectAll("g").data(heights).join("g").attr("transform", (value) => `translate(0,${y(value)})`);
  across.append("line").attr("x1", edge.left).attr("x2", width - edge.right);
  across.append("text").attr("x", edge.left - 8).attr("dy", "0.32em").attr("text-anchor", "end").text((value) => tell.tick(text(value)));
  const along = svg.append("g").attr("class", "axis").selectAll("g").data(ticks).join("g").attr("transform", (value) => `translate(${x(value)},0)`);
  along.append("line").attr("y1", edge.top).attr("y2", height - edge.bottom);
  along.append("text").attr("y", height - edge.bottom + 16).attr("text-anchor", "middle").text(tell.length);
}

// One variant: its line (dashed if emulated), intervals, and points (hollow if less precise than asked).
function lineOf(group, { plugin, points }, { x, y, floor, plugins, kind }) {
  const at = (value) => Math.min(floor, y(value));
  const line = d3.line((point) => x(point.row.length), (point) => y(point.value));
  const sure = points.filter((point) => point.low > 0 && point.high > 0);
  group.append("path").attr("class", "band").attr("d", d3.area((point) => x(point.row.length), (point) => at(point.low), (point) => at(point.high))(sure));
  group.append("path").attr("class", "line").attr("d", line(points)).attr("stroke-dasharray", points.some((point) => point.row.emulated) ? "6 4" : null);
  group.selectAll("line.interval").data(sure).join("line").attr("class", "interval")
    .attr("x1", (point) => x(point.row.length)).attr("x2", (point) => x(point.row.length)).attr("y1", (point) => at(point.low)).attr("y2", (point) => at(point.high));
  const shape = d3.symbol(d3[SYMBOLS[plugin % SYMBOLS.length]], 52)();
  const marks = group.selectAll("path.point").data(points).join("path").attr("d", shape).attr("role", "img")
    .attr("class", (point) => (point.row.precise || !sure.length ? "point" : "point loose"))
    .attr("transform", (point) => `translate(${x(point.row.length)},${y(point.value)})`)
    .attr("aria-label", (point) => `${plugins[plugin].name} at ${tell.length(point.row.length)}: ${kind.text(point.value)}${point.low === null ? "" : ` [${kind.text(point.low)}, ${kind.text(point.high)}]`}`);
  return marks.nodes().map((node, i) => ({ node, row: points[i].row, x: x(points[i].row.length), y: y(points[i].value) }));
}

// Names at the ends of lines, apart from each other, each joined to its line's last point.
function names(groups, series, { x, y, edge, width, height, plugins }) {
  const ends = series.map(({ points }) => d3.greatest(points, (point) => point.row.length));
  const places = apart(ends.map((end) => y(end.value)), 15, height - edge.bottom);
  const left = width - edge.right + 16, room = Math.floor((edge.right - 18) / 6.4);
  groups.each(function ({ plugin }, i) {
    const name = plugins[plugin].name, short = name.length > room ? `${name.slice(0, room - 1)}…` : name;
    d3.select(this).append("path").attr("class", "leader").attr("d", `M${x(ends[i].row.length) + 6},${y(ends[i].value)}L${left - 3},${places[i]}`);
    d3.select(this).append("text").attr("class", "name").attr("x", left).attr("y", places[i]).attr("dy", "0.32em").text(short);
  });
}
