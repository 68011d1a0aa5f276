// Where experts are used: heat maps by domain, specialisation, balance, super experts.

const share = (n, l, e) => part(DATA.usage.share, n, l)[e];
const overall = (l, e) => part(DATA.usage.all, l)[e];
/** The domain that uses an expert most, relative to its use of the layer; null for an expert never used. */
const home = (l, e) => {
  const best = d3.max(DATA.domains.map((_, n) => [share(n, l, e), n]), ([x]) => x);
  return best > 0 ? DATA.domains.findIndex((_, n) => share(n, l, e) === best) : null;
};
const described = (l, e) => [`expert ${name(l, e)}`, ...DATA.domains.map((domain, n) => `${domain}: ${percent(share(n, l, e))}`)].join("\n");

view("usage", "Experts by layer and domain", {
  data: DATA.usage,
  see: "Bright cells are experts that many of a domain's tokens choose; cells that differ between the maps are where domains part ways.",
  how: "Share of a domain's tokens that choose the expert (N_eD / N_D, so a layer's row sums to its top-k); the difference is in percentage points from the baseline; colours end at the 99.5th percentile.",
  draw(body) {
    const state = { difference: false, baseline: 0, order: 0 };
    const columns = ["all domains", ...DATA.domains];
    const read = (m, l, e) => (m === 0 ? overall(l, e) : share(m - 1, l, e));
    const shown = (m, l, e) => read(m, l, e) - (state.difference ? read(state.baseline, l, e) : 0);
    let orders = [];
    function sort() {
      orders = DATA.layers.map((_, l) => {
        const experts = Array.from({ length: E }, (_, e) => e);
        if (state.order === 1) experts.sort((a, b) => (home(l, a) ?? 99) - (home(l, b) ?? 99) || overall(l, b) - overall(l, a));
        if (state.order === 2) experts.sort((a, b) => (overall(l, b) || 0) - (overall(l, a) || 0));
        return experts;
      });
    }
    function limit() {
      const values = [];
      for (let m = 1; m < columns.length; m++) for (let l = 0; l < L; l++) for (let e = 0; e < E; e++) values.push(Math.abs(shown(m, l, e)));
      return d3.quantile(values.filter(Number.isFinite), 0.995) || 0.01;
    }
    let scale;
    const rescale = () => (scale = state.difference ? diverging(limit()) : sequential(0, limit()));
    sort();
    drawn(rescale);
    const maps = columns.map((domain, m) => heat({
      caption: [h("b", {}, domain), h("span", {}, `  ${m ? DATA.tokens[m - 1].toLocaleString("en") : d3Sum(DATA.tokens).toLocaleString("en")} tokens`)],
      rows: L, cols: E, rowName: (l) => DATA.layers[l], colName: (c) => c, label: `Share of tokens of ${domain} by layer and expert`,
      value: (l, c) => shown(m, l, orders[l][c]), scale: () => scale,
      describe: (l, c) => {
        const e = orders[l][c];
        const line = state.difference ? `${signed(100 * shown(m, l, e))} points from ${columns[state.baseline]}` : "";
        return [`expert ${name(l, e)}, ${domain}`, `${percent(read(m, l, e))} of tokens (uniform: ${percent(DATA.usage.uniform[l])})`, line].filter(Boolean).join("\n");
      },
      pick: (l, c) => showCard(l, orders[l][c]),
    }));
    const bar = legend(() => scale, (x) => (state.difference ? `${signed(100 * x)} points` : percent(x)), "of a domain's tokens; a row is a layer, a column an expert");
    const redraw = () => { rescale(); sort(); bar.draw(); maps.forEach((map) => map.draw()); };
    body.append(
      h("div", { class: "tools" },
        choice("show", ["share of tokens", ...columns.map((x) => `difference from ${x}`)], (i) => {
          state.difference = i > 0;
          state.baseline = Math.max(0, i - 1);
          redraw();
        }),
        choice("order of experts", ["number", "favourite domain", "use"], (i) => { state.order = i; redraw(); })),
      bar.node, h("div", { class: "maps" }, maps.map((map) => map.node)));
  },
});
const d3Sum = (values) => values.reduce((a, b) => a + b, 0);

