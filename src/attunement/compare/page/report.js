"use strict";
// The page without its charts is whole already: this sorts, chooses the task, draws, and opens the card of a method.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
if (!data.tasks.length) return;
const $ = (id) => document.getElementById(id);
const measure = Object.fromEntries(data.measures.map((m) => [m.key, m]));
const markOf = Object.fromEntries(data.families.map((f) => [f.name, f.mark]));
const plain = (name) => name.replaceAll("_", " ");
const state = { task: 0, lit: "", families: new Set(), all: false };
const task = () => data.tasks[state.task];
const MINUS = "−";

function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "clipPath"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// ---- numbers as a person reads them
const UNITS = { bytes: [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"]], count: [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]] };
function shown(value, unit) {
  if (value == null) return "–";
  if (unit === "share") return `${(100 * value).toFixed(1)} %`;
  if (unit in UNITS) {
    for (const [size, word] of UNITS[unit]) if (value >= size) return (unit === "bytes" ? (value / size).toFixed(1) : figures(value / size)) + word;
    return `${Math.round(value)}${unit === "bytes" ? " bytes" : ""}`;
  }
  if (unit === "ratio") return `${value.toFixed(2)}×`;
  if (unit === "seconds") return `${value.toFixed(value < 100 ? 1 : 0)} s`;
  if (unit === "rate") return value.toExponential(1);
  return value.toFixed(3);
}
const figures = (value) => (value < 999.5 ? Number(value.toPrecision(3)).toString() : Math.round(value).toString());
function tick(value, unit) {
  if (unit === "share") return `${Number((100 * value).toFixed(2))}`;
  if (unit in UNITS) {
    for (const [size, word] of UNITS[unit]) if (value >= size) return Number((value / size).toPrecision(3)) + word;
    return `${value}`;
  }
  if (unit === "rate") return value.toExponential(0).replace("-", MINUS);
  return `${Number(value.toPrecision(6))}${unit === "ratio" ? "×" : ""}`;
}
function withInterval([mean, low, high], unit) {
  const cut = (text) => text.replace(" %", "");
  return shown(mean, unit) + (low == null || low === high ? "" : ` (${cut(shown(low, unit))} to ${cut(shown(high, unit))})`);
}

// ---- scales
function linear(low, high, from, to) {
  const at = (v) => from + ((v - low) / (high - low || 1)) * (to - from);
  at.ticks = (count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(Number(v.toPrecision(10)));
    return found;
  };
  return at;
}
function logarithmic(low, high, from, to, zero) {
  const start = zero ? from + Math.sign(to - from) * 34 : from;
  const inner = linear(Math.log10(low), Math.log10(high), start, to);
  const at = (v) => (v > 0 ? inner(Math.log10(v)) : from + 6);
  at.zero = zero;
  at.ticks = (count) => {
    const decades = Math.log10(high) - Math.log10(low), found = [];
    const steps = decades < 0.8 ? [1, 1.5, 2, 3, 4, 5, 7] : decades < 1.3 ? [1, 2, 3, 5] : decades < 2.6 ? [1, 3] : [1];
    const every = Math.max(1, Math.ceil(decades / count));
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      if (((e % every) + every) % every) continue;
      for (const s of steps) if (s * 10 ** e >= low * 0.999 && s * 10 ** e <= high * 1.001) found.push(Number((s * 10 ** e).toPrecision(4)));
    }
    return zero ? [0, ...found] : found;
  };
  return at;
}
/** A logarithmic axis where the values span more than a factor of 12, with a place of its own for zero. */
function scaleFor(values, from, to) {
  const positive = values.filter((v) => v > 0), low = Math.min(...positive), high = Math.max(...positive);
  const zero = positive.length < values.length;
  if (high / low > 12) return logarithmic(low / 1.25, high * 1.25, from, to, zero);
  const edge = 0.05 * (high - (zero ? 0 : low)) || 0.1 * high;
  return linear(zero ? 0 : Math.max(0, low - edge), high + edge, from, to);
}

// ---- tooltip
const tip = $("tip");
let told = null;
function tell(node, title, lines) {
  told = node;
  tip.replaceChildren(el("b", {}, title), ...lines.flatMap(([k, v]) => [el("span", {}, `${k} `), v, el("br")]));
  tip.hidden = false;
  settle();
}
function settle() {
  if (!told) return;
  const box = told.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = box.left + box.width / 2 - size.width / 2;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - size.width - 8))}px`;
  tip.style.top = `${box.top - size.height - 10 > 4 ? box.top - size.height - 10 : box.bottom + 10}px`;
}
const untell = () => { tip.hidden = true; told = null; };
addEventListener("scroll", settle, { passive: true }); // focus may scroll: the tip goes with its mark
addEventListener("keydown", (event) => { if (event.key === "Escape") untell(); });

/** Many things, one stop of the Tab key: arrows walk along `order` (left, right) and `levels` (up, down). */
function walk(group, nodes, order, levels) {
  if (!nodes.length) return;
  let current = 0;
  nodes.forEach((node, i) => {
    node.setAttribute("tabindex", i === order[0] ? "0" : "-1");
    node.addEventListener("focus", () => { nodes[current].setAttribute("tabindex", "-1"); current = i; node.setAttribute("tabindex", "0"); });
  });
  current = order[0];
  group.addEventListener("keydown", (event) => {
    const along = { ArrowRight: [order, 1], ArrowLeft: [order, -1], ArrowUp: [levels, 1], ArrowDown: [levels, -1] }[event.key];
    let next;
    if (along) next = along[0][along[0].indexOf(current) + along[1]];
    else if (event.key === "Home") next = order[0];
    else if (event.key === "End") next = order[order.length - 1];
    else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); nodes[current].dispatchEvent(new MouseEvent("click")); return; }
    else return;
    event.preventDefault();
    if (next != null) nodes[next].focus({ preventScroll: false });
  });
}

/** Axes with a few lines; `plot` draws into the group that is returned. */
function frame(width, height, margin, label, x, y, xUnit, yUnit, ticks = [5, 5]) {
  const svg = el("svg", { width, height, role: "group", "aria-label": label });
  const right = width - margin.right, bottom = height - margin.bottom;
  const back = el("g", { "aria-hidden": "true" });
  for (const v of y.ticks(ticks[1])) {
    const at = Math.round(y(v)) + 0.5;
    back.append(el("line", { class: "grid", x1: margin.left, x2: right, y1: at, y2: at }), el("text", { x: margin.left - 7, y: at + 4, "text-anchor": "end" }, tick(v, yUnit)));
  }
  let last = -Infinity;
  for (const v of x.ticks(ticks[0])) {
    const at = Math.round(x(v)) + 0.5, text = tick(v, xUnit), reach = text.length * 3.3 + 4;
    back.append(el("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at - reach > last) { back.append(el("text", { x: at, y: bottom + 17, "text-anchor": "middle" }, text)); last = at + reach; }
  }
  back.append(el("line", { class: "axis", x1: margin.left, x2: right, y1: bottom + 0.5, y2: bottom + 0.5 }));
  if (x.zero) back.append(el("text", { x: margin.left + 19, y: bottom + 4, "text-anchor": "middle" }, "≀"));
  svg.append(back);
  return svg;
}
const room = (host) => Math.max(220, Math.floor(host.clientWidth));
const textWidth = (text) => text.length * 6.6 + 4;

/** Places for names beside their points so that none covers another name or leaves the frame. */
function placed(names, box, taken) {
  const found = [];
  for (const { x, y, text } of names) {
    const w = textWidth(text), h = 14;
    const spots = [[9, 4, "start"], [-9, 4, "end"], [0, -10, "middle"], [0, 20, "middle"], [8, -8, "start"], [-8, -8, "end"], [8, 16, "start"], [-8, 16, "end"]];
    for (const [dx, dy, anchor] of spots) {
      const left = anchor === "start" ? x + dx : anchor === "end" ? x + dx - w : x + dx - w / 2, top = y + dy - 11;
      if (left < box.left || left + w > box.right || top < box.top || top + h > box.bottom) continue;
      if (taken.some((t) => left < t.right && left + w > t.left && top < t.bottom && top + h > t.top)) continue;
      taken.push({ left, right: left + w, top, bottom: top + h });
      found.push({ x: x + dx, y: y + dy, anchor, text });
      break;
    }
  }
  return found;
}

// ---- quality against a cost
function describe(row, keys) {
  const now = task();
  return ["quality", ...keys].filter((key) => row.v[key]).map((key) => [key === "quality" ? plain(now.metric) : measure[key].title.toLowerCase(), withInterval(row.v[key], key === "quality" ? now.unit : measure[key].unit)]);
}
function pareto(key) {
  const now = task(), rows = now.rows.filter((row) => row.v.quality && row.v[key]), m = measure[key];
  const [low, high] = now.window, outside = rows.filter((row) => row.v.quality[0] < low || row.v.quality[0] > high);
  const said = outside.length ? `${outside.length} far off ${outside.length === 1 ? "is" : "are"} at the edge: ${outside.slice(0, 4).map((r) => r.label).join(", ")}${outside.length > 4 ? ", …" : ""}` : "";
  const caption = el("figcaption", {}, m.title, el("small", {}, said));
  const figure = el("figure", { "data-cost": key }, caption);
  if (!rows.length) { caption.lastChild.textContent = "not measured"; return figure; }
  const host = $("pareto"), columns = getComputedStyle(host).gridTemplateColumns.split(" ");
  const width = Math.floor(parseFloat(columns[0])) || room(host), height = Math.round(Math.min(360, Math.max(270, width * 0.66)));
  const margin = { left: 42, right: 12, top: 22, bottom: 36 };
  const x = scaleFor(rows.map((r) => r.v[key][0]), margin.left, width - margin.right), y = linear(low, high, height - margin.bottom, margin.top);
  const best = [...rows].filter((row) => row.front.includes(key));
  const label = `${plain(now.metric)} against ${m.title.toLowerCase()}, ${rows.length} methods. Arrow keys walk from mark to mark. On the front: ${best.map((r) => r.label).join(", ")}.`;
  const svg = frame(width, height, margin, label, x, y, m.unit, now.unit);
  svg.append(el("text", { x: 0, y: 10, "aria-hidden": "true" }, plain(now.metric) + (now.unit === "share" ? ", %" : "")), el("text", { x: width - margin.right, y: height - 2, "text-anchor": "end", "aria-hidden": "true" }, m.title.toLowerCase() + (m.unit === "ratio" ? ", full fine-tuning = 1" : "")));
  const clamp = (v) => Math.max(margin.top, Math.min(height - margin.bottom, y(v)));
  const at = rows.map((r) => [x(r.v[key][0]), Math.max(margin.top, Math.min(height - margin.bottom - 7, y(r.v.quality[0])))]);
  const inside = (r) => r.v.quality[0] >= low && r.v.quality[0] <= high;
  const line = rows.map((r, i) => [r, at[i]]).filter(([r]) => r.front.includes(key) && inside(r)).sort((a, b) => a[1][0] - b[1][0]).map((pair) => pair[1]);
  if (line.length) svg.append(el("path", { class: "front", "aria-hidden": "true", d: `M${line[0][0]},${now.up ? height - margin.bottom : margin.top}V${line[0][1]}` + line.slice(1).map(([px, py]) => `H${px}V${py}`).join("") }));
  const nodes = rows.map((row, i) => {
    const [px, py] = at[i], [mean, from, to] = row.v.quality, out = mean < low || mean > high;
    const lines = describe(row, [key]);
    const node = el("g", {
      class: `mark${row.front.includes(key) ? " on" : ""}${row.method === "baseline/full" ? " full" : ""}`, transform: `translate(${px.toFixed(1)},${py.toFixed(1)})`, style: `--c:var(--f${markOf[row.family]})`,
      role: "button", "data-label": row.label, "aria-label": `${row.label}: ${lines.map((l) => l.join(" ")).join(", ")}${row.front.includes(key) ? ", on the front" : ""}`,
      onmouseenter: () => tell(node, row.label, lines), onmouseleave: untell, onfocus: () => tell(node, row.label, lines), onblur: untell, onclick: () => open(row),
    });
    if (from != null && !out) node.append(el("line", { class: "reach", x1: 0, x2: 0, y1: clamp(from) - py, y2: clamp(to) - py }));
    node.append(el("circle", { class: "ring", r: 10 }), el("path", { class: "shape", d: data.shapes[markOf[row.family]] }));
    if (out) node.append(el("path", { d: mean < low ? "M-3,9L0,12L3,9" : "M-3,-9L0,-12L3,-9", fill: "none", stroke: "currentColor" }));
    return node;
  });
  const byCost = rows.map((_, i) => i).sort((a, b) => at[a][0] - at[b][0] || at[b][1] - at[a][1]);
  const byQuality = rows.map((_, i) => i).sort((a, b) => rows[a].v.quality[0] - rows[b].v.quality[0]);
  for (const i of [...byCost].sort((a, b) => rows[a].front.includes(key) - rows[b].front.includes(key))) svg.append(nodes[i]);
  const front = rows.map((r, i) => [r, i]).filter(([r]) => r.front.includes(key) || r.method === "baseline/full").sort((a, b) => at[b[1]][1] > at[a[1]][1] ? -1 : 1);
  const taken = at.filter((_, i) => rows[i].front.includes(key)).map(([px, py]) => ({ left: px - 6, right: px + 6, top: py - 6, bottom: py + 6 }));
  for (const name of placed(front.map(([r, i]) => ({ x: at[i][0], y: at[i][1], text: r.label })), { left: margin.left, right: width, top: 0, bottom: height - margin.bottom }, taken))
    svg.append(el("text", { class: "name", x: name.x, y: name.y, "text-anchor": name.anchor, "aria-hidden": "true", "pointer-events": "none" }, name.text));
  walk(svg, nodes, byCost, byQuality);
  figure.append(svg);
  return figure;
}

// ---- learning curves
function curves(column, title, unit) {
  const now = task(), rows = now.rows.filter((row) => row.curve.some((mark) => mark[column] != null));
  const figure = el("figure", { "data-curve": title }, el("figcaption", {}, title, el("small", {}, "")));
  const host = $("learning"), columns = getComputedStyle(host).gridTemplateColumns.split(" ");
  const width = Math.floor(parseFloat(columns[0])) || room(host), height = 320;
  const marks = rows.map((row) => row.curve.filter((mark) => mark[column] != null).map((mark) => [mark[0], mark[column]]));
  const flat = marks.flat().map((m) => m[1]).sort((a, b) => a - b), q = (p) => flat[Math.floor(p * (flat.length - 1))];
  let low = flat[0], high = flat[flat.length - 1];
  if (column === 2) { // where the curves end matters more than where they start
    const [from, to] = now.window, reach = 1.5 * (to - from);
    [low, high] = now.up ? [Math.max(low, from - reach), Math.max(high, to)] : [Math.min(low, from), Math.min(high, to + reach)];
  } else high = Math.min(high, q(0.75) + 4 * (q(0.75) - q(0.25)) || high);
  const log = column === 1 && low > 0 && high / low > 8;
  const named = rows.filter((row) => row.method !== "baseline/full" && row.family !== "baseline").slice(0, 5);
  const margin = { left: 42, right: Math.min(120, Math.max(...[...named, { label: "full fine-tuning" }].map((r) => textWidth(r.label))) + 8), top: 14, bottom: 36 };
  const steps = Math.max(...marks.flat().map((m) => m[0]));
  const x = linear(0, steps, margin.left, width - margin.right), y = log ? logarithmic(low / 1.08, high * 1.08, height - margin.bottom, margin.top, false) : linear(low - 0.03 * (high - low), high + 0.03 * (high - low), height - margin.bottom, margin.top);
  const svg = frame(width, height, margin, `${title} over the steps, ${rows.length} methods. Arrow keys up and down walk from method to method.`, x, y, "number", unit);
  svg.append(el("text", { x: width - margin.right, y: height - 2, "text-anchor": "end", "aria-hidden": "true" }, "step"));
  const clamp = (v) => Math.max(margin.top, Math.min(height - margin.bottom, y(v)));
  svg.append(el("clipPath", { id: `within-${column}` }, el("rect", { x: margin.left, y: margin.top - 4, width: width - margin.left - margin.right + 4, height: height - margin.top - margin.bottom + 4 })));
  const lines = el("g", { "clip-path": `url(#within-${column})` });
  svg.append(lines);
  const nodes = rows.map((row, i) => {
    const d = "M" + marks[i].map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join("L");
    const [step, value] = marks[i][marks[i].length - 1], lines = [[title.toLowerCase(), shown(value, unit)], ["at step", `${step}`]];
    const full = row.method === "baseline/full";
    const point = { getBoundingClientRect: () => { const b = svg.getBoundingClientRect(); return new DOMRect(b.left + x(step) - 4, b.top + clamp(value) - 4, 8, 8); } };
    return el("g", {
      class: `curve${named.includes(row) ? " on" : ""}${full ? " full" : ""}`, style: `--c:var(--f${markOf[row.family]})`, role: "button", "data-label": row.label,
      "aria-label": `${row.label}: ${lines.map((l) => l.join(" ")).join(", ")}`, onmouseenter: () => tell(point, row.label, lines), onmouseleave: untell,
      onfocus: () => tell(point, row.label, lines), onblur: untell, onclick: () => open(row),
    }, el("path", { class: "line", d }), el("path", { class: "catch", d }), marks[i].length === 1 ? el("circle", { class: "end", cx: x(step), cy: y(value), r: 3 }) : null);
  });
  const rank = (row) => (row.method === "baseline/full" ? 2 : named.includes(row) ? 1 : 0);
  rows.map((row, i) => [rank(row), nodes[i]]).sort((a, b) => a[0] - b[0]).forEach(([, node]) => lines.append(node));
  let last = -Infinity;
  const ends = rows.map((row, i) => [row, i]).filter(([row]) => rank(row)).map(([row, i]) => [row, clamp(marks[i][marks[i].length - 1][1]) + 4]).sort((a, b) => a[1] - b[1]);
  const over = ends.map(([row, at]) => { last = Math.max(at, last + 14); return [row, last]; });
  const push = Math.max(0, last - (height - margin.bottom + 4));
  for (const [row, at] of over) svg.append(el("text", { class: "name", x: width - margin.right + 6, y: at - push, "aria-hidden": "true" }, row.label));
  const order = rows.map((_, i) => i).sort((a, b) => marks[a].at(-1)[1] - marks[b].at(-1)[1]);
  walk(svg, nodes, [...order].reverse(), order);
  figure.append(svg);
  return figure;
}

