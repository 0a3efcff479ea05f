// Draws every figure with the colours that the style sheet has at this moment.

const root = document.documentElement;
const touch = matchMedia("(pointer: coarse)").matches;
const config = {
  displaylogo: false,
  displayModeBar: touch ? false : "hover",
  // A full list, because the default one has a button that uploads the plot.
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

function resolve(node, style) {
  if (typeof node === "string") {
    return node.startsWith("var(--") ? style.getPropertyValue(node.slice(4, -1)).trim() : node;
  }
  if (Array.isArray(node)) return node.map((item) => resolve(item, style));
  if (node === null || typeof node !== "object") return node;
  return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, resolve(value, style)]));
}

// How many lines a legend takes is known once it is drawn; the figure grows by them, the plot keeps its height.
function makeRoom(element, { height, margin }) {
  const legend = element.querySelector("g.legend .bg");
  if (!legend) return;
  const taken = legend.getBBox().height;
  Plotly.relayout(element, { height: height + taken, "margin.t": margin.t + taken });
}

function draw() {
  const style = getComputedStyle(root);
  for (const { name, data, layout } of drawings) {
    const element = document.getElementById(name);
    const frame = { ...resolve(layout, style), width: element.clientWidth };
    Plotly.react(element, resolve(data, style), frame, config);
    makeRoom(element, layout);
  }
}

function drawOnPaper(on) {
  root.classList.toggle("printing", on);
  draw();
}

// A button at each piece of code; without a clipboard, code is still text to select.
function offerCopy(block) {
  const frame = document.createElement("div");
  const button = Object.assign(document.createElement("button"), { className: "copy", type: "button", textContent: "Copy" });
  frame.className = "code";
  block.replaceWith(frame);
  frame.append(block, button);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.textContent.trim());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

if (navigator.clipboard) document.querySelectorAll("pre").forEach(offerCopy);

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
matchMedia("print").addEventListener("change", (event) => drawOnPaper(event.matches));
addEventListener("beforeprint", () => drawOnPaper(true));
addEventListener("afterprint", () => drawOnPaper(false));
addEventListener("resize", () => requestAnimationFrame(draw));
draw();
