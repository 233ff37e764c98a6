// Draws each chart from the specification beside it. Loads nothing.
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.querySelector("script").textContent);
  const options = { mode: "vega-lite", actions: false, renderer: "svg", tooltip: { theme: "custom" } };
  vegaEmbed(place.querySelector(".plot"), spec, options).catch((error) => {
    place.textContent = "This chart could not be drawn: " + error.message;
  });
}

// Marks the section being read in the table of contents.
const links = new Map(
  [...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]),
);
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const a of links.values()) a.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-10% 0px -80% 0px" },
);
for (const section of document.querySelectorAll("main > section")) watcher.observe(section);
