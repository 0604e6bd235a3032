"""The page's script: switches, reading out curves, going through grids. The page works without."""

SCRIPT = """
"use strict";
const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
document.body.classList.add("scripted");

for (const name of ["log", "smooth"]) {
  const box = $(`#switch-${name}`);
  if (!box) continue;
  const set = () => document.body.classList.toggle(name, box.checked);
  box.addEventListener("change", set);
  set();
}

// Curves: the legend shows the values at the cursor, and the last ones without it.
const charts = JSON.parse($("#curves").textContent);
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] > x) high = middle; else low = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
};
for (const [name, chart] of Object.entries(charts)) {
  const figure = document.getElementById(name), svg = $("svg", figure);
  const cursor = $(".cursor", svg), at = $(".at", figure), values = all(".legend b", figure);
  const notes = all(".legend small", figure);
  const xs = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const texts = new Map(chart.lines.flatMap((line) => line.x.map((x, i) => [x, line.at[i]])));
  let place = null;
  const show = (index) => {
    place = index;
    const x = index === null ? xs.at(-1) : xs[index];
    at.textContent = `${chart.label} ${texts.get(x)}`;
    chart.lines.forEach((line, i) => {
      const near = index === null ? line.x.length - 1 : nearest(line.x, x);
      values[i].textContent = line.y[near];
      notes[i].textContent = line.x[near] === x ? "" : ` at ${line.at[near]}`;
    });
    const share = (x - chart.low) / (chart.high - chart.low);
    const where = chart.left + share * (chart.right - chart.left);
    cursor.setAttribute("transform", `translate(${where} 0)`);
    cursor.style.visibility = index === null ? "hidden" : "visible";
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const inside = (event.clientX - box.left) / box.width * chart.width;
    const share = (inside - chart.left) / (chart.right - chart.left);
    show(nearest(xs, chart.low + share * (chart.high - chart.low)));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    show(Math.max(0, Math.min(xs.length - 1, (place ?? xs.length - 1) + way)));
  });
}

// Grids: one at a time, by slider or thumbnail; a click enlarges it.
const steps = all(".step"), slider = $("#step"), strip = $(".strip"), dialog = $("dialog");
if (steps.length) {
  const thumbs = steps.map((step, index) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    image.src = $("img", step).src;
    image.alt = "";
    button.append(image, `step ${step.dataset.step}`);
    button.addEventListener("click", () => choose(index));
    strip.append(button);
    return button;
  });
  const choose = (index) => {
    steps.forEach((step, i) => step.classList.toggle("on", i === index));
    thumbs.forEach((thumb, i) => thumb.setAttribute("aria-current", i === index));
    strip.scrollLeft = thumbs[index].offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
    slider.value = index;
    slider.setAttribute("aria-valuetext", `step ${steps[index].dataset.step}`);
  };
  slider.addEventListener("input", () => choose(Number(slider.value)));
  choose(steps.length - 1);
  for (const image of all(".step img")) image.addEventListener("click", () => {
    const large = $("img", dialog);
    large.src = image.src;
    large.alt = image.alt;
    large.className = image.className;
    dialog.showModal();
  });
  dialog.addEventListener("click", () => dialog.close());
}
"""
