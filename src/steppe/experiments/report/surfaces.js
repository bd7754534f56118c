// The loss around each method's weights as surfaces that turn together, drawn from the losses in the page.
const surfaces = all("canvas[data-surface]");
const payload = JSON.parse(byId("payload").textContent);
const colors = payload.colors.map(([place, color]) => [place, rgb(color)]);
const [WIDTH, HEIGHT, SCALE] = [420, 340, 3]; // the unit of all drawing, and pixels of the canvas for each, also on paper
const CENTER = [WIDTH / 2, HEIGHT / 2];
const SIZE = 116; // of half an axis
const TALL = 0.75; // half the height of the losses, in the same unit
const LINES = 14; // lines of equal loss
const camera = {turn: 40, tilt: 28}; // degrees

// The losses of a method in the state, the range of their colors, and how far their axes reach; null if there are none.
function shownOn(canvas) {
  const found = payload.landscapes[state.kind]?.[state.seed]; // one scale and one reach for all methods
  const landscape = found?.methods[canvas.dataset.surface];
  if (landscape === undefined) return null;
  const reach = Math.max(...Object.values(found.methods).flatMap(({axis}) => axis.map(Math.abs))) || 1;
  return {...landscape, reach, range: found[state.scale]};
}

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

const between = (a, b, share) => a + (b - a) * share;

// The color of a share of the range of the losses, darker where the surface turns away from the light.
function colorOf(share, light) {
  const next = Math.max(1, colors.findIndex(([place]) => place >= share));
  const [[low, from], [high, to]] = [colors[next - 1], colors[next]];
  return `rgb(${from.map((part, i) => Math.round(light * between(part, to[i], (share - low) / (high - low))))})`;
}

// A point of the box from -1 to 1 on the canvas, x and y along the directions, z up.
function projection() {
  const [turn, tilt] = [camera.turn, camera.tilt].map((degrees) => (degrees * Math.PI) / 180);
  const [cos, sin, up, down] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
  const near = (x, y) => x * cos + y * sin;
  const at = (x, y, z) => [CENTER[0] + SIZE * (y * cos - x * sin), CENTER[1] + SIZE * (near(x, y) * down - z * TALL * up)];
  return {at, near};
}

// The height of each loss from -1 to 1, and null where it is not finite; each cell is divided once, to be smoother.
function heights(losses, [low, high]) {
  const log = state.scale === "log";
  const height = (loss) => {
    if (loss === null || (log && loss <= 0)) return null;
    const [value, from, to] = log ? [loss, low, high].map(Math.log) : [loss, low, high];
    return to > from ? (2 * (value - from)) / (to - from) - 1 : 0;
  };
  return finer(losses.map((row) => finer(row.map(height))), (a, b) => a.map((value, i) => mean(value, b[i])));
}

function mean(a, b) {
  return a === null || b === null ? null : (a + b) / 2;
}

function finer(values, middle = mean) {
  return values.flatMap((value, i) => (i ? [middle(values[i - 1], value), value] : [value]));
}

function path(context, points) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
}

// Cells from the back to the front, each with its lines of equal loss.
function drawCells(context, axis, z, {at, near}) {
  const cells = [];
  for (let i = 1; i < axis.length; i += 1) {
    for (let j = 1; j < axis.length; j += 1) {
      const corners = [[i - 1, j - 1], [i, j - 1], [i, j], [i - 1, j]].map(([a, b]) => [axis[a], axis[b], z[a][b]]);
      if (corners.every((corner) => corner[2] !== null)) cells.push([near(axis[i], axis[j]), corners]);
    }
  }
  for (const [, corners] of cells.sort((a, b) => a[0] - b[0])) {
    const [[x, y, a], [right, , b], [, far, c], [, , d]] = corners;
    const slope = [(b + c - a - d) / (right - x), (c + d - a - b) / (far - y)];
    const light = 0.82 + (0.18 * (1 - 0.4 * slope[0] + 0.2 * slope[1])) / Math.hypot(1, ...slope);
    context.fillStyle = context.strokeStyle = colorOf((a + b + c + d) / 8 + 0.5, Math.min(light, 1.08));
    context.lineWidth = 0.6; // closes the seam between cells
    path(context, corners.map((corner) => at(...corner)));
    context.closePath();
    context.fill();
    context.stroke();
    drawLines(context, corners, at);
  }
}

function drawLines(context, corners, at) {
  context.strokeStyle = "rgba(255, 255, 255, .4)";
  const [low, high] = [Math.min, Math.max].map((of) => of(...corners.map((corner) => corner[2])));
  for (let line = Math.ceil(((low + 1) / 2) * LINES); line <= ((high + 1) / 2) * LINES; line += 1) {
    const level = (2 * line) / LINES - 1;
    const crossed = corners.flatMap((from, i) => {
      const to = corners[(i + 1) % 4];
      if (from[2] < level === to[2] < level) return [];
      const share = (level - from[2]) / (to[2] - from[2]);
      return [at(between(from[0], to[0], share), between(from[1], to[1], share), level)];
    });
    path(context, crossed.slice(0, 2));
    context.stroke();
  }
}