view("specialisation", "Specialists of each domain", {
  data: DATA.specialisation,
  see: "A bar far right of both the grey band (chance) and the open mark (other domains) is a specialist; where the lower chart rises, routing tells domains apart.",
  how: `N_eD / N_D of the experts whose share in the domain exceeds that elsewhere most. ${DATA.specialisation?.note} ${DATA.specialisation?.information.note}`,
  draw(body) {
    const { rows, information } = DATA.specialisation;
    const most = d3.max(rows, (row) => Math.max(row.high, row.elsewhere));
    const x = d3.scaleLinear([0, most], [0, 250]);
    const whisker = (row) => {
      const n = DATA.domains.indexOf(row.domain);
      return svg("svg", { viewBox: "0 0 260 14", width: 260, height: 14, role: "img", "aria-label": `${percent(row.share)}, 95% interval ${percent(row.low)} to ${percent(row.high)}` },
        svg("rect", { x: x(row.null_low), y: 1, width: Math.max(1.5, x(row.null_high) - x(row.null_low)), height: 12, fill: "var(--neutral)", stroke: "var(--line)" }),
        svg("rect", { x: 0, y: 5, width: x(row.share), height: 4, fill: category(n) }),
        svg("line", { x1: x(row.low), x2: x(row.high), y1: 7, y2: 7, stroke: "currentColor", "stroke-width": 1.4 }),
        svg("line", { x1: x(row.low), x2: x(row.low), y1: 3, y2: 11, stroke: "currentColor" }),
        svg("line", { x1: x(row.high), x2: x(row.high), y1: 3, y2: 11, stroke: "currentColor" }),
        svg("circle", { cx: x(row.elsewhere), cy: 7, r: 3, fill: "var(--page)", stroke: "currentColor" }));
    };
    const shown = h("div");
    const some = (n) => shown.replaceChildren(table([
      ["domain", (row) => row.domain],
      ["expert", (row) => expertButton(row.l, row.expert)],
      ["share of its tokens", whisker],
      ["", (row) => percent(row.share), true],
      ["95% interval", (row) => `${percent(row.low)} to ${percent(row.high)}`, true],
      ["chance", (row) => `${percent(row.null_low)} to ${percent(row.null_high)}`, true],
      ["elsewhere", (row) => percent(row.elsewhere), true],
      ["uniform", (row) => percent(row.uniform), true],
    ], n === 0 ? rows.filter((row) => row.rank < 3) : rows.filter((row) => row.domain === DATA.domains[n - 1])));
    some(0);
    body.append(h("div", { class: "tools" }, choice("domain", ["the first three of each", ...DATA.domains], some)), shown);
    if (information) {
      body.append(h("div", { class: "maps" }, chart("Normalised mutual information of domain and expert", {
        xs: DATA.layers, xLabel: "layer", bottom: 0,
        lines: [
          { name: "observed", values: information.observed, colour: "var(--accent)", strong: true },
          { name: "chance (95th percentile)", values: information.null, colour: "var(--soft)", dash: "3 3" },
        ],
      })));
    }
  },
});

view("balance", "Balance of each layer", {
  data: DATA.balance,
  see: "A layer with low entropy, a high Gini index or a high maximum leans on few experts; never-used experts are candidates for pruning on such data.",
  how: "From the counts of choices of a layer's experts: entropy over its maximum log E, Gini index, largest over mean count, experts never chosen, and the fewest experts that hold 70% of the gate mass.",
  draw(body) {
    const charts = [
      ["entropy", "Normalised entropy", { top: 1 }], ["gini", "Gini index", { bottom: 0 }], ["max_over_mean", "Largest over mean", { bottom: 0 }],
      ["never_used", "Experts never used", { bottom: 0 }], ["experts_for_70", "Experts that hold 70% of the weight", { bottom: 0 }],
    ];
    body.append(
      keys(["all domains", ...DATA.domains], (i) => (i ? category(i - 1) : "currentColor"), (i) => (i ? dash(i - 1) : "none")),
      h("div", { class: "maps narrow" }, charts.map(([key, title, range]) => chart(title, {
        xs: DATA.layers, xLabel: "layer", width: 340, height: 180, ...range,
        lines: [
          ...DATA.domains.map((domain, n) => ({ name: domain, values: part(DATA.balance[key], n + 1), colour: category(n), dash: dash(n) })),
          { name: "all domains", values: part(DATA.balance[key], 0), strong: true },
        ],
      }))));
  },
});

