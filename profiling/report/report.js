"use strict";
// Errors are written into the document, where a test and a person can see them.
const root = document.documentElement;
function complain(error) {
  root.dataset.error = [root.dataset.error, String((error && error.message) || error)].filter(Boolean).join("; ");
}
addEventListener("error", (event) => complain(event.error || event.message));
addEventListener("unhandledrejection", (event) => complain(event.reason));

// Provenance: a title becomes a tip of our own, which touch and the keyboard can open too.
const tip = document.getElementById("tip");
function hideTip() {
  tip.hidden = true;
}
function showTip(event) {
  const owner = event.target.closest && event.target.closest("[title], [data-tip]");
  if (!owner) return hideTip();
  if (owner.title) {
    owner.dataset.tip = owner.title;
    owner.setAttribute("aria-description", owner.title);
    owner.removeAttribute("title");
  }
  tip.textContent = owner.dataset.tip;
  tip.hidden = false;
  const box = event.type === "focusin" || !event.clientX ? owner.getBoundingClientRect() : null;
  const x = box ? box.left : event.clientX + 12;
  const below = box ? box.bottom + 6 : event.clientY + 18;
  const above = (box ? box.top : event.clientY) - tip.offsetHeight - 8;
  tip.style.left = Math.max(8, Math.min(x, root.clientWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below + tip.offsetHeight < innerHeight ? below : Math.max(8, above)) + "px";
}
for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, showTip);
for (const kind of ["focusout", "scroll"]) addEventListener(kind, hideTip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// Charts: drawn one at a time once the page has been painted, and again when its width or its colours change.
const charts = JSON.parse(document.getElementById("charts").textContent);
const chosen = {};
function resolved(value, style) {
  if (typeof value === "string" && value.startsWith("var(")) return style.getPropertyValue(value.slice(4, -1)).trim();
  if (Array.isArray(value)) return value.map((item) => resolved(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
}
function draw(chart) {
  const place = document.getElementById("chart-" + chart.key);
  const style = getComputedStyle(root);
  const layout = { ...chart.layout, width: place.clientWidth, height: chart.height, uirevision: "kept" };
  if (matchMedia("(max-width: 760px)").matches || root.classList.contains("paper")) Object.assign(layout, chart.narrow);
  place.style.height = layout.height + "px";
  if (matchMedia("(hover: hover)").matches) layout.dragmode = "zoom";
  const data = chart.data.map((trace) =>
    chosen[chart.key] && trace.meta ? { ...trace, visible: trace.meta === chosen[chart.key] } : trace
  );
  return Plotly.react(place, resolved(data, style), resolved(layout, style), { displayModeBar: false });
}
async function drawn(chart) {
  const place = document.getElementById("chart-" + chart.key);
  try {
    await draw(chart);
    place.dataset.drawn = "yes";
  } catch (error) {
    complain(error);
    const note = document.createElement("p");
    note.className = "failed";
    note.textContent = "This chart could not be drawn: " + error.message + ". The tables have its numbers.";
    place.replaceChildren(note);
  }
}
const later = () => new Promise((resolve) => setTimeout(resolve));
let ready = false;
async function start() {
  if (charts.length) {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }
  for (const chart of charts) {
    await later();
    await drawn(chart);
  }
  ready = true;
  root.dataset.drawn = document.querySelectorAll("[data-drawn]").length;
}
function redraw() {
  if (ready) charts.filter((chart) => document.getElementById("chart-" + chart.key).dataset.drawn).forEach(draw);
}
let pending = 0;
let width = root.clientWidth;
addEventListener("resize", () => {
  if (root.clientWidth === width) return; // on a phone, only the address bar came or went
  width = root.clientWidth;
  clearTimeout(pending);
  pending = setTimeout(redraw, 100);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => {
  root.classList.add("paper");
  redraw();
});
addEventListener("afterprint", () => {
  root.classList.remove("paper");
  redraw();
});
for (const button of document.querySelectorAll("[data-choose]")) {
  button.addEventListener("click", () => {
    const key = button.closest("[data-for]").dataset.for;
    chosen[key] = button.dataset.choose;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
    if (ready) draw(charts.find((chart) => chart.key === key));
  });
}
requestAnimationFrame(() => setTimeout(() => start().catch(complain)));
