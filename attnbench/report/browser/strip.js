// The picture of the leaderboard: a lane a variant, a dot a row, on a logarithmic axis.
"use strict";

const MOST_DOTS = 3000, LANE = 26;

// A function that draws rows into `holder`. facts: what is told of a row; pick: what a click on one does.
function makeStrip(holder, facts, pick) {
  const tip = made("div", { id: "tip", role: "status", hidden: true });
  const picture = made("div", { id: "picture" });
  holder.append(picture, tip);

  function told(event, row) {
    const { title, lines } = facts(row);
    tip.replaceChildren(made("strong", {}, title), made("dl", {}, ...lines.slice(0, 7).flatMap(([name, text]) => [made("dt", {}, name), made("dd", {}, text)])));
    tip.hidden = false;
    const [x, y] = d3.pointer(event, holder), room = holder.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, x + 16 <= room ? x + 16 : x - tip.offsetWidth - 16))}px`;
    tip.style.top = `${y + 18}px`;
    d3.select(picture).select("svg").classed("dim", true).selectAll(".dot").classed("same", (other) => other.machine === row.machine && other.dtype === row.dtype);
  }
  function hide() {
    tip.hidden = true;
    d3.select(picture).select("svg").classed("dim", false).selectAll(".dot").classed("same", false);
  }

  // rows: with a number. kind: its `of`, `text`, `axis`, `base` and whether `more` is better.
  return function draw(rows, kind) {
    hide();
    picture.replaceChildren();
    const all = rows.filter((row) => kind.of(row).value > 0);
    const shown = all.slice(0, MOST_DOTS);
    if (!shown.length) return;
    const width = holder.clientWidth, wide = width > 720, left = wide ? 280 : 8, lane = wide ? LANE : LANE + 14;
    const best = (own) => (kind.more ? -1 : 1) * (kind.more ? d3.max : d3.min)(own, (row) => kind.of(row).value);
    const lanes = d3.sort(d3.groups(shown, (row) => row.plugin), ([, own]) => best(own));
    const ends = shown.flatMap((row) => { const { value, low, high } = kind.of(row); return [value, low > 0 ? low : value, high ?? value]; });
    const span = [d3.min(ends), d3.max(ends)], x = d3.scaleLog(span[0] === span[1] ? [span[0] / 2, span[0] * 2] : span, [left + 8, width - 14]);
    const height = 26 + lanes.length * lane + 8, y = (i) => 26 + i * lane + (wide ? lane / 2 : lane - 11);
    const svg = d3.select(picture).append("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("width", width).attr("height", height)
      .attr("role", "img").attr("aria-label", `${kind.axis}, a lane a variant, a dot a row; the table below has the numbers`);
    const axis = svg.append("g").attr("class", "axis");
    let last = -Infinity;
    for (const tick of logTicks(x, kind.base)) {
      axis.append("line").attr("x1", x(tick)).attr("x2", x(tick)).attr("y1", 22).attr("y2", height);
      if (x(tick) - last < 44) continue;
      last = x(tick);
      axis.append("text").attr("x", Math.min(x(tick), width - 16)).attr("y", 15).attr("text-anchor", "middle").text(tell.tick(kind.text(tick)));
    }
    if (kind.one && span[0] < 1 && span[1] > 1) svg.append("line").attr("class", "one").attr("x1", x(1)).attr("x2", x(1)).attr("y1", 22).attr("y2", height);
    lanes.forEach(([, own], i) => {
      const { name, day, night } = own[0].looks;
      const group = svg.append("g").attr("class", "lane").attr("style", `--day: ${day}; --night: ${night}`);
      group.append("text").attr("class", "name").attr("x", wide ? left - 6 : left).attr("y", wide ? y(i) + 4 : y(i) - 13).attr("text-anchor", wide ? "end" : "start").text(name);
      for (const row of own) {
        const { low, high } = kind.of(row);
        if (low > 0 && high !== null) group.append("line").attr("class", "interval").attr("x1", x(low)).attr("x2", x(high)).attr("y1", y(i)).attr("y2", y(i));
      }
      group.selectAll("circle").data(own).join("circle").attr("class", "dot").attr("r", 4.5).attr("cx", (row) => x(kind.of(row).value)).attr("cy", y(i))
        .on("pointerenter", told).on("pointerleave", hide).on("click", (_, row) => pick(row));
    });
    if (shown.length < all.length) picture.append(made("p", { class: "dim" }, `The first ${MOST_DOTS} of ${all.length} rows are drawn; filters show others.`));
  };
}
