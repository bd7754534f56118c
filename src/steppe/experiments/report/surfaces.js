// The loss around each method's weights as surfaces that turn together. Their figures are in the page as JSON.
const MOST_SURFACES = 6; // a browser has few WebGL contexts, on a phone fewer still
const figures = JSON.parse(byId("payload").textContent); // by kind, seed, scale and method
let camera = {eye: {x: 1.22, y: 1.22, z: 0.9}, center: {x: 0, y: 0, z: -0.17}, up: {x: 0, y: 0, z: 1}};

const surfaces = all(".surface");
const drawn = new Set();
const stale = new Set(); // surfaces that do not show the state yet

const context = document.createElement("canvas").getContext("webgl");
const accelerated = context !== null && !/swiftshader|llvmpipe|software|basic render/i.test(rendererOf(context));
context?.getExtension("WEBGL_lose_context")?.loseContext();

function rendererOf(gl) {
  const named = gl.getExtension("WEBGL_debug_renderer_info");
  return String(gl.getParameter(named ? named.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
}

const figureOf = (element) => figures[state.kind]?.[state.seed]?.[state.scale]?.[element.dataset.surface];

// Replace CSS variables by their values, which plotly cannot read.
function themed(value, style) {
  if (typeof value === "string") return value.replace(/^var\((.*)\)$/, (_, name) => style.getPropertyValue(name).trim());
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => themed(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
}

function draw(element) {
  const {data, layout} = themed(figureOf(element), getComputedStyle(document.documentElement));
  if (!accelerated) data[0].contours.z.show = false;
  const font = {family: getComputedStyle(document.body).fontFamily, size: 12};
  const modebar = {bgcolor: "rgba(0,0,0,0)"};
  const common = {paper_bgcolor: "rgba(0,0,0,0)", showlegend: false, font, modebar, uirevision: "camera"};
  drawn.add(element);
  stale.delete(element);
  return Plotly.react(element, data, {...layout, ...common, scene: {...layout.scene, camera}},
    {responsive: true, displaylogo: false, displayModeBar: "hover", scrollZoom: false, modeBarButtons: [["toImage"]]});
}

// A surface is drawn when it comes near the window: a page of many stays quick.
const near = new IntersectionObserver((entries) => {
  for (const {isIntersecting, target} of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    draw(target);
  }
}, {rootMargin: "500px"});

function follow() {
  let places = MOST_SURFACES;
  let left = 0;
  for (const element of surfaces) {
    const figure = element.closest("figure");
    const wanted = state.view === "3d" && !hidden.has(element.dataset.surface) && figureOf(element) !== undefined;
    const shown = wanted && places > 0;
    if (shown) places -= 1;
    else if (wanted) left += 1;
    figure.hidden = !shown;
    near.unobserve(element);
    if (shown) {
      stale.add(element);
      near.observe(element);
    } else if (drawn.delete(element)) Plotly.purge(element); // gives its WebGL context back
  }
  byId("most").hidden = left === 0;
  byId("most").textContent = `Surfaces are shown of the first ${MOST_SURFACES} methods that are not hidden, contours of all.`;
}

// The others follow each frame while one is held, and as long as it swings out after that.
function makeTurnable(element) {
  let end = 0;
  let running = false;
  const step = () => {
    running = performance.now() < end;
    if (!running) return;
    const now = element._fullLayout?.scene?._scene?.getCamera();
    if (now && ["x", "y", "z"].some((side) => Math.abs(now.eye[side] - camera.eye[side]) > 1e-9)) {
      camera = now;
      end = Math.max(end, performance.now() + 300);
      turnOthers(element);
    }
    requestAnimationFrame(step);
  };
  element.addEventListener("pointerdown", () => {
    const release = () => { end = performance.now() + 800; };
    end = Infinity;
    for (const event of ["pointerup", "pointercancel"]) addEventListener(event, release, {capture: true, once: true});
    if (!running) step();
  }, {capture: true});
  element.addEventListener("keydown", (event) => {
    const turn = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1]}[event.key];
    if (!turn) return;
    event.preventDefault();
    end = 0; // what still swings out would undo the turn
    const {x, y, z} = camera.eye;
    const [cos, sin] = [Math.cos(turn[0]), Math.sin(turn[0])];
    camera = {...camera, eye: {x: x * cos - y * sin, y: x * sin + y * cos, z: Math.min(Math.max(z + turn[1], -2), 2.4)}};
    turnOthers(null);
  });
}

function turnOthers(element) {
  for (const other of drawn) {
    if (other !== element) Plotly.relayout(other, {"scene.camera": camera});
  }
}

surfaces.forEach(makeTurnable);
// the theme is another one on paper, and surfaces that were never near the window are printed too
addEventListener("beforeprint", () => new Set([...drawn, ...stale]).forEach(draw));
listeners.push(follow);
byId("no-webgl").hidden = context !== null;
document.querySelector(".turn").hidden = context === null;
const view = document.querySelector('[data-choice="view"]');
view.querySelector('[data-value="3d"]').disabled = context === null;
choose(view, context === null ? "2d" : "3d");
