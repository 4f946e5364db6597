// Loaded before the page is painted, so that the chosen colours do not flash in later.
"use strict";
try {
  const theme = localStorage.getItem("amq-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is forbidden: the system's colours */ }
