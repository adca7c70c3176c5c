// Files that leave the page: a chart as SVG, rows as CSV, text as it is.

const DRAWN = ["fill", "stroke", "color"];
const CHOSEN = [...DRAWN, "stroke-width", "stroke-opacity"];

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

/** The chart of a <figure> as a file of its own: light, on white, its legend below, no variable left in it. */
export function downloadSvg(name, figure) {
  const { colorScheme } = figure.style;
  figure.style.colorScheme = "light";
  download(`${name}.svg`, standaloneSvg(figure), "image/svg+xml");
  figure.style.colorScheme = colorScheme;
}

function standaloneSvg(figure) {
  const [svg, legend] = [figure.querySelector(".plot > svg"), figure.querySelector(".legend")];
  svg.style.color = "var(--ink)";
  const copy = svg.cloneNode(true);
  const copies = [copy, ...copy.querySelectorAll("*")];
  for (const [index, node] of [svg, ...svg.querySelectorAll("*")].entries()) resolve(node, copies[index]);
  svg.style.color = "inherit";
  copy.querySelectorAll("style, [aria-label='tip']").forEach((node) => node.remove());
  const [width, height] = [svg.width.baseVal.value, svg.height.baseVal.value];
  const whole = height + legend.offsetHeight + 12;
  const file = d3.select(copy).attr("xmlns", svg.namespaceURI).attr("height", whole).attr("viewBox", [0, 0, width, whole]);
  file.insert("rect", ":first-child").attr("width", width).attr("height", whole).attr("fill", "#fff");
  file.insert("title", ":first-child").text(svg.getAttribute("aria-label"));
  drawLegend(file.append("g").attr("transform", `translate(8,${height})`), legend);
  return new XMLSerializer().serializeToString(copy);
}

function resolve(node, copy) {
  const computed = getComputedStyle(node);
  const chosen = node.closest(".chosen") !== null;
  for (const name of chosen ? CHOSEN : DRAWN) {
    const written = `${node.getAttribute(name)} ${node.style[name]}`;
    if (!chosen && !/var\(|currentColor/i.test(written)) continue;
    copy.style.removeProperty(name);
    copy.setAttribute(name, computed.getPropertyValue(name));
  }
  if (node.tagName === "svg") copy.style.fontFamily = computed.fontFamily;
}

/** The entries of a legend where the page has them. */
function drawLegend(group, legend) {
  const frame = legend.getBoundingClientRect();
  for (const swatch of legend.querySelectorAll(".swatch")) {
    const [box, shapes] = [swatch.getBoundingClientRect(), swatch.classList];
    const [x, y] = [box.left - frame.left, box.top - frame.top + box.height / 2];
    const colour = getComputedStyle(swatch).borderTopColor;
    const fill = shapes.contains("ring") ? "none" : colour;
    if (shapes.contains("square")) group.append("rect").attr("x", x).attr("y", y - 5).attr("width", 11).attr("height", 11).attr("fill", fill);
    else if (shapes.contains("line")) group.append("path").attr("d", `M${x},${y}h18`).attr("stroke", colour).attr("stroke-width", 2);
    else group.append("circle").attr("cx", x + 5).attr("cy", y).attr("r", 4).attr("fill", fill).attr("stroke", colour).attr("stroke-width", 2);
    group.append("text").attr("x", x + box.width + 7).attr("y", y + 4).text(swatch.parentElement.textContent);
  }
}
