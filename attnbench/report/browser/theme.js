// Light or dark: as the system says, until the button says otherwise.
"use strict";

const theme = {
  kept() {
    try {
      return localStorage.getItem("attnbench-theme");
    } catch {
      return null; // a browser that keeps nothing for files
    }
  },
  get isDark() {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  set(name) {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("attnbench-theme", name);
    } catch {} // see above
    dispatchEvent(new Event("theme"));
  },
};
if (theme.kept()) document.documentElement.dataset.theme = theme.kept();

addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  const name = () => (button.textContent = theme.isDark ? "Light" : "Dark");
  button.hidden = false;
  button.addEventListener("click", () => theme.set(theme.isDark ? "light" : "dark"));
  addEventListener("theme", name);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));
  name();
});
