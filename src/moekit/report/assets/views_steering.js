// The view of a steering plan that was tested: side effects, effect, dose and response, where its experts are.

view("steering", "A steering plan", {
  data: DATA.steering,
  see: "Read what it does elsewhere first; an effect is one where the full mark stands clear of the open ones: the same done to other experts.",
  how: DATA.steering?.how,
  draw(body) {
    const { grid, limit, ops, domains, doses, answers, notes, method } = DATA.steering;
    const whole = doses[doses.length - 1];
    const kinds = [["plan", "var(--mark)"], ["matched", "var(--page)"], ["random", "var(--soft)"]];
    const spans = (name) => {
      const x = whole.domains[name];
      return [x.change, x.matched?.mean, x.random?.mean];
    };
    const every = domains.flatMap(({ name }) => spans(name).filter(Boolean));
    const x = d3.scaleLinear([Math.min(0, d3.min(every, (s) => s[1])), Math.max(1e-6, d3.max(every, (s) => s[2]))], [6, 234]);
    const mark = (span, y, fill) => span && [
      svg("line", { x1: x(span[1]), x2: x(span[2]), y1: y, y2: y, stroke: "currentColor", "stroke-width": 1.3 }),
      svg("circle", { cx: x(span[0]), cy: y, r: 3.6, fill, stroke: "currentColor" }),
    ];
    const bar = ({ name }) => svg("svg", { viewBox: "0 0 240 36", width: 240, height: 36, "aria-hidden": true },
      svg("line", { class: "rule", x1: x(0), x2: x(0), y1: 0, y2: 36 }), spans(name).map((span, i) => mark(span, 8 + 10 * i, kinds[i][1])));
    const beside = (row, kind) => (whole.domains[row.name][kind] ? fixed(whole.domains[row.name][kind].mean[0]) : "–");
    const span = (s, show = fixed) => (s ? `${show(s[0])} (${show(s[1])} to ${show(s[2])})` : "–");
    const columns = [
      ["text", (row) => row.name],
      ["loss change, nats a token", bar],
      ["with the plan (95%)", (row) => span(whole.domains[row.name].change), true],
      ["as often", (row) => beside(row, "matched"), true],
      ["by lot", (row) => beside(row, "random"), true],
      ["perplexity", (row) => times(whole.domains[row.name].ratio[0]), true],
      ["KL, nats", (row) => number(whole.domains[row.name].kl[0]), true],
      ["same top token", (row) => percent(whole.domains[row.name].agreement[0]), true],
    ];
    const dots = h("ul", { class: "keys" }, kinds.map(([text, fill]) => h("li", {},
      svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": true }, svg("circle", { cx: 6, cy: 6, r: 3.6, fill, stroke: "currentColor" })),
      { plan: "the plan", matched: "experts chosen as often", random: "experts drawn by lot" }[text])));
    for (const [role, title] of [["elsewhere", "Side effects"], ["target", "Effect"]]) {
      const rows = domains.filter((row) => row.role === role);
      if (rows.length) body.append(h("h3", {}, title), role === "elsewhere" ? dots : "", table(columns, rows));
    }
    if (answers) {
      const said = { plain: "as it is", plan: "with the plan", random: "random experts" };
      body.append(h("h3", {}, "Answers that match"), table([
        ["model", ([who]) => said[who]], ["share (95%)", ([, s]) => span(s, percent), true],
      ], Object.entries(answers.share)));
    }
    const sweeps = [
      ["experts", doses.filter((dose) => dose.strength === 1), (dose) => dose.number],
      ["strength", doses.filter((dose) => dose.number === whole.number).sort((a, b) => a.strength - b.strength), (dose) => dose.strength],
    ].filter(([, some]) => some.length > 1);
    if (sweeps.length) body.append(h("h3", {}, "Dose and response"), keys(["the plan", "its 95% interval", "experts chosen as often", "experts drawn by lot"], (i) => ["var(--mark)", "var(--mark)", "var(--accent)", "var(--soft)"][i], (i) => ["none", "2 3", "none", "7 3"][i]));
    for (const [label, some, at] of sweeps) {
      const of = (name, read) => some.map((dose) => read(dose.domains[name]) ?? NaN);
      body.append(h("div", { class: "maps" }, domains.map(({ name, role }) => chart(`${name} (${role})`, {
        xs: some.map(at), xLabel: label, format: signed, rule: { y: 0, label: "" },
        lines: [
          { name: "the plan", values: of(name, (d) => d.change[0]), colour: "var(--mark)", strong: true },
          { name: "low", values: of(name, (d) => d.change[1]), colour: "var(--mark)", dash: "2 3" },
          { name: "high", values: of(name, (d) => d.change[2]), colour: "var(--mark)", dash: "2 3" },
          { name: "experts chosen as often", values: of(name, (d) => d.matched?.mean[0]), colour: "var(--accent)" },
          { name: "experts drawn by lot", values: of(name, (d) => d.random?.mean[0]), colour: "var(--soft)", dash: "7 3" },
        ].filter((line) => line.values.some(Number.isFinite)),
      }))));
    }
    const scale = () => diverging(limit);
    const at = new Map(ops.map((op) => [name(op.l, op.e), op]));
    const scored = ops.some((op) => op.score !== null);
    body.append(h("h3", {}, "Where its experts are"), h("p", { class: "how" }, [`Method: ${method || "by hand"}`, ...notes].join("; ") + "."),
      scored && legend(scale, (v) => signed(v), "score").node,
      h("div", { class: "maps" }, heat({
        caption: [h("b", {}, "Experts of the plan")], rows: L, cols: E, rowName: (l) => DATA.layers[l], colName: (e) => e, label: "Experts of the plan, by layer",
        value: (l, e) => (e < DATA.experts[l] ? (at.has(name(l, e)) ? part(grid, l)[e] : 0) : NaN), scale,
        describe: (l, e) => (at.has(name(l, e)) ? `expert ${name(l, e)}\n${at.get(name(l, e)).what}` : `expert ${name(l, e)}\nnot in the plan`), pick: (l, e) => showCard(l, e),
      }).node),
      table([
        ["expert", (op) => (DATA.cards ? expertButton(op.l, op.e) : name(op.l, op.e))], ["what", (op) => op.what], ["for tokens of", (op) => op.where],
        ["score", (op) => (op.score === null ? "–" : fixed(op.score)), true],
      ], [...ops].sort((a, b) => Math.abs(b.score ?? 0) - Math.abs(a.score ?? 0))));
  },
});
