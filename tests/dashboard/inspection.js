// What the tests of accessibility ask of a page; a function `find…` returns what is wrong.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const short = (element) => element.outerHTML.slice(0, 120);
const isShown = (element) => element.checkVisibility({ visibilityProperty: true });

function chartsAreThere() {
  return all("[data-chart]").every((each) => each.dataset.state);
}

// -- names and order

function isNamed(e) {
  const label = e.id && document.querySelector(`label[for="${e.id}"]`);
  const text = (e.innerText || "").trim() || e.textContent.trim();
  return text || e.getAttribute("aria-label") || e.title || e.closest("label") || label;
}

function findMalformed() {
  const named = "a, button, input:not([type=hidden]), select, textarea, summary, img:not([alt])";
  const unnamed = all(`${named}, [role=img]:not([aria-label])`).filter((e) => !isNamed(e));
  const untold = all("table.rows :is(tr, th, td):not([role])");
  const unlabelled = all("table.rows tbody td:not([data-label]):not(.pick)");
  const dangling = all("[aria-labelledby]").filter(
    (e) => !document.getElementById(e.getAttribute("aria-labelledby")));
  const ids = all("[id]").map((e) => e.id);
  const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
  const levels = all("h1, h2, h3").filter(isShown).map((e) => Number(e.tagName[1]));
  const jumps = levels.filter((level, at) => level > (levels[at - 1] ?? 0) + 1);
  const parts = ["header", "main", "nav[aria-label]", "title", "h1", "html[lang]"];
  return [
    ...[...unnamed, ...untold, ...unlabelled, ...dangling].map(short),
    ...twice.map((id) => `twice: ${id}`),
    ...jumps.map((level) => `jumps to heading ${level}`),
    ...parts.filter((each) => !document.querySelector(each)).map((each) => `no ${each}`),
    ...(all("h1").length > 1 ? ["two h1"] : []),
  ];
}

// -- places

const PARENTS = ".filters, .headline, .buttons, .tools, .bulk, .rows :is(td, th), .feed li, " +
  ".logs li, .group-head, .cards, .pager, .crumbs";

function findOverlaps() {
  const found = [];
  for (const parent of all(PARENTS)) {
    const right = parent.getBoundingClientRect().right + 2;
    const boxes = all(":scope > *", parent)
      .filter((e) => e.checkVisibility() && !e.matches(".only-read, br"))
      .flatMap((e) => [...e.getClientRects()].map((box) => [e, box]));
    boxes.forEach(([one, a], at) => {
      for (const [other, b] of boxes.slice(at + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (one !== other && wide > 2 && high > 4) found.push(`${short(one)} and ${short(other)}`);
      }
      if (a.right > right && !one.closest(".chip, .flow")) found.push(`cut: ${short(one)}`);
    });
  }
  for (const field of all(".filters > label > :is(input, select)").filter(isShown)) {
    const label = field.parentElement.getBoundingClientRect();
    if (field.getBoundingClientRect().right > label.right + 2) found.push(`cut: ${short(field)}`);
  }
  return found;
}

// -- colours

// A colour is red, green, blue from 0 to 255, and its opacity.
function parse(text) {
  const [red, green, blue, alpha = 1] = text.match(/[-+.\d]+(?:e[-+]?\d+)?/g).map(Number);
  const scale = text.startsWith("color(") ? 255 : 1;
  return [red * scale, green * scale, blue * scale, alpha];
}

function over(top, below) {
  const mix = (at) => top[at] * top[3] + below[at] * (1 - top[3]);
  return [mix(0), mix(1), mix(2), 1];
}

function colourBehind(element) {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const box = at.tagName === "g" && at.querySelector("rect"); // of a picture of a flow
    layers.push(parse(box ? getComputedStyle(box).fill : getComputedStyle(at).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
}

function luminance(colour) {
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const [red, green, blue] = colour.slice(0, 3).map((value) => linear(value / 255));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(text, ground) {
  const [low, high] = [over(parse(text), ground), ground].map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function findPale() {
  for (const details of all("details")) details.open = true;
  const found = [];
  const check = (element, colour, least, what) => {
    const ratio = contrast(colour, colourBehind(element));
    if (ratio < least) found.push(`${what} ${ratio.toFixed(2)}: ${short(element)}`);
  };
  for (const e of all("*", document.body)) {
    if (!isShown(e) || e.closest(":disabled, .only-read, .skip, canvas")) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    if ([...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) {
      const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      const colour = e instanceof SVGElement ? style.fill : style.color;
      check(e, colour, isLarge ? 3 : 4.5, "text");
    }
    if (e.placeholder) check(e, getComputedStyle(e, "::placeholder").color, 4.5, "placeholder");
    if (e.matches("select, textarea, input:not([type=hidden], [type=checkbox])")) {
      check(e, style.borderTopColor, 3, "border");
    }
  }
  return found;
}

// -- the focus

function pathOfFocus() {
  const path = [];
  for (let e = document.activeElement; e.parentElement; e = e.parentElement) {
    path.push([...e.parentElement.children].indexOf(e));
  }
  return path.join(" ");
}

function countReachable() {
  const fields = "button, input:not([type=hidden]), select, textarea";
  return all(`a[href], :is(${fields}):not(:disabled), summary, [tabindex="0"]`)
    .filter(isShown).length;
}

function findUnseenFocus() {
  const e = document.activeElement, style = getComputedStyle(e), found = [];
  const box = e.getBoundingClientRect(), ground = colourBehind(e.parentElement);
  const header = document.querySelector(".top").getBoundingClientRect();
  const top = e.closest(".top, .skip") ? 0 : header.bottom;
  const isOutlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1.5;
  if (!isOutlined) found.push("no outline");
  else if (contrast(style.outlineColor, ground) < 3) found.push("pale outline");
  if (box.width < 2 || box.height < 2) found.push("no size");
  if (box.bottom < top + 2 || box.top > innerHeight) found.push(`out of sight at ${box.top}`);
  return found.map((each) => `${each}: ${short(e)}`);
}
