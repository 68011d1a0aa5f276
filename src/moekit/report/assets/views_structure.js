// How experts go together: co-activation, flow between layers, similarity, and how sure the routers are.

/** A scatter plot; a point is {l, e, x, y}. Arrow keys walk through the points. */
function scatter(title, points, { xLabel, yLabel, log, label, colour, radius, tell, width = 620, height = 380, bare }) {
  const box = { left: bare ? 8 : 52, right: 12, top: 10, bottom: bare ? 8 : 36 };
  const reach = (read) => {
    const values = points.map(read).filter((v) => !log || v > 0);
    return [d3.min(values) ?? 0, d3.max(values) ?? 1];
  };
  const scale = (domain, range) => (log ? d3.scaleLog(domain, range) : d3.scaleLinear(domain, range)).clamp(true);
  const x = scale(reach((p) => p.x), [box.left + 8, width - box.right - 8]);
  const y = scale(reach((p) => p.y), [height - box.bottom - 8, box.top + 8]);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": `${title}; arrow keys walk through the points`, style: { "max-width": "46rem" } });
  if (bare) {
    root.append(svg("rect", { class: "rule", x: 1, y: 1, width: width - 2, height: height - 2 }));
  } else {
    const axis = (draw, shift) => d3.select(root).append("g").attr("class", "axis").attr("transform", shift).call(draw);
    const show = (read) => (v) => (!log || ["1", "2", "5"].includes(v.toExponential(0)[0]) ? read(v) : "");
    axis(d3.axisBottom(x).ticks(6).tickFormat(show(xLabel.startsWith("share") ? percent : number)).tickSize(4), `translate(0,${height - box.bottom})`);
    axis(d3.axisLeft(y).ticks(6).tickFormat(show((v) => number(v))).tickSize(4), `translate(${box.left},0)`);
    root.append(svg("text", { x: width - box.right, y: height - 3, "text-anchor": "end" }, xLabel), svg("text", { x: 4, y: 10 }, yLabel));
  }
  const dots = points.map((p) => svg("circle", {
    class: "point", cx: x(p.x), cy: y(p.y), r: radius ? radius(p) : 3.6, fill: colour(p), "fill-opacity": 0.85, ...tipped(() => tell(p)), onclick: () => showCard(p.l, p.e),
  }));
  root.append(...dots);
  const named = [];
  for (const p of points) {
    const text = label?.(p);
    if (text && named.some((q) => Math.abs(x(q.x) - x(p.x)) < 8 * String(text).length && Math.abs(y(q.y) - y(p.y)) < 11)) continue;
    if (text) named.push(p);
    if (text) root.append(svg("text", { class: "strong", x: x(p.x) + (radius ? radius(p) : 3.6) + 3, y: y(p.y) + 3.5 }, text));
  }
  const order = points.map((_, i) => i).sort((a, b) => points[a].x - points[b].x);
  let at = -1;
  const mark = (i) => {
    dots[order[at]]?.classList.remove("on");
    at = i;
    const dot = dots[order[at]];
    if (!dot) return hideTip();
    dot.classList.add("on");
    const place = dot.getBoundingClientRect();
    showTip(tell(points[order[at]]), place.right, place.bottom);
  };
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (event.key === "Enter" && at >= 0) showCard(points[order[at]].l, points[order[at]].e);
    if (!step) return;
    event.preventDefault();
    mark(Math.min(points.length - 1, Math.max(0, at + step)));
  });
  root.addEventListener("blur", () => mark(-1));
  return h("figure", {}, h("figcaption", {}, h("b", {}, title)), root);
}

