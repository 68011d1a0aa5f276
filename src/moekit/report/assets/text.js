// Text coloured by what its tokens chose, with a layer slider; read by mouse or by arrow keys.

/** Tokens first .. first + count - 1 of a packed text as what `routedText` reads. */
function excerpt(text, first, count) {
  return {
    count,
    string: (t) => DATA.strings[text.token.values[first + t]],
    ids: (t, l) => part(text.ids, first + t, l),
    weights: (t, l) => part(text.weights, first + t, l),
    margin: text.margin && ((t, l) => part(text.margin, first + t)[l]),
    overlap: text.overlap && ((t, l) => part(text.overlap, first + t)[l]),
  };
}

/**
 * A text coloured by its tokens' strongest expert, or by `colour(t, l)` where given.
 * Returns { node, show(source), slider }; `show` changes the text.
 */
function routedText({ colour }) {
  const words = h("div", { class: "words", tabindex: 0, role: "group", "aria-label": "tokens; arrow keys move, the panel tells what the token chose" });
  const panel = h("aside", { class: "panel", "aria-live": "polite" });
  const chips = h("ul", { class: "chips", "aria-label": "experts chosen most here" });
  let source, spans = [], layer = 0, current = 0, alone = null, frequent = [];

  const strongest = (t) => {
    const weights = source.weights(t, layer);
    let best = 0;
    for (let j = 1; j < weights.length; j++) if (weights[j] > weights[best]) best = j;
    return [source.ids(t, layer)[best], weights[best]];
  };
  function paint() {
    const seen = new Map();
    for (let t = 0; t < source.count; t++) {
      const [expert] = strongest(t);
      seen.set(expert, (seen.get(expert) ?? 0) + 1);
    }
    frequent = [...seen].sort((a, b) => b[1] - a[1]).slice(0, 7).map(([expert]) => expert);
    if (alone !== null && !frequent.includes(alone)) alone = null;
    spans.forEach((span, t) => {
      const [expert, weight] = strongest(t);
      const slot = frequent.indexOf(expert);
      const fill = colour ? colour(source, t, layer) : slot < 0 ? null : colourText(rgb(category(slot)), 0.25 + 0.45 * Math.min(1, weight));
      span.style.background = fill ?? "none";
      span.classList.toggle("dim", alone !== null && !Array.from(source.ids(t, layer)).includes(alone));
    });
    if (!colour) {
      chips.replaceChildren(...frequent.map((expert, slot) => h("li", {},
        h("button", {
          type: "button", "aria-pressed": String(alone === expert), title: "show only the tokens that chose it",
          onclick: () => { alone = alone === expert ? null : expert; paint(); },
        }, h("span", { class: "swatch", style: { background: category(slot) } }), `${name(layer, expert)}  ${percent(seen.get(expert) / source.count)}`))));
    }
    tell();
  }
  function tell() {
    const weights = source.weights(current, layer);
    const ids = source.ids(current, layer);
    const largest = Math.max(...weights);
    const rows = Array.from(ids, (expert, j) => [expert, weights[j]]).filter(([expert]) => expert < DATA.experts[layer]).sort((a, b) => b[1] - a[1]);
    panel.replaceChildren(
      h("h3", {}, "token ", h("span", { class: "token" }, visible(source.string(current)))),
      ...rows.map(([expert, weight]) => h("div", { class: "bar" }, expertButton(layer, expert),
        h("i", {}, h("b", { style: { width: `${(100 * weight) / (largest || 1)}%` } })), h("span", { class: "n" }, number(weight, 2)))),
      h("p", { class: "how" }, [
        source.margin && `Margin of the last chosen over the next expert: ${number(source.margin(current, layer), 2)}.`,
        source.overlap && `Chosen by both models: ${percent(source.overlap(current, layer))}.`,
      ].filter(Boolean).join(" ")));
  }
  function select(t) {
    spans[current]?.classList.remove("on");
    current = Math.min(source.count - 1, Math.max(0, t));
    spans[current].classList.add("on");
    tell();
  }
  words.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    select(current + step);
    spans[current].scrollIntoView({ block: "nearest" });
  });
  for (const kind of ["mouseover", "click"]) {
    words.addEventListener(kind, (event) => {
      const t = spans.indexOf(event.target);
      if (t >= 0) select(t);
    });
  }
  const slider = layerSlider((l) => { layer = l; alone = null; paint(); });
  return {
    node: h("div", {}, !colour && chips, h("div", { class: "split" }, words, panel)),
    slider,
    show(next) {
      source = next;
      spans = Array.from({ length: source.count }, (_, t) => h("span", {}, source.string(t)));
      words.replaceChildren(...spans);
      words.scrollTop = current = 0;
      alone = null;
      spans[0]?.classList.add("on");
      drawnOnce();
    },
  };
  function drawnOnce() {
    if (!themed.includes(paint)) themed.push(paint);
    paint();
  }
}
