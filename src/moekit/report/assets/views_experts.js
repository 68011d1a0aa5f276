// Text by expert, expert cards, comparison with another trace, unlearning, text typed in by the reader.

const CARDS_AT_ONCE = 12;
const expertButton = (l, e) => h("button", { class: "expert", type: "button", title: "to its card", onclick: () => showCard(l, e) }, name(l, e));
/** Replaced by the view of the cards, when it is there. */
let showCard = () => {};

view("live", "Your own text", {
  data: DATA.live,
  see: "Type or paste a text to see which experts its tokens choose.",
  how: "The model runs on your text on this machine; nothing leaves it.",
  draw(body) {
    body.classList.add("live");
    const input = h("textarea", { "aria-label": "text to trace", maxlength: DATA.live.limit, spellcheck: "false" });
    const message = h("p", { class: "how", role: "status" });
    const holder = h("div");
    const go = h("button", { type: "button", onclick: trace }, "Trace");
    async function trace() {
      go.disabled = true;
      message.textContent = "running the model …";
      try {
        const response = await fetch("trace", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ text: input.value }) });
        const answer = await response.json();
        if (!response.ok) throw new Error(answer.error);
            const text = routedText({});
        holder.replaceChildren(h("div", { class: "tools" }, text.slider), text.node);
        text.show({
          count: answer.tokens.length, string: (t) => answer.tokens[t], ids: (t, l) => answer.ids[l][t], weights: (t, l) => answer.weights[l][t],
          margin: (t, l) => answer.margin[l][t],
        });
        message.textContent = `${answer.tokens.length} tokens in ${number(answer.seconds)} s`;
      } catch (error) {
        message.textContent = `That did not work: ${error.message}`;
      }
      go.disabled = false;
    }
    input.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && trace());
    body.append(h("div", { class: "tools" }), input, h("div", { class: "tools" }, go, h("span", { class: "how" }, "or Ctrl+Enter")), message, holder);
  },
});

view("text", "Text by expert", {
  data: DATA.text,
  see: "Tokens of one colour share their strongest expert; look whether colours follow meaning, syntax or only spelling, and how that changes with depth.",
  how: DATA.text?.how,
  draw(body) {
    const text = routedText({});
    const { samples } = DATA.text;
    const show = (i) => text.show(excerpt(DATA.text, samples[i].first, samples[i].count));
    body.append(h("div", { class: "tools" }, choice("text", samples.map((x) => x.name), show), text.slider), text.node);
    show(0);
  },
});

