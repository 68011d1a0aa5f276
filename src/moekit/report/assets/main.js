// Puts the views on the page, in the order of `ORDER`, and keeps the theme.

const ORDER = ["live", "usage", "specialisation", "text", "cards", "flow", "coactivation", "similarity", "balance", "confidence", "super", "ablation", "steering", "against", "unlearning"];

function theme(choice) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
    themed.forEach((draw) => draw());
  };
  const names = ["auto", "light", "dark"];
  const button = h("button", { type: "button", onclick: () => set(names[(names.indexOf(choice) + 1) % names.length]) });
  function set(next) {
    choice = next;
    button.textContent = `theme: ${choice}`;
    apply();
  }
  dark.addEventListener("change", apply);
  let kept = choice;
  addEventListener("beforeprint", () => { kept = choice; set("light"); });
  addEventListener("afterprint", () => set(kept));
  set(choice);
  return button;
}

function start() {
  const root = document.getElementById("views");
  const list = document.getElementById("contents");
  const toggle = theme("auto");
  VIEWS.sort((a, b) => ORDER.indexOf(a.id) - ORDER.indexOf(b.id));
  for (const { id, title, see, how, draw } of VIEWS) {
    const body = h("div", { class: "figure" });
    root.append(h("section", { class: "view", id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), h("p", { class: "see" }, see), h("p", { class: "how" }, how), body));
    list.append(h("li", {}, h("a", { href: `#${id}` }, title)));
    draw(body);
  }
  list.parentNode.append(toggle);
  document.body.append(tip);
  const links = new Map([...list.querySelectorAll("a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  root.querySelectorAll("section").forEach((section) => seen.observe(section));
  addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  document.documentElement.dataset.views = VIEWS.map((x) => x.id).join(" ");
}

start();
