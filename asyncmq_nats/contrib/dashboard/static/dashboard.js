// What the pages do in a browser beside htmx: the live refresh, questions before actions,
// selection of rows, keys, copying, charts. No inline code and no eval: see the policy in app.py.
"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const prefix = document.body.dataset.prefix;

  function remember(name, value) {
    try { localStorage.setItem(name, value); } catch { /* forbidden: for this page only */ }
  }
  function recall(name) {
    try { return localStorage.getItem(name); } catch { return null; }
  }

  // -- what was said

  function say({ text, kind }) {
    const box = document.createElement("p");
    box.className = `toast ${kind || "success"}`;
    box.textContent = text;
    $("#said").append(box);
    setTimeout(() => box.remove(), kind === "error" ? 12000 : 6000);
  }
  document.body.addEventListener("said", (event) => say(event.detail));
  document.body.addEventListener("leave", (event) => {
    const toasts = $$("#said .toast");
    const last = toasts[toasts.length - 1];
    try {
      if (last) sessionStorage.setItem("amq-said", JSON.stringify({ text: last.textContent, kind: last.classList[1] }));
    } catch { /* it is said on this page only */ }
    location.assign(event.detail.to);
  });
  try {
    const said = sessionStorage.getItem("amq-said");
    if (said) {
      sessionStorage.removeItem("amq-said");
      say(JSON.parse(said));
    }
  } catch { /* nothing was kept */ }
  document.body.addEventListener("htmx:responseError", (event) => {
    if (event.detail.requestConfig.verb === "get") return staleNow();
    say({ text: event.detail.xhr.responseText.trim().slice(0, 600) || "That did not work.", kind: "error" });
  });
  document.body.addEventListener("htmx:sendError", (event) => {
    if (event.detail.requestConfig.verb === "get") return staleNow();
    say({ text: "The dashboard does not answer.", kind: "error" });
  });

  // -- live

  let paused = recall("amq-paused") === "yes";
  const toggle = $("#live-toggle");
  let sources = 0;

  function showLive(state) {
    toggle.hidden = !sources;
    toggle.setAttribute("aria-pressed", String(!paused));
    toggle.dataset.state = paused ? "paused" : state || "live";
    $(".label", toggle).textContent = paused ? "Paused" : state === "stale" ? "No answer" : "Live";
  }
  function staleNow() { showLive("stale"); }

  // An EventSource that rests while the page is hidden: a browser has six connections per server.
  class LiveSource extends EventTarget {
    constructor(url) {
      super();
      this.url = url;
      this.kinds = new Set();
      this.readyState = EventSource.CONNECTING;
      this.open();
      document.addEventListener("visibilitychange", () => (document.hidden ? this.rest() : this.open()));
      addEventListener("pagehide", () => this.rest());
    }
    open() {
      if (this.inner || this.closed || document.hidden) return;
      this.inner = new EventSource(this.url, { withCredentials: true });
      this.inner.onopen = (event) => { this.readyState = EventSource.OPEN; showLive("live"); this.onopen?.(event); };
      this.inner.onerror = () => {
        staleNow();
        // The browser tries again by itself, unless the answer was no stream.
        if (this.inner?.readyState === EventSource.CLOSED) { this.rest(); setTimeout(() => this.open(), 5000); }
      };
      this.kinds.forEach((kind) => this.forward(kind));
    }
    forward(kind) {
      this.inner.addEventListener(kind, (event) => this.dispatchEvent(new MessageEvent(kind, { data: event.data })));
    }
    addEventListener(kind, listener, options) {
      super.addEventListener(kind, listener, options);
      if (!this.kinds.has(kind)) { this.kinds.add(kind); if (this.inner) this.forward(kind); }
    }
    rest() { this.inner?.close(); this.inner = null; }
    close() { this.closed = true; this.rest(); }
  }
  window.htmx.createEventSource = (url) => { sources += 1; showLive("live"); return new LiveSource(url); };

  const busy = () => paused || $("dialog[open]") || $("#live :is(input.pick, #all-matching):checked") ||
    $("#live form :is(input:not([type=hidden]):not(.pick), textarea, select):focus");
  document.body.addEventListener("htmx:beforeRequest", (event) => {
    if (event.detail.requestConfig.triggeringEvent?.type === "sse:changed" && busy()) event.preventDefault();
  });
  document.body.addEventListener("htmx:afterSwap", () => { if (sources) showLive("live"); showAges(); showPicks(); nameRoles(); });
  toggle.addEventListener("click", () => {
    paused = !paused;
    remember("amq-paused", paused ? "yes" : "no");
    showLive();
    document.body.dispatchEvent(new CustomEvent("amq:live", { detail: { paused } }));
    if (!paused) refresh();
  });
  // A narrow page shows rows as cards: what is a table for the eye no longer stays one for the ear.
  function nameRoles() {
    const roles = { table: "table", thead: "rowgroup", tbody: "rowgroup", tr: "row", td: "cell", "thead th": "columnheader", "tbody th": "rowheader" };
    for (const [selector, role] of Object.entries(roles)) {
      for (const element of $$(selector === "table" ? "table.rows" : `table.rows ${selector}`)) element.setAttribute("role", role);
    }
  }
  function refresh() { window.htmx.trigger(document.body, "refresh"); }

  // What a person opened, ticked or wrote stays when the page is brought up to date.
  window.Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) =>
    !((name === "open" && node instanceof HTMLDetailsElement) || (name === "checked" && node.matches(".pick, .pick-state, #pick-all")));
  window.Idiomorph.defaults.callbacks.beforeNodeMorphed = (node) =>
    !(node instanceof HTMLElement && node.hasAttribute("data-keep"));

  // -- ages

  function inWords(seconds) {
    if (seconds < 1) return "now";
    for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
      if (seconds < size) continue;
      const count = Math.floor(seconds / size);
      const [smaller, name] = { d: [3600, "h"], h: [60, "min"], min: [1, "s"], s: [1, ""] }[unit];
      const rest = Math.floor((seconds - count * size) / smaller);
      return `${count} ${unit}${unit !== "s" && rest && count < 10 ? ` ${rest} ${name}` : ""}`;
    }
  }
  function showAges() {
    const now = Date.now() / 1000;
    for (const element of $$("time[data-at]")) {
      const age = now - Number(element.dataset.at);
      const text = Math.abs(age) < 1 ? "now" : age > 0 ? `${inWords(age)} ago` : `in ${inWords(-age)}`;
      if (element.textContent !== text) element.textContent = text;
    }
  }
  setInterval(() => { if (!document.hidden && !paused) showAges(); }, 1000);

  // -- questions before actions

  function ask(question, typed, then) {
    const dialog = $("#confirm");
    const input = $("#confirm-typed input");
    const yes = $("button[value=yes]", dialog);
    $("#confirm-text").textContent = question;
    $("#confirm-typed").hidden = !typed;
    $("#confirm-typed strong").textContent = typed || "";
    input.value = "";
    input.oninput = () => { yes.disabled = Boolean(typed) && input.value !== typed; };
    input.oninput();
    dialog.returnValue = "no";
    dialog.onclose = () => { if (dialog.returnValue === "yes") then(); };
    dialog.showModal();
    if (typed) input.focus();
  }
  // While a question is asked, the button loses the focus, and htmx forgets which one it was.
  let submitter = null;
  document.body.addEventListener("htmx:configRequest", (event) => {
    if (submitter?.name && submitter.form === event.detail.elt) event.detail.parameters[submitter.name] = submitter.value;
    submitter = null;
  });
  document.body.addEventListener("htmx:confirm", (event) => {
    const element = event.detail.elt;
    submitter = event.detail.triggeringEvent?.submitter;
    const question = event.detail.question || submitter?.dataset.ask;
    if (!question) return;
    event.preventDefault();
    const count = picked().length;
    const meant = $("#all-matching")?.checked ? "all jobs that match" : count === 1 ? "the selected job" : `the ${count} selected jobs`;
    ask(question.replace("{picked}", meant), element.dataset.typed, () => event.detail.issueRequest(true));
  });

  // -- selection of rows

  const picks = () => $$("#live input.pick");
  const picked = () => picks().filter((box) => box.checked);
  function showPicks() {
    const bulk = $("#bulk");
    if (!bulk) return;
    const count = picked().length;
    const all = $("#pick-all");
    if (all) {
      all.checked = count > 0 && count === picks().length;
      all.indeterminate = count > 0 && count < picks().length;
    }
    const matching = $("#all-matching", bulk)?.checked;
    $(".picked", bulk).textContent = matching ? "all that match" : `${count} selected`;
    bulk.classList.toggle("on", count > 0 || Boolean(matching));
    for (const button of $$("button[name=action]", bulk)) button.disabled = !count && !matching;
  }
  document.body.addEventListener("change", (event) => {
    if (event.target.id === "pick-all") picks().forEach((box) => { box.checked = event.target.checked; });
    if (event.target.matches?.(".pick, #pick-all, #all-matching")) showPicks();
    if (event.target.matches?.("[data-submit]")) event.target.form.requestSubmit();
  });
  document.body.addEventListener("refresh", () => {
    picks().forEach((box) => { box.checked = false; });
    const matching = $("#all-matching");
    if (matching) matching.checked = false;
    showPicks();
  });

  // -- copying

  document.body.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    const source = button.dataset.copy ? $(button.dataset.copy) : $("pre", button.parentElement);
    const text = source.value ?? source.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or no https
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = button.dataset.label || "Copy"; }, 1500);
  });

  // -- colours

  $("#theme-toggle").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    remember("amq-theme", root.dataset.theme);
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());

  // -- find

  const find = $("#find");
  async function openFind() {
    find.showModal();
    const list = $("#find-queues");
    if (list.children.length) return;
    const response = await fetch(`${prefix}queues.json`, { headers: { Accept: "application/json" } });
    if (!response.ok) return;
    for (const name of await response.json()) {
      const option = document.createElement("option");
      option.value = name;
      list.append(option);
    }
  }
  $("#find-toggle").addEventListener("click", openFind);
  for (const dialog of $$("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close("no"); });
  }

  // -- keys

  let leader = 0;
  function move(step) {
    const rows = $$("#live [data-row]");
    if (!rows.length) return;
    const at = rows.findIndex((row) => row.contains(document.activeElement));
    const next = rows[Math.min(rows.length - 1, Math.max(0, at + step))];
    $("a", next)?.focus();
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select, dialog")) return;
    if (Date.now() - leader < 1500) {
      leader = 0;
      const to = $(`.top nav a[data-key="${CSS.escape(event.key)}"]`);
      if (to) to.click();
      return;
    }
    const row = document.activeElement?.closest?.("[data-row]");
    const action = {
      g: () => { leader = Date.now(); },
      "/": openFind,
      p: () => { if (!toggle.hidden) toggle.click(); },
      r: refresh,
      t: () => $("#theme-toggle").click(),
      j: () => move(1),
      k: () => move(-1),
      x: () => { const box = row && $("input.pick", row); if (box) box.click(); },
      "?": () => $("#keys").showModal(),
    }[event.key];
    if (action) { event.preventDefault(); action(); }
  });

  // -- charts

  const charts = new Map();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const shorten = (value) => value === null || value === undefined ? "–" :
    Math.abs(value) >= 1e6 ? `${+(value / 1e6).toFixed(1)}M` : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` :
      String(+value.toPrecision(3));
  const inSeconds = (value) => value === null || value === undefined ? "–" :
    value < 1 ? `${+(value * 1000).toPrecision(3)} ms` : value < 120 ? `${+value.toPrecision(3)} s` : inWords(value);

  const two = (value) => String(value).padStart(2, "0");
  const clock = (_, ticks, __, ___, step) => ticks.map((tick) => {
    const at = new Date(tick * 1000);
    return step >= 43200 ? `${two(at.getMonth() + 1)}-${two(at.getDate())}` : `${two(at.getHours())}:${two(at.getMinutes())}`;
  });

  function draw(element, data) {
    charts.get(element)?.plot.destroy();
    const words = data.unit === "s" ? inSeconds : shorten;
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(160, $(".plot", element).clientWidth), height: Number(element.dataset.height || 180),
      cursor: { points: { size: 6 } }, legend: { live: true },
      // Without a pointer over it, the legend tells the last values.
      hooks: { setLegend: [(plot) => { if (plot.legend.idx == null) plot.setLegend({ idx: data.at.length - 1 }, false); }] },
      scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, data.unit === "s" ? 0.001 : 1) * 1.1] } },
      axes: [{ ...axis, size: 28, values: clock }, { ...axis, size: 56, values: (_, ticks) => ticks.map(words) }],
      series: [{ value: "{MM}-{DD} {HH}:{mm}" }, ...data.series.map((line) => ({
        label: line.label, stroke: colour(line.colour), width: 1.75, spanGaps: false,
        points: { show: line.values.filter((value) => value !== null).length < 40 && data.unit === "s", size: 5, fill: colour(line.colour) },
        fill: line.fill ? `color-mix(in srgb, ${colour(line.colour)} 14%, transparent)` : undefined,
        value: (_, value) => words(value),
      }))],
    };
    const body = $(".plot", element);
    body.replaceChildren();
    const plot = new window.uPlot(options, [data.at, ...data.series.map((line) => line.values)], body);
    plot.setLegend({ idx: data.at.length - 1 }, false);
    charts.set(element, { data, plot });
  }
  function drawAll() { for (const [element, { data }] of [...charts]) draw(element, data); }

  let lastLoad = 0;
  async function loadCharts() {
    const elements = $$("[data-chart]");
    if (!elements.length) return;
    lastLoad = Date.now();
    const sources = new Map();
    for (const element of elements) {
      const url = element.dataset.chart;
      if (!sources.has(url)) sources.set(url, fetch(url, { headers: { Accept: "application/json" } }).then((r) => (r.ok ? r.json() : null), () => null));
      const found = await sources.get(url);
      const data = found?.[element.dataset.part];
      if (data && data.series.some((line) => line.values.some((value) => value))) {
        element.dataset.state = "drawn";
        draw(element, data);
      } else {
        element.dataset.state = found ? "empty" : "none";
      }
    }
  }
  function renewCharts() { if (!document.hidden && !paused && Date.now() - lastLoad > 9500) loadCharts(); }
  document.body.addEventListener("sse:changed", renewCharts);
  setInterval(renewCharts, 10000);
  let resizing = 0;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawAll, 150); });

  // -- events as they come

  const feed = $("#feed");
  if (feed) {
    let waiting = [];
    const only = () => new Set($$("input[name=event]:checked", $("#feed-filter")).map((box) => box.value));
    const text = () => $("input[name=text]", $("#feed-filter")).value.trim().toLowerCase();
    const fits = (row, wanted, needle) => row.dataset.event === "more" || (wanted.has(row.dataset.event) && (!needle || row.textContent.toLowerCase().includes(needle)));
    function filter() {
      const wanted = only(), needle = text();
      for (const row of feed.children) row.hidden = !fits(row, wanted, needle);
      while (feed.children.length > 500) feed.lastElementChild.remove();
      $("#feed-empty").hidden = [...feed.children].some((row) => !row.hidden);
      showAges();
    }
    const rowsOf = (html) => {
      const template = document.createElement("template");
      template.innerHTML = html;
      return [...template.content.children];
    };
    $("#feed-filter").addEventListener("input", filter);
    $("#feed-filter").addEventListener("submit", (event) => event.preventDefault());
    const show = () => {
      if (paused || !waiting.length) return;
      feed.prepend(...rowsOf(waiting.reverse().join("")));
      waiting = [];
      filter();
    };
    // What happened while there was no stream: each new row goes where its time belongs.
    const fill = (event) => {
      const known = new Set([...feed.children].map((row) => row.dataset.key));
      for (const row of rowsOf(event.data).filter((each) => !known.has(each.dataset.key))) {
        const at = (other) => Number($("time", other)?.dataset.at ?? Infinity);
        feed.insertBefore(row, [...feed.children].find((other) => at(other) < at(row)) ?? null);
      }
      filter();
    };
    filter();
    const source = new LiveSource(feed.dataset.source);
    sources += 1;
    showLive("live");
    source.addEventListener("past", fill);
    source.addEventListener("events", (event) => { waiting.push(event.data); if (waiting.length > 50) waiting.shift(); show(); });
    document.body.addEventListener("amq:live", show);
  }

  showLive("live");
  showAges();
  showPicks();
  nameRoles();
  // Of menus that are wider than the page, the chosen one is in sight.
  for (const chosen of $$(".top nav [aria-current], .tabs [aria-current]")) {
    const menu = chosen.parentElement;
    menu.scrollLeft = chosen.offsetLeft - menu.offsetLeft - (menu.clientWidth - chosen.offsetWidth) / 2;
  }
  loadCharts();
  document.documentElement.dataset.ready = "yes";
})();
