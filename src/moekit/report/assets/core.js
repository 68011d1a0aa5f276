// Decoding, elements, numbers, colours, the tip: what every view uses.

/** The payload: see pack.py for the format. Arrays become {values, shape}, with NaN for none. */
async function load() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const types = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array };
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)), (_, node) => {
    if (node === null || typeof node !== "object" || !("bits" in node)) return node;
    const codes = new types[node.bits](buffer, 4 + length + node.at, node.shape.reduce((a, b) => a * b, 1));
    if (!("step" in node)) return { values: codes, shape: node.shape };
    const none = 2 ** node.bits - 1;
    const number = (q) => (node.log ? 2 ** (node.low + q * node.step) : node.low + q * node.step);
    return { values: Float64Array.from(codes, (q) => (q === none ? NaN : number(q))), shape: node.shape };
  });
}

/** The part of an array at the leading indices given, sharing its memory. */
function part(array, ...indices) {
  const size = array.shape.slice(indices.length).reduce((a, b) => a * b, 1);
  const number = indices.reduce((sum, index, axis) => sum * array.shape[axis] + index, 0);
  return array.values.subarray(number * size, (number + 1) * size);
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
if (typeof DecompressionStream === "undefined") {
  document.getElementById("views").textContent = "This browser is too old to unpack the report; any one of 2023 or later can.";
  return;
}
const DATA = await load();
const L = DATA.layers.length;
const E = Math.max(...DATA.experts);

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, x] of Object.entries(value)) node.style.setProperty(name, x);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((x) => x !== undefined && x !== null && x !== false));
  return node;
}
const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

const number = (x, digits = 3) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)) return x.toExponential(digits - 1).replaceAll("-", "−");
  return Number(x.toPrecision(digits)).toLocaleString("en").replace("-", "−");
};
const percent = (x) => {
  if (x === null || Number.isNaN(x)) return "–";
  const shown = 100 * x;
  return `${shown === 0 ? "0" : Math.abs(shown) >= 0.995 ? shown.toFixed(1).replace("-", "−") : number(shown, 2)}%`;
};
const signed = (x, show = number) => (x > 0 ? "+" : "") + show(x);
const fixed = (x) => `${x > 0 ? "+" : ""}${x.toFixed(4).replace("-", "−")}`;
const times = (x) => `${number(x)}×`;
const name = (l, e) => `${DATA.layers[l]}.${e}`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");

// Sequential: the viridis map; diverging: blue, neutral, orange; both read well with any common colour blindness.
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"].map(rgb);
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#9c6b3c"];
const DASHES = ["none", "7 3", "2 3"];
const category = (i) => CATEGORIES[i % CATEGORIES.length];
const dash = (i) => DASHES[Math.floor(i / CATEGORIES.length) % DASHES.length];

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
function ramp(stops, t) {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2);
  return stops[i].map((c, channel) => Math.round(c + (x - i) * (stops[i + 1][channel] - c)));
}
const css = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
const sequential = (low, high) => ({ low, high, colour: (x) => ramp(VIRIDIS, (x - low) / (high - low || 1)) });
function diverging(limit) {
  const dark = document.documentElement.dataset.theme === "dark";
  const ends = dark ? ["#8cc2ff", "#3f83cf", "#ef9440", "#ffd08a"] : ["#083d7f", "#5b9bd9", "#ee9b4a", "#8f3f00"];
  const stops = [...ends.slice(0, 2), css("--neutral"), ...ends.slice(2)].map(rgb);
  return { low: -limit, high: limit, colour: (x) => ramp(stops, (x / (limit || 1) + 1) / 2) };
}
const colourText = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

/** What the theme decides is drawn again by these whenever the theme changes. */
const themed = [];
function drawn(draw) {
  themed.push(draw);
  draw();
}