// The floor, and the losses at the upright edge on the left.
function drawAxes(context, reach, [low, high], {at}, style) {
  const text = (words, [x, y], align) => {
    context.textAlign = align;
    context.fillText(words, x, y);
  };
  const short = (value) => String(Number(value.toPrecision(2))).replace("-", "−");
  context.strokeStyle = style.getPropertyValue("--line");
  context.fillStyle = style.getPropertyValue("--soft");
  context.font = `11px ${style.getPropertyValue("--sans")}`;
  context.textBaseline = "middle";
  context.lineWidth = 0.8;
  for (const side of [-1, 0, 1]) {
    for (const ends of [[[side, -1], [side, 1]], [[-1, side], [1, side]]]) {
      path(context, ends.map(([x, y]) => at(x, y, -1)));
      context.stroke();
    }
  }
  const edge = [[-1, -1], [-1, 1], [1, 1], [1, -1]].sort((a, b) => at(...a, 0)[0] - at(...b, 0)[0])[0];
  path(context, [at(...edge, -1), at(...edge, 1)]);
  context.stroke();
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const [x, y] = at(...edge, 2 * share - 1);
    text(short(state.scale === "log" ? low * (high / low) ** share : between(low, high, share)), [x - 5, y], "right");
  }
  for (const [name, sides] of [["1st", [[-1.16, 0], [1.16, 0]]], ["2nd", [[0, -1.16], [0, 1.16]]]]) {
    const [x, y] = sides.map((side) => at(...side, -1)).sort((a, b) => b[1] - a[1])[0];
    text(`${name}, ±${short(reach)}`, [x, y + 6], "center");
  }
}

function draw(canvas) {
  const {axis, losses, reach, range} = shownOn(canvas);
  const project = projection();
  const [places, z] = [finer(axis.map((place) => place / reach)), heights(losses, range)];
  const style = getComputedStyle(document.documentElement);
  const context = canvas.getContext("2d");
  canvas.width = WIDTH * SCALE; // also clears it
  canvas.height = HEIGHT * SCALE;
  context.scale(SCALE, SCALE);
  context.lineJoin = "round";
  drawAxes(context, reach, range, project, style);
  drawCells(context, places, z, project);
  const middle = places.reduce((best, place, i) => (Math.abs(place) < Math.abs(places[best]) ? i : best), 0);
  if (z[middle][middle] !== null) {
    context.fillStyle = style.getPropertyValue(canvas.dataset.color);
    context.strokeStyle = "#fff";
    context.lineWidth = 1.5;
    context.beginPath();
    context.arc(...project.at(places[middle], places[middle], z[middle][middle]), 4.5, 0, 7);
    context.fill();
    context.stroke();
  }
  canvas.dataset.drawn = `${state.kind} ${state.seed} ${state.scale} ${camera.turn} ${camera.tilt}`;
}

function drawAll() {
  for (const canvas of surfaces) {
    const figure = canvas.closest("figure");
    if (state.view === "3d") figure.hidden = shownOn(canvas) === null;
    if (!figure.hidden && !hidden.has(canvas.dataset.surface)) draw(canvas);
  }
}

let waiting = false;

function turnTo(turn, tilt) {
  camera.turn = Math.round((turn + 720) % 360);
  camera.tilt = Math.round(Math.min(Math.max(tilt, 0), 90));
  for (const slider of all("[data-camera]")) slider.value = camera[slider.dataset.camera];
  if (waiting) return;
  waiting = true; // at most once a frame
  requestAnimationFrame(() => {
    waiting = false;
    drawAll();
  });
}

for (const slider of all("[data-camera]")) {
  slider.addEventListener("input", () => {
    const {turn, tilt} = {...camera, [slider.dataset.camera]: Number(slider.value)};
    turnTo(turn, tilt);
  });
}

// The loss at the point of the grid that is nearest to the pointer.
function readLoss(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const pointer = [event.clientX - box.left, event.clientY - box.top].map((length) => (length * WIDTH) / box.width);
  const {axis, losses, reach, range} = shownOn(canvas);
  const z = heights(losses, range);
  const {at} = projection();
  let best = {distance: 12, text: ""};
  axis.forEach((x, i) => axis.forEach((y, j) => {
    if (z[2 * i][2 * j] === null) return;
    const [left, top] = at(x / reach, y / reach, z[2 * i][2 * j]);
    const distance = Math.hypot(left - pointer[0], top - pointer[1]);
    if (distance < best.distance) best = {distance, text: `loss ${losses[i][j].toPrecision(4)} at ${x}, ${y}`};
  }));
  canvas.closest("figure").querySelector(".reading").textContent = best.text.replaceAll("-", "−");
}

for (const canvas of surfaces) {
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    last = event;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null) return readLoss(canvas, event);
    turnTo(camera.turn - (event.clientX - last.clientX) / 2, camera.tilt + (event.clientY - last.clientY) / 2);
    last = event;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
}

// the colors of the theme are other ones on paper
listeners.push(drawAll);
choose(document.querySelector('[data-choice="view"]'), "3d");