view("coactivation", "Experts that fire together", {
  data: DATA.coactivation,
  see: "Orange pairs are chosen for the same tokens more often than their frequencies explain, blue pairs less: orange blocks are groups that work as one.",
  how: DATA.coactivation?.how,
  draw(body) {
    const { shown, lift, pairs, limit } = DATA.coactivation;
    const n = shown.shape[1];
    let l = 0;
    const cell = (i, j) => (i > j ? cell(j, i) : i * n - (i * (i + 1)) / 2 + (j - i - 1));
    const experts = () => part(shown, l);
    const there = (i) => experts()[i] < DATA.experts[l];
    const lifted = (i, j) => part(lift, l)[cell(i, j)] || 0;
    const value = (i, j) => (i === j || !there(i) || !there(j) ? NaN : Math.log2(lifted(i, j) || 2 ** -9));
    const scale = () => diverging(limit);
    const holder = h("div"), list = h("div");
    function redraw() {
      const map = heat({
        caption: [h("b", {}, `Layer ${DATA.layers[l]}`), h("span", {}, n < DATA.experts[l] ? `  its ${n} most used experts, alike ones side by side` : "  alike experts side by side")],
        rows: n, cols: n, square: true, rowName: (i) => experts()[i], colName: (i) => experts()[i], label: `Co-activation of the experts of layer ${DATA.layers[l]}`, value, scale,
        describe: (i, j) => (i === j ? `expert ${name(l, experts()[i])}` : `${name(l, experts()[i])} and ${name(l, experts()[j])}\n${times(lifted(i, j))} as often together as by chance`),
        pick: (i) => showCard(l, experts()[i]),
      });
      themed.pop();
      drawMap = map.draw;
      holder.replaceChildren(map.node);
      list.replaceChildren(table([
        ["pair", (p) => h("span", { class: "pair" }, expertButton(l, p[0]), ", ", expertButton(l, p[1]))],
        ["tokens", (p) => p[2].toLocaleString("en"), true],
        ["together", (p) => times(p[3]), true],
      ], pairs[l]));
    }
    let drawMap;
    redraw();
    themed.push(() => drawMap());
    body.append(h("div", { class: "tools" }, layerSlider((next) => { l = next; redraw(); })),
      legend(scale, (x) => times(2 ** x), "as often together as by chance").node,
      h("div", { class: "split" }, holder, h("div", { class: "panel" }, h("h3", {}, "Strongest pairs"), list)));
  },
});

view("flow", "Flow from layer to layer", {
  data: DATA.flow,
  see: "A wide ribbon is a path that many tokens take: the choice in one layer foretells the choice in the next.",
  how: DATA.flow?.how,
  draw(body) {
    const span = Math.min(5, L);
    const state = { first: 0, domain: 0 };
    const holder = h("figure");
    function redraw() {
      const { first, domain } = state;
      const width = 900, height = 500;
      const ids = new Map(), nodes = [], links = [];
      const node = (l, e) => {
        const id = `${l}:${e}`;
        if (!ids.has(id)) ids.set(id, nodes.push({ l, e, order: e < 0 ? 1e6 : e }) - 1);
        return ids.get(id);
      };
      const apart = (l) => part(DATA.flow.nodes, domain, l);
      const n = DATA.flow.nodes.shape[2];
      const expert = (l, i) => (i === n ? -1 : apart(l)[i]);
      for (let l = first; l < first + span - 1; l++) {
        for (let i = 0; i <= n; i++) {
          for (let j = 0; j <= n; j++) {
            const value = part(DATA.flow.share, domain, l, i)[j];
            if (value > 2e-4) links.push({ source: node(l, expert(l, i)), target: node(l + 1, expert(l + 1, j)), value, lift: part(DATA.flow.lift, domain, l, i)[j] });
          }
        }
      }
      const layout = d3.sankey().nodeAlign((x) => x.l - first).nodeWidth(9).nodePadding(5).nodeSort((a, b) => a.order - b.order).extent([[4, 22], [width - 44, height - 4]]);
      const graph = layout({ nodes, links });
      const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Flow through layers ${DATA.layers[first]} to ${DATA.layers[first + span - 1]}; tab walks through the experts` });
      const called = (x) => (x.e < 0 ? `the other experts of layer ${DATA.layers[x.l]}` : `expert ${name(x.l, x.e)}`);
      const ribbons = graph.links.map((link) => svg("path", {
        class: "link", d: d3.sankeyLinkHorizontal()(link), "stroke-width": Math.max(0.6, link.width), style: { "stroke-opacity": Math.min(0.6, 0.1 + 0.09 * link.lift) },
        ...tipped(() => `${called(link.source)} → ${called(link.target)}\n${percent(link.value)} of the layer's pairs\n${times(link.lift)} as many as by chance`),
      }));
      const light = (x, on) => ribbons.forEach((ribbon, i) => {
        if (graph.links[i].source === x || graph.links[i].target === x) ribbon.classList.toggle("on", on);
      });
      const boxes = graph.nodes.map((x) => {
        const best = x.e < 0 ? null : home(x.l, x.e);
        const tips = tipped(() => `${called(x)}\n${percent(x.value)} of the layer's pairs${best === null ? "" : `\nfavourite domain: ${DATA.domains[best]}`}`);
        return svg("g", {
          class: "node", tabindex: 0, role: "button", "aria-label": called(x),
          onmouseenter: () => light(x, true), onmousemove: tips.onmousemove, onmouseleave: () => { light(x, false); hideTip(); },
          onfocus: (event) => { light(x, true); tips.onfocus(event); }, onblur: () => { light(x, false); hideTip(); },
          onclick: () => x.e >= 0 && showCard(x.l, x.e), onkeydown: (event) => event.key === "Enter" && x.e >= 0 && showCard(x.l, x.e),
        },
        svg("rect", { x: x.x0, y: x.y0, width: x.x1 - x.x0, height: Math.max(1, x.y1 - x.y0), fill: best === null ? "var(--soft)" : category(best) }),
        x.y1 - x.y0 > 5 && svg("text", { class: x.y1 - x.y0 > 9 ? "strong" : "strong small", x: x.x1 + 4, y: (x.y0 + x.y1) / 2 + 3.5 }, x.e < 0 ? "others" : x.e));
      });
      const heads = Array.from({ length: span }, (_, i) => {
        const first0 = graph.nodes.find((x) => x.l === first + i);
        return first0 && svg("text", { x: first0.x0, y: 12 }, `layer ${DATA.layers[first + i]}`);
      }).filter(Boolean);
      root.append(...ribbons, ...boxes, ...heads);
      holder.replaceChildren(root);
    }
    redraw();
    body.append(
      h("div", { class: "tools" }, choice("tokens of", ["all domains", ...DATA.domains], (i) => { state.domain = i; redraw(); }),
        L > span && layerSlider((l) => { state.first = l; redraw(); }, { label: "layers", count: L - span + 1, shown: (l) => `${DATA.layers[l]} to ${DATA.layers[l + span - 1]}` })),
      keys([...DATA.domains, "others"], (i) => (i < DATA.domains.length ? category(i) : "var(--soft)"), () => "none"), h("p", { class: "how" }, "Boxes have the colour of the domain that uses the expert most, relative to its tokens."), holder);
  },
});

