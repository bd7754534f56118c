"use strict";

// What the page shows, the colors of its theme, and the one way in which everything is drawn again.
const data = JSON.parse(document.getElementById("payload").textContent);
const byId = (id) => document.getElementById(id);

const state = {extent: "standardized_epoch", cost: "0", view: "3d", kind: "landscape", scale: "linear", seed: "", hidden: new Set()};
const plots = new Map(); // element -> what builds its figure
const drawn = new Set();
const stale = new Set(); // what the state has left behind, or what was never drawn

const coarse = matchMedia("(pointer: coarse)").matches;
const darkDevice = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
let printing = false;

const isDark = () => !printing && (chosenTheme ?? (darkDevice.matches ? "dark" : "light")) === "dark";
const colorOf = (method) => (isDark() ? method.dark : method.light);
const shown = (name) => !state.hidden.has(name);
const methodNamed = (name) => data.methods.find((method) => method.name === name);

function faint(color, alpha) {
  const parts = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  return `rgba(${parts.join(",")},${alpha})`;
}

function ink() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {ink: read("ink"), soft: read("soft"), line: read("line"), card: read("card"), grid: read("grid"), font: read("sans")};
}

// The look of every plot. Axes get theirs here too, so that a theme is one thing.
function layout(more = {}) {
  const c = ink();
  const axis = {
    gridcolor: c.grid, linecolor: c.line, zerolinecolor: c.grid, tickcolor: c.line, automargin: true, fixedrange: coarse,
    title: {font: {size: 12, color: c.soft}, standoff: 8}, exponentformat: "power",
  };
  const {xaxis = {}, yaxis = {}, ...rest} = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: coarse ? false : "zoom",
    font: {family: c.font, size: 12, color: c.soft}, margin: {l: 46, r: 10, t: 8, b: 40}, hovermode: "closest",
    modebar: {bgcolor: "rgba(0,0,0,0)", color: c.soft, activecolor: c.ink},
    hoverlabel: {bgcolor: c.card, bordercolor: c.line, font: {family: c.font, color: c.ink, size: 12}, namelength: -1},
    ...rest, xaxis: joined(axis, xaxis), yaxis: joined(axis, yaxis),
  };
}

function joined(axis, own) {
  const title = typeof own.title === "string" ? {...axis.title, text: own.title} : axis.title;
  return {...axis, ...own, title};
}

const config = {responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, scrollZoom: false,
  modeBarButtons: [["toImage"]]};

function draw(element) {
  const figure = plots.get(element)();
  drawn.add(element);
  stale.delete(element);
  return Plotly.react(element, figure.data, figure.layout, config);
}

const listeners = []; // what else follows the state

// What is near the window is drawn now, and everything else when it comes there: a page of many plots stays quick.
function redraw() {
  for (const listener of listeners) listener();
  for (const element of plots.keys()) {
    stale.add(element);
    near.unobserve(element);
    near.observe(element);
  }
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    draw(entry.target);
  }
}, {rootMargin: "500px"});

function plot(element, build) {
  if (!element) return;
  plots.set(element, build);
  stale.add(element);
  near.observe(element);
}

function forget(element) {
  near.unobserve(element);
  plots.delete(element);
  drawn.delete(element);
  stale.delete(element);
  Plotly.purge(element);
}

// Groups of buttons of which one is pressed: data-choice is the state's name, data-value what it becomes.
function choices() {
  for (const group of document.querySelectorAll("[data-choice]")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button || button.disabled) return;
      state[group.dataset.choice] = button.dataset.value;
      press();
      redraw();
    });
  }
  press();
}

function press() {
  for (const button of document.querySelectorAll("[data-choice] button")) {
    const {choice} = button.parentElement.dataset;
    button.setAttribute("aria-pressed", String(state[choice] === button.dataset.value));
  }
}

function chips() {
  for (const chip of document.querySelectorAll("[data-chip]")) {
    const name = chip.dataset.chip;
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(name)) state.hidden.add(name);
      chip.setAttribute("aria-pressed", String(shown(name)));
      for (const cell of document.querySelectorAll("[data-method]")) {
        cell.classList.toggle("off", !shown(cell.dataset.method));
      }
      redraw();
    });
  }
}

function theme() {
  const button = byId("theme");
  const apply = () => {
    const dark = isDark();
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    button.querySelector(".text").textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
    redraw();
  };
  button.addEventListener("click", () => {
    chosenTheme = isDark() ? "light" : "dark";
    apply();
  });
  darkDevice.addEventListener("change", apply);
  // paper is light, and has no folds
  const folded = [...document.querySelectorAll("details")].filter((fold) => !fold.open);
  addEventListener("beforeprint", () => {
    printing = true;
    for (const fold of folded) fold.open = true;
    apply();
    for (const element of plots.keys()) draw(element);
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const fold of folded) fold.open = false;
    apply();
  });
  apply();
}

// A logarithmic axis with whole numbers at its ticks: 0.5, 1, 2, ...
function logAxis(values) {
  const there = values.flat().filter((value) => value > 0);
  if (!there.length) return {type: "log"};
  const [low, high] = [Math.log10(Math.min(...there)), Math.log10(Math.max(...there))];
  const steps = high - low < 0.9 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 2.2 ? [1, 2, 5] : [1];
  const tickvals = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) tickvals.push(...steps.map((step) => step * 10 ** power));
  return {type: "log", tickvals, ticktext: tickvals.map((value) => short(Number(value.toPrecision(3))))};
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replaceAll("-", "−");
}
