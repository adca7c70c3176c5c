// Files that leave the page: a chart as SVG, rows as CSV, text as it is.

const DRAWN = ["fill", "stroke", "color"];

export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export function downloadCsv(name, rows) {
  download(`${name}.csv`, d3.csvFormat(rows), "text/csv");
}

export function downloadSvg(name, svg) {
  download(`${name}.svg`, standaloneSvg(svg), "image/svg+xml");
}

/** The chart as a file of its own: light, on white, with every colour variable replaced by its value. */
export function standaloneSvg(svg) {
  svg.style.colorScheme = "light";
  const copy = svg.cloneNode(true);
  const copies = [copy, ...copy.querySelectorAll("*")];
  for (const [index, node] of [svg, ...svg.querySelectorAll("*")].entries()) resolve(node, copies[index]);
  svg.style.removeProperty("color-scheme");
  copy.style.removeProperty("color-scheme");
  copy.querySelectorAll("style").forEach((style) => style.remove());
  copy.querySelectorAll("[aria-label='tip']").forEach((tip) => tip.remove());
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const title = document.createElementNS(svg.namespaceURI, "title");
  title.textContent = svg.getAttribute("aria-label");
  const paper = document.createElementNS(svg.namespaceURI, "rect");
  for (const [key, value] of Object.entries({ width: "100%", height: "100%", fill: "#fff" })) paper.setAttribute(key, value);
  copy.prepend(title, paper);
  return new XMLSerializer().serializeToString(copy);
}

function resolve(node, copy) {
  const computed = getComputedStyle(node);
  for (const name of DRAWN) {
    const written = `${node.getAttribute(name)} ${node.style[name]}`;
    if (!/var\(|currentColor/i.test(written) && !node.classList.contains("chosen") && !node.closest(".chosen")) continue;
    copy.style.removeProperty(name);
    copy.setAttribute(name, computed[name]);
  }
  if (node.tagName !== "svg") return;
  copy.style.fontFamily = computed.fontFamily;
  copy.style.color = computed.color;
  copy.style.backgroundColor = "#fff";
}
