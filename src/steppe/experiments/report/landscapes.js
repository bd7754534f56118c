// The loss around each contender's weights: surfaces that turn together, or contours; and lines through it.
const MOST_SURFACES = 6; // a browser has few WebGL contexts, on a phone fewer still
const SCALE = [[0, "#0f2f38"], [0.2, "#1d5560"], [0.4, "#3c7f74"], [0.6, "#7da978"], [0.8, "#c3c87f"], [1, "#f6e9b2"]];
const HOME = {eye: {x: 1.22, y: 1.22, z: 0.9}, center: {x: 0, y: 0, z: -0.17}, up: {x: 0, y: 0, z: 1}};
let camera = HOME;
let webgl = false;
let accelerated = false; // lines on a surface take a processor minutes where there is no graphics card

const gridOf = (method) => data.runs.find((run) => run.method === method.name && String(run.seed) === state.seed)?.[state.kind] ?? null;
const finite = (values) => values.flat().filter((value) => value !== null && (state.scale === "linear" || value > 0));

function lossRange() {
  const all = data.methods.map(gridOf).filter(Boolean).flatMap((grid) => finite(grid.losses));
  return all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
}

function reach() {
  return Math.max(...data.methods.map(gridOf).filter(Boolean).flatMap((grid) => grid.axis.map(Math.abs)), 1e-12);
}

const scaled = (value) => (value === null || (state.scale === "log" && value <= 0) ? null : state.scale === "log" ? Math.log10(value) : value);

function surface(method) {
  const grid = gridOf(method);
  const [low, high] = lossRange();
  const c = ink();
  const size = reach();
  const span = [scaled(low), scaled(high)];
  const room = 0.04 * (span[1] - span[0] || 1);
  const side = {range: [-size, size], showspikes: false, gridcolor: c.grid, zerolinecolor: c.grid, linecolor: c.line,
    showbackground: false, color: c.soft, nticks: 5, tickfont: {size: 10}, title: {text: ""}};
  const z = grid.losses.map((row) => row.map(scaled));
  const lines = {show: accelerated, usecolormap: false, color: "rgba(255,255,255,0.28)", width: 1, highlight: false,
    start: span[0], end: span[1], size: (span[1] - span[0]) / 14 || 1};
  const plain = {show: false, highlight: false};
  const middle = grid.axis.reduce((best, at, i) => (Math.abs(at) < Math.abs(grid.axis[best]) ? i : best), 0);
  const here = z[middle][middle];
  const ticks = tickLabels(span);
  return {
    data: [
      {type: "surface", meta: method.name, name: method.label, visible: shown(method.name), x: grid.axis, y: grid.axis,
        // losses[i][j] goes along the first direction with i: plotly's rows are y
        z: transposed(z), customdata: transposed(grid.losses), cmin: span[0], cmax: span[1], colorscale: SCALE,
        showscale: false, contours: {x: plain, y: plain, z: lines}, connectgaps: false,
        lighting: {ambient: 0.72, diffuse: 0.55, specular: 0.06, roughness: 0.9},
        hovertemplate: "%{x:.3g}, %{y:.3g}<br>loss %{customdata:.4g}<extra></extra>"},
      {type: "scatter3d", meta: method.name, visible: shown(method.name) && here !== null, x: [grid.axis[middle]], y: [grid.axis[middle]],
        z: [here], mode: "markers", marker: {size: 4.5, color: colorOf(method), line: {color: "#ffffff", width: 1}},
        hovertemplate: "the trained weights<extra></extra>"},
    ],
    layout: {...layout(), margin: {l: 0, r: 0, t: 0, b: 0}, uirevision: "camera",
      scene: {xaxis: side, yaxis: side, aspectmode: "manual", aspectratio: {x: 1, y: 1, z: 0.8}, camera, dragmode: "turntable",
        zaxis: {...side, range: [span[0] - room, span[1] + room], ...ticks}}},
  };
}

// A logarithmic axis is drawn as exponents, so that colors and lines are even; its labels are losses.
function tickLabels([low, high]) {
  if (state.scale === "linear") return {};
  const step = Math.max(1, Math.ceil((high - low) / 4));
  const tickvals = [];
  for (let at = Math.floor(low); at <= Math.ceil(high); at += high - low < 1.5 ? 0.5 : step) tickvals.push(at);
  return {tickmode: "array", tickvals, ticktext: tickvals.map((at) => short(Number((10 ** at).toPrecision(2))))};
}

