"use strict";

// Choices between views, methods that are hidden, the theme: the figures themselves are in the page.
const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

const state = {}; // the value of each choice
const hidden = new Set(); // methods
const listeners = []; // functions that follow the state

document.documentElement.classList.add("scripted");

function choose(group, value) {
  state[group.dataset.choice] = value;
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.value === value));
  update();
}

function update() {
  for (const element of all("[data-when]")) {
    element.hidden = !element.dataset.when.split(" ").every((condition) => {
      const [name, value] = condition.split(":");
      return state[name] === value;
    });
  }
  for (const element of all("[data-method]")) {
    element.classList.toggle("off", element.dataset.method.split(" ").some((method) => hidden.has(method)));
  }
  for (const listener of listeners) listener();
}

for (const group of all("[data-choice]")) {
  const isSelect = group.tagName === "SELECT";
  state[group.dataset.choice] = isSelect ? group.value : group.querySelector('[aria-pressed="true"]').dataset.value;
  group.addEventListener(isSelect ? "change" : "click", (event) => {
    const button = event.target.closest("button:enabled");
    if (isSelect) choose(group, group.value);
    else if (button) choose(group, button.dataset.value);
  });
}

for (const chip of all("[data-chip]")) {
  chip.addEventListener("click", () => {
    const method = chip.dataset.chip;
    if (!hidden.delete(method)) hidden.add(method);
    chip.setAttribute("aria-pressed", String(!hidden.has(method)));
    update();
  });
}

const darkDevice = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
let printing = false;

function applyTheme() {
  const dark = !printing && (chosenTheme ?? (darkDevice.matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  byId("theme").setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
  byId("theme").querySelector(".text").textContent = dark ? "Light" : "Dark";
  update();
  return dark;
}

byId("theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
});
darkDevice.addEventListener("change", applyTheme);
applyTheme();

// paper is light, and has no folds
const folded = all("details").filter((fold) => !fold.open);
for (const [event, prints] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    printing = prints;
    for (const fold of folded) fold.open = prints;
    applyTheme();
  });
}
