// Measures over the gap, and spectra: everything that has no direction to be turned in.
function runsOf(method) {
  return data.runs.filter((run) => run.method === method.name);
}

function gapOver() {
  const name = byId("measure").value;
  const traces = data.methods.map((method) => {
    const runs = runsOf(method).filter((run) => (run.values[name] ?? null) !== null && run.gap !== null);
    return {x: runs.map((run) => run.values[name]), y: runs.map((run) => run.gap), text: runs.map((run) => `seed ${run.seed}`),
      type: "scatter", mode: "markers", name: method.label, meta: method.name, visible: shown(method.name),
      marker: {size: 11, color: colorOf(method), opacity: 0.85, line: {width: 1, color: ink().card}},
      hovertemplate: "%{fullData.name}, %{text}<br>%{x:.4g}, gap %{y:.2f}<extra></extra>"};
  });
  return {data: traces, layout: layout({
    xaxis: {title: data.measures[name] ?? name.replaceAll("_", " ")}, yaxis: {title: "gap, points"},
  })};
}

function measures() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.values)))];
  const order = Object.keys(data.measures);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  names.sort((a, b) => place(a) - place(b));
  for (const name of names) byId("measure").add(new Option(data.measures[name] ?? name.replaceAll("_", " "), name));
  byId("measure").addEventListener("change", () => draw(byId("gap-over")));
  if (names.length) plot(byId("gap-over"), gapOver);
}

// Nodes and weights of every probe of every run of a contender, as one list of weighted points of total weight 1.
function nodes(method) {
  const probes = runsOf(method).flatMap((run) => (run.density ? run.density.nodes.map((at, i) => [at, run.density.weights[i]]) : []));
  return probes.flatMap(([at, weight]) => at.map((node, i) => [node, weight[i] / probes.length]))
    .filter(([node, weight]) => Number.isFinite(node) && weight > 0);
}

function spectrumRange() {
  const all = data.methods.flatMap((method) => nodes(method).map(([node]) => node));
  const ticks = data.runs.flatMap((run) => run.eigenvalues?.values ?? []).filter(Number.isFinite);
  return all.length + ticks.length ? [Math.min(...all, ...ticks), Math.max(...all, ...ticks)] : [0, 1];
}

const bandwidth = () => 10 ** Number(byId("width").value) * (spectrumRange()[1] - spectrumRange()[0] || 1);

function spectrum() {
  const sigma = bandwidth();
  const [low, high] = spectrumRange();
  const x = Array.from({length: 600}, (_, i) => low - 4 * sigma + ((high - low + 8 * sigma) * i) / 599);
  const one = 1 / (sigma * Math.sqrt(2 * Math.PI));
  const traces = [];
  let top = one;
  data.methods.forEach((method, place) => {
    const common = {meta: method.name, visible: shown(method.name), name: method.label, type: "scatter"};
    const points = nodes(method);
    if (points.length) {
      const y = x.map((at) => points.reduce((sum, [node, weight]) => sum + weight * one * Math.exp(-0.5 * ((at - node) / sigma) ** 2), 0));
      top = Math.max(top, ...y);
      traces.push({...common, x, y: y.map((value) => value || null), mode: "lines", line: {color: colorOf(method), dash: method.dash, width: 2.2},
        hovertemplate: "%{fullData.name}: %{y:.3g}<extra></extra>"});
    }
    const ticks = runsOf(method).flatMap((run) => run.eigenvalues?.values ?? []).filter(Number.isFinite);
    traces.push({...common, x: ticks, y: ticks.map(() => -place), yaxis: "y2", mode: "markers",
      marker: {symbol: "line-ns", size: 12, line: {width: 1.6, color: faint(colorOf(method), 0.75)}},
      hovertemplate: "%{fullData.name}: eigenvalue %{x:.4g}<extra></extra>"});
  });
  // a single eigenvalue of n weighs 1/n: what lies below is no eigenvalue
  const n = Math.max(...data.runs.map((run) => run.density?.n ?? 0), 1e3);
  const strip = Math.min(0.06 + 0.045 * data.methods.length, 0.4);
  return {data: traces, layout: layout({
    xaxis: {title: "eigenvalue of the Hessian", anchor: "y2"},
    yaxis: {type: "log", dtick: 1, range: [Math.log10((0.2 * one) / n), Math.log10(2 * top)], domain: [strip + 0.02, 1]},
    yaxis2: {domain: [0, strip], range: [0.7 - data.methods.length, 0.7], showticklabels: false, showgrid: false, zeroline: false, fixedrange: true},
  })};
}

function ranks() {
  const traces = [];
  for (const method of data.methods) {
    const runs = runsOf(method).filter((run) => run.eigenvalues);
    for (const run of runs) {
      traces.push({x: run.eigenvalues.values.map((_, i) => i + 1), y: run.eigenvalues.values, type: "scatter", mode: "lines+markers",
        name: method.label, text: run.eigenvalues.values.map(() => `seed ${run.seed}`), meta: method.name, visible: shown(method.name),
        line: {color: faint(colorOf(method), 0.45), width: 1.2}, marker: {size: 7, color: colorOf(method)},
        hovertemplate: "%{fullData.name}, %{text}: %{y:.4g}<extra></extra>"});
    }
  }
  return {data: traces, layout: layout({xaxis: {title: "rank", dtick: 1}, yaxis: {rangemode: "tozero"}})};
}

function spectra() {
  if (!data.runs.length) return absent("spectra");
  const tell = () => { byId("width-out").textContent = `σ = ${short(bandwidth())}`; };
  byId("width").addEventListener("input", () => { tell(); if (drawn.has(byId("spectrum"))) draw(byId("spectrum")); });
  tell();
  plot(byId("spectrum"), spectrum);
  plot(byId("ranks"), ranks);
}

function absent(section) {
  byId(section).hidden = true;
  document.querySelector(`nav a[href="#${section}"]`).hidden = true;
}