const transposed = (rows) => (rows.length ? rows[0].map((_, j) => rows.map((row) => row[j])) : rows);

function contours(method) {
  const grid = gridOf(method);
  const [low, high] = lossRange().map(scaled);
  const size = reach();
  const c = ink();
  return {
    data: [
      {type: "contour", meta: method.name, name: method.label, visible: shown(method.name), x: grid.axis, y: grid.axis,
        z: transposed(grid.losses.map((row) => row.map(scaled))), customdata: transposed(grid.losses), zmin: low, zmax: high,
        colorscale: SCALE, showscale: false, connectgaps: false, line: {width: 0.8, color: "rgba(255,255,255,0.5)"},
        contours: {start: low, end: high, size: (high - low) / 16 || 1, coloring: "heatmap"},
        hovertemplate: "%{x:.3g}, %{y:.3g}<br>loss %{customdata:.4g}<extra></extra>"},
      {type: "scatter", meta: method.name, visible: shown(method.name), x: [0], y: [0], mode: "markers",
        marker: {size: 9, color: colorOf(method), line: {color: "#ffffff", width: 1.5}}, hovertemplate: "the trained weights<extra></extra>"},
    ],
    layout: layout({
      xaxis: {range: [-size, size], constrain: "domain", showgrid: false, zeroline: false},
      yaxis: {range: [-size, size], scaleanchor: "x", constrain: "domain", showgrid: false, zeroline: false},
      margin: {l: 34, r: 8, t: 6, b: 30}, plot_bgcolor: c.grid,
    }),
  };
}

// One figure a contender that is switched on. What they are made of is thrown away with the view, for its WebGL contexts.
let cells = new Map();
let current = "";

function arrange() {
  const asked = state.view === "3d" && webgl ? "3d" : "2d";
  const there = data.methods.filter((method) => gridOf(method));
  const wanted = there.filter((method) => shown(method.name)).slice(0, asked === "3d" ? MOST_SURFACES : Infinity);
  const most = asked === "3d" && there.filter((method) => shown(method.name)).length > MOST_SURFACES;
  byId("most").hidden = !most;
  byId("most").textContent = `Surfaces are shown of the first ${MOST_SURFACES} contenders that are switched on, contours of all.`;
  if (current !== asked) {
    for (const {element} of cells.values()) forget(element);
    byId("surfaces").replaceChildren();
    cells = new Map();
    current = asked;
  }
  for (const [name, {figure, element}] of cells) {
    figure.hidden = !wanted.some((method) => method.name === name);
    if (figure.hidden && asked === "3d") {
      forget(element);
      figure.remove();
      cells.delete(name);
    }
  }
  for (const method of wanted) if (!cells.has(method.name)) cells.set(method.name, cell(method, asked));
  for (const method of there) if (cells.has(method.name)) byId("surfaces").append(cells.get(method.name).figure);
  legend();
}

function cell(method, view) {
  const figure = document.createElement("figure");
  const caption = figure.appendChild(document.createElement("figcaption"));
  const swatch = caption.appendChild(document.createElement("i"));
  swatch.className = method.dash === "solid" ? "swatch" : "swatch hollow";
  swatch.style.setProperty("--light", method.light);
  swatch.style.setProperty("--dark", method.dark);
  caption.appendChild(document.createElement("b")).textContent = ` ${method.label}`;
  const element = figure.appendChild(document.createElement("div"));
  element.className = `plot ${view === "3d" ? "surface" : "contour"}`;
  element.dataset.surface = method.name;
  element.setAttribute("role", view === "3d" ? "application" : "img");
  element.setAttribute("aria-label", `Training loss around the weights of ${method.label}${view === "3d" ? "; arrow keys turn it" : ""}`);
  if (view === "3d") element.tabIndex = 0;
  plot(element, () => {
    if (!gridOf(method)) return {data: [], layout: layout()};
    return view === "3d" ? surface(method) : contours(method);
  });
  if (view === "3d") turning(element);
  return {figure, element};
}