const tip = h("div", { id: "tip", role: "status", hidden: true });
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 6))}px`;
}
const hideTip = () => (tip.hidden = true);
/** Props that show a tip on hover and on focus. */
const tipped = (text) => ({
  onmousemove: (event) => showTip(text(), event.clientX, event.clientY),
  onmouseleave: hideTip,
  onfocus: (event) => {
    const box = event.target.getBoundingClientRect();
    showTip(text(), box.right - box.width / 2, box.bottom);
  },
  onblur: hideTip,
});

/** A labelled choice; calls `change(index)`. */
function choice(label, options, change, chosen = 0) {
  const rows = options.map((text, i) => h("option", { value: i, selected: i === chosen }, text));
  return h("label", {}, label, h("select", { onchange: (event) => change(Number(event.target.value)) }, rows));
}

/** A slider over the MoE layers; calls `change(l)` with the layer's number among them. */
function layerSlider(change, { label = "layer", first = 0, count = L, shown = (l) => DATA.layers[l] } = {}) {
  const out = h("output", {}, String(shown(first)));
  const slider = h("input", {
    type: "range", min: 0, max: count - 1, step: 1, value: first, "aria-valuetext": `layer ${shown(first)}`, disabled: count < 2,
    oninput: () => {
      const l = Number(slider.value);
      out.textContent = shown(l);
      slider.setAttribute("aria-valuetext", `layer ${shown(l)}`);
      change(l);
    },
  });
  return h("label", {}, label, slider, out);
}

function keys(names, colours = category, dashes = dash) {
  const mark = (i) =>
    svg("svg", { viewBox: "0 0 24 12", "aria-hidden": true },
      svg("line", { x1: 0, x2: 24, y1: 6, y2: 6, stroke: colours(i), "stroke-width": 3, "stroke-dasharray": dashes(i) }));
  return h("ul", { class: "keys" }, names.map((text, i) => h("li", {}, mark(i), text)));
}

/** A table; columns are [head, row => cell, numeric]. */
function table(columns, rows) {
  const cell = (tag, content, numeric) => h(tag, { class: numeric && "n", scope: tag === "th" && "col" }, content);
  return h("div", { class: "scroll" },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map(([head, , numeric]) => cell("th", head, numeric)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, read, numeric]) => cell("td", read(row), numeric)))))));
}

/** Line charts on one x scale: `lines` are {name, values, colour, dash, strong}; `ticks` names x values. */
function chart(title, { xs, xLabel, lines, bottom, top, format = number, width = 460, height = 210, rule }) {
  const box = { left: 46, right: 20, top: 12, bottom: 34 };
  const all = lines.flatMap((line) => Array.from(line.values)).filter((y) => Number.isFinite(y));
  const high = top ?? Math.max(d3.max(all) ?? 1, rule?.y ?? -Infinity);
  const low = bottom ?? Math.min(d3.min(all) ?? 0, rule?.y ?? Infinity);
  const x = d3.scaleLinear([0, Math.max(1, xs.length - 1)], [box.left, width - box.right]);
  const y = d3.scaleLinear([low, high === low ? low + 1 : high], [height - box.bottom, box.top]).nice(4);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": `${title}, by ${xLabel}; arrow keys read values` });
  const axis = (draw, shift) => d3.select(root).append("g").attr("class", "axis").attr("transform", shift).call(draw);
  const every = Math.ceil(xs.length / 12);
  const marks = d3.axisBottom(x).tickValues(xs.map((_, i) => i).filter((i) => i % every === 0)).tickFormat((i) => xs[i]).tickSize(4);
  axis(marks, `translate(0,${height - box.bottom})`);
  axis(d3.axisLeft(y).ticks(4).tickFormat((v) => format(v)).tickSize(4), `translate(${box.left},0)`);
  root.append(svg("text", { x: width - box.right, y: height - 3, "text-anchor": "end" }, xLabel));
  if (rule) {
    root.append(svg("line", { class: "dash", x1: box.left, x2: width - box.right, y1: y(rule.y), y2: y(rule.y) }));
    root.append(svg("text", { x: width - box.right, y: y(rule.y) - 4, "text-anchor": "end" }, rule.label));
  }
  const path = d3.line((d) => x(d[0]), (d) => y(d[1])).defined((d) => Number.isFinite(d[1]));
  for (const line of lines) {
    const points = Array.from(line.values, (value, i) => [i, value]);
    root.append(svg("path", {
      d: path(points), fill: "none", stroke: line.colour ?? "currentColor", "stroke-width": line.strong ? 2.4 : 1.4, "stroke-dasharray": line.dash,
    }));
    if (xs.length === 1) root.append(svg("circle", { cx: x(0), cy: y(points[0][1]), r: 3, fill: line.colour ?? "currentColor" }));
  }
  const cursor = svg("line", { class: "rule", y1: box.top, y2: height - box.bottom, visibility: "hidden" });
  root.append(cursor);
  let at = -1;
  function read(i, left, top) {
    at = i;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(i));
    cursor.setAttribute("visibility", "visible");
    const rows = lines.filter((line) => Number.isFinite(line.values[i])).map((line) => `${line.name}: ${format(line.values[i])}`);
    showTip([`${xLabel} ${xs[i]}`, ...rows].join("\n"), left, top);
  }
  function leave() {
    cursor.setAttribute("visibility", "hidden");
    hideTip();
  }
  const clamp = (i) => Math.min(xs.length - 1, Math.max(0, i));
  root.addEventListener("mousemove", (event) => {
    const place = root.getBoundingClientRect();
    read(clamp(Math.round(x.invert(((event.clientX - place.left) * width) / place.width))), event.clientX, event.clientY);
  });
  root.addEventListener("mouseleave", leave);
  root.addEventListener("blur", leave);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = root.getBoundingClientRect();
    const i = clamp(at + step);
    read(i, place.left + (x(i) * place.width) / width, place.top + place.height / 2);
  });
  return h("figure", {}, h("figcaption", {}, h("b", {}, title)), root);
}

const VIEWS = [];
/** A view: drawn when `data` is there; `see` and `how` are one sentence each. */
function view(id, title, { data, see, how, draw }) {
  if (data) VIEWS.push({ id, title, see, how, draw });
}
