// Heat maps on canvas: one pixel a cell, scaled up by the browser; read by mouse or by arrow keys.

/**
 * A heat map of rows x cols numbers.
 * `options`: caption, rows, cols (numbers of them), rowName, colName, value(r, c), scale(), describe(r, c), pick(r, c), label.
 */
function heat({ caption, rows, cols, rowName, colName, value, scale, describe, pick, label, square }) {
  const canvas = h("canvas", { width: cols, height: rows, tabindex: 0, role: "img", "aria-label": `${label}; arrow keys read cells`, });
  if (!square) canvas.style.height = `${rows * Math.min(18, Math.max(5, 190 / rows))}px`;
  const context = canvas.getContext("2d");
  const cursor = { r: 0, c: 0 };

  function draw() {
    const image = context.createImageData(cols, rows);
    const { colour } = scale();
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < cols; c++) {
        const x = value(r, c);
        if (Number.isFinite(x)) image.data.set([...colour(x), 255], 4 * (r * cols + c));
      }
    }
    context.putImageData(image, 0, 0);
  }
  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const at = (x, size, count) => Math.min(count - 1, Math.max(0, Math.floor((x / size) * count)));
    return [at(event.clientY - box.top, box.height, rows), at(event.clientX - box.left, box.width, cols)];
  }
  function read(r, c, x, y) {
    Object.assign(cursor, { r, c });
    showTip(describe(r, c), x, y);
  }
  canvas.addEventListener("mousemove", (event) => read(...cellAt(event), event.clientX, event.clientY));
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("blur", hideTip);
  canvas.addEventListener("click", (event) => pick?.(...cellAt(event)));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter") pick?.(cursor.r, cursor.c);
    if (event.key === "Escape") hideTip();
    if (!step) return;
    event.preventDefault();
    const r = Math.min(rows - 1, Math.max(0, cursor.r + step[0]));
    const c = Math.min(cols - 1, Math.max(0, cursor.c + step[1]));
    const box = canvas.getBoundingClientRect();
    read(r, c, box.left + ((c + 0.5) / cols) * box.width, box.top + ((r + 0.5) / rows) * box.height);
  });

  const ticks = (count, text, side, most) => {
    const every = [1, 2, 4, 8, 16, 32, 64, 128].find((x) => count / x <= most) ?? count;
    return Array.from({ length: Math.ceil(count / every) }, (_, i) => i * every)
      .map((i) => h("i", { style: { [side]: `${((i + 0.5) / count) * 100}%` } }, String(text(i))));
  };
  const body = h("div", { class: square ? "heat square" : "heat" },
    h("div", { class: "ys", "aria-hidden": true }, ticks(rows, rowName, "top", square ? 16 : 10)), canvas,
    h("div", { class: "xs", "aria-hidden": true }, ticks(cols, colName, "left", 16)));
  drawn(draw);
  return { node: h("figure", {}, h("figcaption", {}, caption), body), draw };
}

/** A bar of the scale's colours with its ends named. */
function legend(scale, show, note) {
  const canvas = h("canvas", { width: 120, height: 1, "aria-hidden": true });
  const from = h("span"), to = h("span");
  function draw() {
    const { low, high, colour } = scale();
    const context = canvas.getContext("2d");
    const image = context.createImageData(120, 1);
    for (let i = 0; i < 120; i++) image.data.set([...colour(low + (i / 119) * (high - low)), 255], 4 * i);
    context.putImageData(image, 0, 0);
    from.textContent = low < 0 ? `${show(low)} or less` : show(low);
    to.textContent = `${show(high)} or more`;
  }
  drawn(draw);
  return { node: h("div", { class: "legend" }, from, canvas, to, h("span", {}, note)), draw };
}