view("confidence", "How sure the routers are", {
  data: DATA.confidence,
  see: "A small margin means that a slight change of the input would have chosen other experts; look for positions and layers where it collapses.",
  how: "Mean over the tokens of a range of positions; margin: score of the last chosen expert minus that of the next; entropy: of the router's distribution over all experts, in nats" + (DATA.confidence?.phases.length > 1 ? "; dashed: while generating." : "."),
  draw(body) {
    const { positions, phases } = DATA.confidence;
    const holder = h("div", { class: "maps" });
    const redraw = (l) => {
      const lines = (key) => phases.flatMap((phase, i) => DATA.domains.map((domain, n) => ({
        name: phases.length > 1 ? `${domain}, ${phase.name}` : domain, values: part(phase[key], n, l), colour: category(n), dash: i ? "5 4" : dash(n),
      })));
      const range = (key) => ({ bottom: 0, top: d3.max(phases, (phase) => d3.max(phase[key].values)) });
      holder.replaceChildren(
        chart("Margin", { xs: positions, xLabel: "position", lines: lines("margin"), ...range("margin") }),
        chart("Entropy", { xs: positions, xLabel: "position", lines: lines("entropy"), ...range("entropy") }));
    };
    redraw(0);
    body.append(h("div", { class: "tools" }, layerSlider(redraw)), keys(DATA.domains), holder);
  },
});

view("similarity", "Map of alike experts", {
  data: DATA.similarity,
  see: "Experts that lie close do alike things; clusters of one colour serve one domain; close pairs are candidates for merging.",
  how: DATA.similarity?.how,
  draw(body) {
    const state = { l: 0, kind: 0 };
    const { kinds } = DATA.similarity;
    const holder = h("div");
    function redraw() {
      const { l } = state;
      const kind = kinds[state.kind];
      const at = part(kind.points, l);
      const points = Array.from({ length: DATA.experts[l] }, (_, e) => ({ l, e, x: at[2 * e], y: at[2 * e + 1] })).filter((p) => Number.isFinite(p.x));
      holder.replaceChildren(scatter(`Layer ${DATA.layers[l]}, by ${kind.name}: the two axes hold ${percent(kind.kept[l])} of the distances`, points, {
        bare: true, radius: (p) => 3 + 9 * Math.sqrt(overall(p.l, p.e)), label: (p) => (DATA.experts[l] <= 40 ? p.e : false),
        colour: (p) => (home(p.l, p.e) === null ? "var(--soft)" : category(home(p.l, p.e))), tell: (p) => described(p.l, p.e),
      }));
    }
    redraw();
    body.append(h("div", { class: "tools" }, layerSlider((l) => { state.l = l; redraw(); }),
      kinds.length > 1 && choice("alike by", kinds.map((kind) => kind.name), (i) => { state.kind = i; redraw(); })),
    keys(DATA.domains, category, () => "none"), holder);
  },
});