// ---- a small chart for each method's rates
function rates(row, width, height, domain, ends, unit) {
  const margin = { left: 30, right: 6, top: 8, bottom: 18 };
  const x = logarithmic(domain[0], domain[1], margin.left, width - margin.right, false), y = linear(ends[0], ends[1], height - margin.bottom, margin.top);
  const done = row.rates.filter((r) => r[2] === "done" && r[1] != null), chosen = row.v.rate && row.v.rate[0];
  const words = row.rates.map(([rate, quality, how]) => `${shown(rate, "rate")} ${how === "done" ? shown(quality, unit) : how}`);
  const svg = frame(width, height, margin, "", x, y, "rate", unit, [Math.max(2, Math.floor(width / 60)), 3]);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${row.label}, quality by learning rate: ${words.join(", ")}${chosen ? `; chosen ${shown(chosen, "rate")}` : ""}`);
  const clamp = (v) => Math.max(margin.top, Math.min(height - margin.bottom, y(v)));
  const g = el("g", { class: "rate", style: `--c:var(--f${markOf[row.family]})`, "aria-hidden": "true" });
  if (chosen) g.append(el("line", { class: "chosen", x1: x(chosen), x2: x(chosen), y1: margin.top, y2: height - margin.bottom }));
  if (done.length > 1) g.append(el("path", { class: "line", fill: "none", d: "M" + done.map(([rate, quality]) => `${x(rate).toFixed(1)},${clamp(quality).toFixed(1)}`).join("L") }));
  for (const [rate, quality, how] of row.rates) {
    const px = x(rate), py = quality == null ? height - margin.bottom - 4 : clamp(quality);
    if (how === "done") g.append(el("circle", { class: "shape", cx: px, cy: py, r: 2.8 }));
    else if (how === "pruned") g.append(el("circle", { class: "open", cx: px, cy: py, r: 2.8 }));
    else g.append(el("path", { class: "lost", d: `M${px - 3},${py - 3}l6,6m0,-6l-6,6` }));
  }
  svg.append(g);
  return svg;
}
function rateDomains(rows) {
  const all = rows.flatMap((row) => row.rates), tried = all.map((r) => r[0]);
  const seen = all.filter((r) => r[2] === "done" && r[1] != null).map((r) => r[1]).sort((a, b) => a - b);
  if (!tried.length) return null;
  const q = (p) => seen[Math.floor(p * (seen.length - 1))], reach = 3 * (q(0.75) - q(0.25)), up = task().up;
  const [low, high] = seen.length ? [up ? Math.max(seen[0], q(0.25) - reach) : seen[0], up ? q(1) : Math.min(q(1), q(0.75) + reach)] : [0, 1], edge = 0.05 * (high - low) || 0.05;
  return [[Math.min(...tried) / 1.2, Math.max(...tried) * 1.2], [low - edge, high + edge]];
}
function sensitivity() {
  const now = task(), rows = now.rows.filter((row) => row.rates.length), host = $("sensitivity"), domains = rateDomains(rows);
  const most = innerWidth < 641 ? 8 : 18, few = state.all ? rows : rows.slice(0, most);
  host.replaceChildren();
  $("more").hidden = rows.length <= most;
  $("more").textContent = state.all ? `Show the first ${most} only` : `Show all ${rows.length}`;
  $("more").setAttribute("aria-expanded", String(state.all));
  if (!domains) return;
  const columns = getComputedStyle(host).gridTemplateColumns.split(" "), width = Math.floor(parseFloat(columns[0])) || 160;
  for (const row of few) host.append(el("figure", { "data-label": row.label, class: row.label === state.lit ? "lit" : "" },
    el("figcaption", {}, el("button", { type: "button", title: row.label, onclick: () => open(row) }, row.label), el("span", {}, row.v.rate ? shown(row.v.rate[0], "rate") : "")),
    rates(row, width, 96, domains[0], domains[1], now.unit)));
  const key = (d, kind, text) => { const s = el("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14" }, el("g", { class: "rate", style: "--c:var(--f0)" }, kind === "circle" ? el("circle", { class: d, r: 3.2 }) : el("path", { class: d, d: kind }))); return el("span", {}, s, text); };
  $("rates-key").replaceChildren(key("shape", "circle", "finished"), key("open", "circle", "pruned, at its last value"), key("lost", "M-3,-3l6,6m0,-6l-6,6", "failed or diverged"), key("chosen", "M0,-7V7", "chosen rate, also above each chart"));
}

// ---- the card of a method
async function copy(text, button) {
  let done = false;
  try { await navigator.clipboard.writeText(text); done = true; } catch { /* not allowed here: the older way */ }
  if (!done) {
    const area = el("textarea", { style: "position:fixed;opacity:0" }), host = button.closest("dialog") || document.body;
    area.value = text; host.append(area); area.select();
    done = document.execCommand("copy");
    area.remove(); button.focus();
  }
  const before = button.dataset.text ??= button.textContent;
  button.textContent = done ? "Copied" : "Not copied";
  $("said").textContent = done ? "Recipe copied" : "The recipe could not be copied; select it in the details";
  clearTimeout(button.timer);
  button.timer = setTimeout(() => { button.textContent = before; $("said").textContent = ""; }, 2000);
}
function open(row) {
  untell();
  const now = task(), body = $("card-body"), dialog = $("card");
  $("card-title").textContent = row.label;
  const facts = el("dl", { class: "facts" });
  for (const m of data.measures) if (row.v[m.key]) {
    const unit = m.key === "quality" ? now.unit : m.unit, [mean, low, high] = row.v[m.key], several = low != null && low !== high && ["quality", "calibration", "forgetting", "step"].includes(m.key);
    facts.append(el("div", {}, el("dt", {}, m.key === "quality" ? plain(now.metric) : m.title), el("dd", {}, shown(mean, unit), several ? el("small", {}, `${shown(low, unit).replace(" %", "")} to ${shown(high, unit)}`.replaceAll("-", MINUS)) : null)));
  }
  const front = row.front.map((key) => measure[key].title.toLowerCase());
  const where = front.length ? ` On the front against ${front.join(", ")}.` : "";
  const button = el("button", { type: "button", class: "copy", onclick: () => copy(row.recipe, button) }, "Copy recipe");
  body.replaceChildren(
    el("p", { class: "note" }, `${row.method}, ${row.runs} ${row.runs === 1 ? "run" : "runs"} on ${now.name}.${row.top ? " Its quality cannot be told from the best, or is the best." : ""}${where}`), facts,
    el("div", { class: "between" }, el("h3", {}, "Recipe"), row.recipe ? button : null), el("pre", { tabindex: "0", "aria-label": `Recipe of ${row.label}` }, row.recipe || "This baseline has no recipe."));
  dialog.showModal();
  const domains = rateDomains(now.rows);
  if (row.rates.length && domains) body.append(el("h3", {}, "Learning rates tried"), rates(row, room(body), 190, domains[0], domains[1], now.unit));
}
$("card").addEventListener("click", (event) => { if (event.target === $("card")) $("card").close(); });

// ---- tables
function sortBy(table, head) {
  const index = [...head.parentNode.children].indexOf(head), now = head.getAttribute("aria-sort");
  const way = now ? (now === "ascending" ? "descending" : "ascending") : head.dataset.first;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", way);
  const body = table.tBodies[0], value = (line) => line.children[index]?.dataset.v ?? "";
  const lines = [...body.rows].map((line) => [line, value(line)]);
  const number = lines.every(([, v]) => v === "" || !isNaN(v)), sign = way === "ascending" ? 1 : -1;
  lines.sort(([a, v], [b, w]) => (v === "") - (w === "") || sign * (number ? v - w : v.localeCompare(w)) || a.dataset.row - b.dataset.row);
  body.append(...lines.map(([line]) => line));
  $("said").textContent = `sorted by ${head.textContent}, ${way}`;
}
document.querySelectorAll("#table [data-task]").forEach((part, i) => {
  part.querySelectorAll("th[data-key]").forEach((head) => {
    const button = el("button", { type: "button", onclick: () => sortBy(head.closest("table"), head) }, head.textContent);
    head.replaceChildren(button);
  });
  part.querySelectorAll("tbody tr").forEach((line) => {
    const row = data.tasks[i].rows[line.dataset.row], name = line.querySelector(".label");
    name.replaceWith(el("button", { type: "button", class: "label", title: row.label, onclick: () => open(row) }, row.label));
    if (row.recipe) { const button = el("button", { type: "button", class: "copy", "aria-label": `Copy the recipe of ${row.label}`, onclick: () => copy(row.recipe, button) }, "Copy"); line.lastElementChild.append(button); }
  });
});
function filter() {
  const word = $("filter").value.trim().toLowerCase();
  let seen = 0, all = 0;
  document.querySelectorAll("#table [data-task]").forEach((part, i) => part.querySelectorAll("tbody tr").forEach((line) => {
    const row = data.tasks[i].rows[line.dataset.row], fits = !word || `${row.label} ${row.method} ${plain(row.family)}`.toLowerCase().includes(word);
    line.hidden = !fits;
    if (i === state.task) { all += 1; seen += fits; }
  }));
  $("count").textContent = word ? `${seen} of ${all}` : "";
}
$("filter").addEventListener("input", filter);

// ---- what is shown
function light() {
  document.querySelectorAll("svg [data-label]").forEach((node) => node.classList.toggle("lit", node.dataset.label === state.lit));
  document.querySelectorAll(".multiples figure").forEach((node) => node.classList.toggle("lit", node.dataset.label === state.lit));
  document.querySelectorAll("#table [data-task]").forEach((part, i) => part.querySelectorAll("tbody tr").forEach((line) => line.classList.toggle("lit", !!state.lit && data.tasks[i].rows[line.dataset.row].label === state.lit)));
  document.querySelectorAll("svg .mark.lit, svg .curve.lit").forEach((node) => node.parentNode.append(node));
  document.querySelectorAll("svg [data-label]").forEach((node) => {
    const row = task().rows.find((r) => r.label === node.dataset.label);
    node.classList.toggle("faded", state.families.size > 0 && !!row && !state.families.has(row.family) && row.label !== state.lit);
  });
  $("open").disabled = !state.lit;
}
function draw() {
  const now = task();
  document.querySelectorAll("[data-task]").forEach((part) => { part.hidden = Number(part.dataset.task) !== state.task; });
  document.querySelectorAll(".task").forEach((title) => { title.hidden = true; });
  const focused = document.activeElement?.dataset?.label, within = document.activeElement?.closest?.("figure")?.dataset.cost;
  $("pareto").replaceChildren(...data.costs.map(pareto));
  const kinds = now.all ? [] : [[2, plain(now.metric).replace(/^./, (c) => c.toUpperCase()), now.unit], [1, "Training loss", "number"]]
    .filter(([column]) => now.rows.some((row) => row.curve.filter((mark) => mark[column] != null).length > 1)); // a point is no curve
  $("learning").classList.toggle("lone", kinds.length === 1);
  const drawn = kinds.map((kind) => curves(...kind));
  $("learning").replaceChildren(...drawn);
  if (!drawn.length) $("learning").append(el("p", { class: "note" }, now.all ? "Choose one task above to see its learning curves." : "No learning curves were kept."));
  sensitivity();
  if (now.all) $("sensitivity").replaceChildren(el("p", { class: "note" }, "Choose one task above to see its learning rates."));
  $("rates-key").hidden = now.all;
  filter();
  light();
  if (focused && within) document.querySelector(`figure[data-cost="${within}"] [data-label="${CSS.escape(focused)}"]`)?.focus();
}
for (const { name, mark } of data.families) {
  const dot = el("svg", { class: "dot", viewBox: "-7 -7 14 14", "aria-hidden": "true", style: `--c:var(--f${mark});margin:0` }, el("path", { class: "shape", d: data.shapes[mark] }));
  const button = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
    state.families.has(name) ? state.families.delete(name) : state.families.add(name);
    button.setAttribute("aria-pressed", String(state.families.has(name)));
    light();
  } }, dot, plain(name));
  $("families").append(button);
}
const labels = [...new Set(data.tasks.flatMap((one) => one.rows.map((row) => row.label)))].sort((a, b) => a.localeCompare(b));
$("highlight").append(...labels.map((label) => el("option", { value: label }, label)));
$("highlight").addEventListener("change", (event) => { state.lit = event.target.value; light(); });
$("open").addEventListener("click", () => { const row = task().rows.find((r) => r.label === state.lit); if (row) open(row); });
document.querySelectorAll("input[name=task]").forEach((input) => input.addEventListener("change", () => { state.task = Number(input.value); draw(); }));
$("more").addEventListener("click", () => { state.all = !state.all; sensitivity(); light(); });
state.task = Number(document.querySelector("input[name=task]:checked")?.value ?? 0);
let width = 0;
new ResizeObserver(() => { if ($("pareto").clientWidth !== width) { width = $("pareto").clientWidth; draw(); } }).observe(document.querySelector("main"));
width = $("pareto").clientWidth;
draw();
})();