view("super", "Super experts", {
  data: DATA.super,
  see: "Experts high above the rest write extreme values, whatever their frequency: rare does not mean unimportant" + (DATA.ablation ? ", and the last column says what the loss does without them." : "."),
  how: "Peak: the largest absolute element of an expert's unweighted output on any token; named: the rule of Su et al. (arXiv 2507.23279), above the 99.5th percentile and a tenth of the largest, in the first 75% of the depth.",
  draw(body) {
    const { peak, named } = DATA.super;
    const points = [];
    for (let l = 0; l < L; l++) for (let e = 0; e < DATA.experts[l]; e++) if (part(peak, l)[e] > 0) points.push({ l, e, x: overall(l, e), y: part(peak, l)[e] });
    const flagged = new Set(named.map(([l, e]) => name(l, e)));
    const best = [...points].sort((a, b) => b.y - a.y).slice(0, 10);
    body.append(scatter("Peak by share of tokens", points, {
      xLabel: "share of tokens", yLabel: "peak |output|", log: true,
      label: (p) => best.slice(0, 6).includes(p) && name(p.l, p.e),
      colour: (p) => (flagged.has(name(p.l, p.e)) ? "var(--mark)" : "var(--accent)"),
      tell: (p) => `expert ${name(p.l, p.e)}\npeak ${number(p.y)}\n${percent(p.x)} of tokens`,
    }));
    body.append(table([
      ["expert", (p) => expertButton(p.l, p.e)],
      ["peak", (p) => number(p.y), true],
      ["share of tokens", (p) => percent(p.x), true],
      ["super by the rule", (p) => (flagged.has(name(p.l, p.e)) ? "yes" : "no")],
      ...(DATA.ablation ? [["loss without it, nats (largest of the domains)", (p) => signed(d3.max(DATA.ablation.rows.filter((row) => row.at && name(...row.at) === name(p.l, p.e)), (row) => row.change) ?? NaN), true]] : []),
    ], best));
  },
});

view("ablation", "What is lost without an expert", {
  data: DATA.ablation,
  see: "An expert matters to a domain where its full mark stands clear of the open one: what is lost without another expert that is chosen as often.",
  how: DATA.ablation?.how,
  draw(body) {
    const { rows } = DATA.ablation;
    const domains = [...new Set(rows.map((row) => row.domain))];
    const x = d3.scaleLinear([0, 1], [6, 194]);
    const mark = ([value, low, high], y, fill) => [
      svg("line", { x1: x(low), x2: x(high), y1: y, y2: y, stroke: "currentColor", "stroke-width": 1.3 }),
      svg("circle", { cx: x(value), cy: y, r: 3.4, fill, stroke: "currentColor" }),
    ];
    const bar = (row) => svg("svg", { viewBox: "0 0 200 26", width: 200, height: 26, "aria-hidden": true },
      svg("line", { class: "rule", x1: x(0), x2: x(0), y1: 0, y2: 26 }),
      mark([row.change, row.low, row.high], 8, "var(--mark)"), row.matched && mark(row.matched, 18, "var(--page)"));
    const value = (s) => (s ? fixed(s[0]) : "–");
    const shown = h("div");
    function some(n) {
      const mine = rows.filter((row) => row.domain === domains[n]).sort((a, b) => (b.excess?.[0] ?? b.change) - (a.excess?.[0] ?? a.change));
      const spans = mine.flatMap((row) => [[row.change, row.low, row.high], row.matched].filter(Boolean));
      x.domain([Math.min(0, d3.min(spans, (s) => s[1])), Math.max(1e-6, d3.max(spans, (s) => s[2]))]);
      shown.replaceChildren(table([
        ["expert", (row) => (row.at ? expertButton(...row.at) : row.experts)],
        ["share of tokens", (row) => percent(row.share), true],
        ["loss change, nats a token", bar],
        ["without it", (row) => fixed(row.change), true],
        ["one as frequent", (row) => value(row.matched), true],
        ["a random one", (row) => value(row.random), true],
        ["excess (95%)", (row) => (row.excess ? `${fixed(row.excess[0])} (${fixed(row.excess[1])} to ${fixed(row.excess[2])})` : "–"), true],
      ], mine));
    }
    some(0);
    body.append(h("div", { class: "tools" }, choice("domain", domains, some)), shown);
  },
});