// The others follow each frame while one is held, and as long as it swings out after that.
function turning(element) {
  let end = 0;
  let running = false;
  const follow = () => {
    running = performance.now() < end;
    if (!running) return;
    const seen = element._fullLayout?.scene?._scene?.getCamera();
    if (seen && !same(seen.eye, camera.eye)) {
      camera = seen;
      end = Math.max(end, performance.now() + 300);
      others(element);
    }
    requestAnimationFrame(follow);
  };
  element.addEventListener("pointerdown", () => {
    const release = () => { end = performance.now() + 800; };
    end = Infinity;
    for (const way of ["pointerup", "pointercancel"]) addEventListener(way, release, {capture: true, once: true});
    if (!running) follow();
  }, {capture: true});
  element.addEventListener("keydown", (event) => {
    const turn = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1]}[event.key];
    if (!turn) return;
    event.preventDefault();
    end = 0; // or what still swings out would take the turn back
    const {x, y, z} = camera.eye;
    const [cos, sin] = [Math.cos(turn[0]), Math.sin(turn[0])];
    camera = {...camera, eye: {x: x * cos - y * sin, y: x * sin + y * cos, z: Math.min(Math.max(z + turn[1], -2), 2.4)}};
    others(null);
  });
}

const same = (a, b) => ["x", "y", "z"].every((side) => Math.abs(a[side] - b[side]) < 1e-9);

function others(element) {
  for (const {element: other} of cells.values()) {
    if (other !== element && drawn.has(other)) Plotly.relayout(other, {"scene.camera": camera});
  }
}

function rendererOf(context) {
  const named = context.getExtension("WEBGL_debug_renderer_info");
  return String(context.getParameter(named ? named.UNMASKED_RENDERER_WEBGL : context.RENDERER));
}

function legend() {
  const [low, high] = lossRange();
  const [from, bar, to] = byId("legend").children;
  from.textContent = short(low);
  to.textContent = `${short(high)} loss${state.scale === "log" ? ", logarithmic" : ""}`;
  bar.style.background = `linear-gradient(90deg, ${SCALE.map(([at, color]) => `${color} ${100 * at}%`).join(", ")})`;
  byId("landscape-axes").textContent = state.kind === "landscape"
    ? "Both axes are random directions whose filters are as long as the weights' own, so 1 is the size of the weights."
    : "Both axes are the two leading eigenvectors of the Hessian, each of length 1: the steepest ways out.";
}

function landscapes() {
  const has = (part) => data.runs.some((run) => run[part]);
  if (!["landscape", "eigen_landscape"].some(has) && !data.lines.length) return absent("landscapes");
  const context = document.createElement("canvas").getContext("webgl");
  webgl = Boolean(context);
  accelerated = webgl && !/swiftshader|llvmpipe|software|basic render/i.test(rendererOf(context));
  context?.getExtension("WEBGL_lose_context")?.loseContext();
  state.seed = String(data.runs.find((run) => run.landscape || run.eigen_landscape)?.seed ?? data.runs[0]?.seed ?? data.lines[0]?.seed);
  if (!has("landscape")) state.kind = "eigen_landscape";
  if (!webgl) state.view = "2d";
  const [low, high] = lossRange();
  if (low > 0 && high / low > 20) state.scale = "log";
  const seeds = [...new Set([...data.runs, ...data.lines].map((run) => String(run.seed)))];
  for (const seed of seeds) {
    const button = byId("seeds").appendChild(document.createElement("button"));
    Object.assign(button, {type: "button", textContent: `Seed ${seed}`});
    button.dataset.value = seed;
  }
  byId("no-webgl").hidden = webgl;
  document.querySelector(".turn").hidden = !webgl;
  document.querySelector('[data-choice="view"] [data-value="3d"]').disabled = !webgl;
  for (const part of ["landscape", "eigen_landscape"]) {
    if (!has(part)) document.querySelector(`[data-choice="kind"] [data-value="${part}"]`).hidden = true;
  }
  if (has("landscape") || has("eigen_landscape")) {
    listeners.push(arrange);
    arrange();
  } else byId("legend").hidden = true;
  throughIt();
}