view("cards", "Expert cards", {
  data: DATA.cards,
  see: "What one expert is for: who uses it, which tokens bring it in, which it helps to predict; search for a token, a domain, or an expert such as " + name(L - 1, 0) + ".",
  how: DATA.cards?.how,
  draw(body) {
    const { cards } = DATA;
    const words = (array, l, e) => (array ? Array.from(part(array.token, l, e)).filter((i) => i < DATA.strings.length).map((i, m) => [DATA.strings[i], part(array.npmi, l, e)[m]]) : []);
    const everyone = [];
    for (let l = 0; l < L; l++) {
      for (let e = 0; e < DATA.experts[l]; e++) {
        const best = home(l, e);
        const rest = best === null ? 0 : (overall(l, e) * d3Sum(DATA.tokens) - share(best, l, e) * DATA.tokens[best]) / (d3Sum(DATA.tokens) - DATA.tokens[best] || 1);
        everyone.push({ l, e, best, use: overall(l, e), special: best === null ? 0 : share(best, l, e) - rest, peak: DATA.super ? part(DATA.super.peak, l)[e] : 0 });
      }
    }
    const haystack = (x) => (x.text ??= [name(x.l, x.e), x.best === null ? "" : DATA.domains[x.best], ...[...words(cards.input, x.l, x.e), ...words(cards.output, x.l, x.e)].map(([token]) => token)].join("\n").toLowerCase());
    const orders = [
      ["most special", (a, b) => b.special - a.special], ["most used", (a, b) => b.use - a.use], ["least used", (a, b) => a.use - b.use],
      ["number", (a, b) => a.l - b.l || a.e - b.e], ["strongest token", (a, b) => (words(cards.input, b.l, b.e)[0]?.[1] ?? 0) - (words(cards.input, a.l, a.e)[0]?.[1] ?? 0)],
      ...(DATA.super ? [["peak", (a, b) => b.peak - a.peak]] : []),
    ];
    const state = { query: "", order: 0, count: CARDS_AT_ONCE };
    const grid = h("div", { class: "cards" });
    const status = h("p", { class: "how", role: "status" });
    const more = h("button", { class: "more", type: "button", onclick: () => { state.count += CARDS_AT_ONCE * 4; redraw(); } }, "Show more");
    const chip = ([token, npmi]) => h("span", { class: "token", title: `nPMI ${number(npmi, 2)}` }, visible(token) || "∅");

    function contexts(l, e) {
      if (!DATA.text) return [];
      const { token, ids, weights, samples } = DATA.text;
      const found = [];
      for (let t = 0; t < token.values.length; t++) {
        const j = part(ids, t, l).indexOf(e);
        if (j >= 0) found.push([part(weights, t, l)[j], t]);
      }
      return found.sort((a, b) => b[0] - a[0]).slice(0, 3).map(([, t]) => {
        const sample = samples.find((x) => t >= x.first && t < x.first + x.count);
        const slice = (from, to) => Array.from(token.values.subarray(Math.max(from, sample.first), Math.min(to, sample.first + sample.count)), (i) => DATA.strings[i]).join("");
        return h("p", { class: "context" }, slice(t - 8, t).replaceAll("\n", " "), h("mark", {}, visible(DATA.strings[token.values[t]])), slice(t + 1, t + 7).replaceAll("\n", " "));
      });
    }
    function card(x) {
      const { l, e } = x;
      const most = Math.max(...DATA.domains.map((_, n) => share(n, l, e)), 1e-9);
      const [input, predicted, places] = [words(cards.input, l, e), words(cards.output, l, e), contexts(l, e)];
      return h("article", { class: "card" },
        h("h3", {}, name(l, e), h("span", {}, x.use > 0 ? `${percent(x.use)} of tokens` : "never used", x.peak > 0 && `, peak ${number(x.peak)}`)),
        DATA.domains.map((domain, n) => h("div", { class: "bar" }, h("span", { title: domain }, domain),
          h("i", {}, h("b", { style: { width: `${(100 * share(n, l, e)) / most}%`, background: category(n) } })), h("span", { class: "n" }, percent(share(n, l, e))))),
        input.length > 0 && [h("h4", {}, "tokens that bring it in"), h("div", {}, input.map(chip))],
        predicted.length > 0 && [h("h4", {}, cards.output_name), h("div", {}, predicted.map(chip))],
        places.length > 0 && [h("h4", {}, "where it weighs most"), places]);
    }
    function redraw() {
      const query = state.query.trim().toLowerCase();
      const exact = /^\d+\.\d+$/.test(query);
      const found = everyone.filter((x) => (exact ? name(x.l, x.e) === query : haystack(x).includes(query))).sort(orders[state.order][1]);
      grid.replaceChildren(...found.slice(0, state.count).map(card));
      status.textContent = `${found.length.toLocaleString("en")} of ${everyone.length.toLocaleString("en")} experts`;
      more.hidden = found.length <= state.count;
    }
    const search = h("input", { type: "search", "aria-label": "search the cards", placeholder: "token, domain or expert", oninput: () => { state.query = search.value; state.count = CARDS_AT_ONCE; redraw(); } });
    showCard = (l, e) => {
      search.value = state.query = name(l, e);
      redraw();
      document.getElementById("cards").scrollIntoView();
      search.focus({ preventScroll: true });
    };
    redraw();
    body.append(h("div", { class: "tools" }, h("label", {}, "search", search), choice("sort by", orders.map(([text]) => text), (i) => { state.order = i; redraw(); }), status), grid, more);
  },
});

