/* The colour theme: the system's, or the reader's choice from localStorage. A classic script in <head>, so that the
   choice is on the page before the first paint. Other modules hear about a change by the "themechange" event. */
(function () {
  "use strict";
  const KEY = "olympus-theme";
  const ORDER = ["system", "light", "dark"];
  const LABELS = { system: "follows the system", light: "light", dark: "dark" };

  function stored() {
    try {
      const value = localStorage.getItem(KEY);
      return ORDER.includes(value) ? value : "system";
    } catch {
      return "system"; // storage can be forbidden; the page still works
    }
  }

  function apply(theme) {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme-toggle");
    if (button) {
      button.setAttribute("aria-label", `Colour theme: ${LABELS[theme]}`);
      button.title = `Colour theme: ${LABELS[theme]}`;
    }
  }

  function announce() {
    window.dispatchEvent(new Event("themechange"));
  }

  let theme = stored();
  apply(theme);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", announce);
  document.addEventListener("DOMContentLoaded", () => {
    apply(theme);
    document.getElementById("theme-toggle").addEventListener("click", () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // Without storage the choice lasts as long as the page.
      }
      apply(theme);
      announce();
    });
  });
})();