view("against", "Before and after", {
  data: DATA.against,
  see: "Where the overlap falls, the changed model takes other paths; a high overlap with a high divergence means that the experts themselves changed.",
  how: DATA.against?.how,
  draw(body) {
    const { against } = DATA;
    const lines = [];
    if (against.overlap) {
      DATA.domains.forEach((domain, n) => lines.push({ name: domain, values: part(against.overlap, n + 1), colour: category(n), dash: dash(n) }));
      lines.push({ name: "same experts for the same token", values: part(against.overlap, 0), strong: true });
    }
    if (against.usage) lines.push({ name: "same use of experts", values: against.usage, colour: "var(--accent)", dash: "6 3", strong: true });
    if (against.name) body.append(h("p", {}, `Compared with ${against.name}.`));
    if (lines.length) {
      body.append(keys(lines.map((x) => x.name), (i) => lines[i].colour ?? "currentColor", (i) => lines[i].dash ?? "none"),
        h("div", { class: "maps" }, chart("Overlap by layer", { xs: DATA.layers, xLabel: "layer", lines, bottom: 0, top: 1, format: percent, rule: against.overlap && { y: DATA.usage.uniform[0], label: "blind choices" } })));
    }
    if (against.domains?.length) {
      const pair = (x, show) => (x ? `${show(x[0])} (${show(x[1])} to ${show(x[2])})` : "–");
      const columns = [["perplexity", "perplexity", number], ["ratio", "times that before", number], ["kl", "KL, nats a token", number], ["flipped", "flipped tokens", percent]];
      body.append(table([
        ["domain", (row) => row.domain],
        ["tokens", (row) => row.tokens.toLocaleString("en"), true],
        ...columns.filter(([key]) => against.domains.some((row) => row[key])).map(([key, head, show]) => [head, (row) => pair(row[key], show), true]),
      ], against.domains));
    }
    if (against.change) {
      const scale = () => diverging(against.limit);
      body.append(h("h3", {}, "Change of use"), legend(scale, (x) => `${signed(100 * x)} points`, "of a domain's tokens").node, h("div", { class: "maps" }, DATA.domains.map((domain, n) => heat({
        caption: [h("b", {}, domain)], rows: L, cols: against.change.shape[2], rowName: (l) => DATA.layers[l], colName: (e) => e, label: `Change of the use of experts on ${domain}`,
        value: (l, e) => part(against.change, n, l)[e], scale,
        describe: (l, e) => `expert ${name(l, e)}, ${domain}\n${signed(100 * part(against.change, n, l)[e])} points`, pick: against.renumbered ? null : (l, e) => showCard(l, e),
      }).node)));
    }
    if (against.flips?.length) {
      const token = (text) => h("span", { class: "token" }, visible(text));
      body.append(h("h3", {}, "Flipped tokens that cost most"), table([
        ["domain", (row) => row.domain], ["text", (row) => h("span", { class: "context" }, row.context.replaceAll("\n", "↵"))], ["next token", (row) => token(row.next)],
        ["model before", (row) => token(row.before)], ["model after", (row) => token(row.after)], ["loss, nats", (row) => signed(row.loss), true],
      ], against.flips));
    }
    if (against.text_overlap) {
      const lost = (source, t, l) => 1 - source.overlap(t, l);
      const text = routedText({ colour: (source, t, l) => (lost(source, t, l) > 0.001 ? colourText(rgb(CATEGORIES[5]), 0.75 * lost(source, t, l)) : null) });
      const { samples } = DATA.text;
      const show = (i) => text.show(excerpt({ ...DATA.text, overlap: against.text_overlap }, samples[i].first, samples[i].count));
      body.append(h("h3", {}, "Tokens that changed their experts"), h("p", { class: "how" }, "The stronger the colour, the more of a token's experts differ between the two models."),
        h("div", { class: "tools" }, choice("text", samples.map((x) => x.name), show), text.slider), text.node);
      show(0);
    }
  },
});

view("unlearning", "Forgetting, usefulness and routing", {
  data: DATA.unlearning,
  see: "True forgetting lowers the forget score and keeps utility and routing overlap; if the overlap falls with it, the router may only have been led away from the expert that still knows.",
  how: DATA.unlearning?.how,
  draw(body) {
    const { rows } = DATA.unlearning;
    const measures = [["forget", "what should be forgotten", "var(--mark)"], ["utility", "what should stay", "var(--accent)"], ["overlap", "routing overlap", "var(--soft)"]];
    body.append(keys(measures.map(([, text]) => text), (i) => measures[i][2], () => "none"),
      h("div", { class: "maps" }, chart("Through the run", { xs: rows.map((row) => row.step), xLabel: "step", bottom: 0, lines: measures.map(([key, text, colour]) => ({ name: text, values: rows.map((row) => row[key] ?? NaN), colour })) })),
      table([["step", (row) => row.step], ...measures.map(([key, text]) => [text, (row) => number(row[key] ?? NaN), true])], rows));
  },
});
