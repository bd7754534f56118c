// Lines through the landscape: away from a minimum, and from one to another.
function profile() {
  const traces = [];
  for (const method of data.methods) {
    const runs = runsOf(method).filter((run) => run.profile);
    if (!runs.length) continue;
    const {axis} = runs[0].profile;
    // a hole in one run is a hole: a mean of the others would be another quantity
    const at = axis.map((_, i) => runs.map((run) => run.profile.losses[i]));
    const mean = at.map((values) => (values.includes(null) ? null : values.reduce((a, b) => a + b, 0) / values.length));
    const sd = at.map((values, i) => (mean[i] === null || values.length < 2 ? 0
      : Math.sqrt(values.reduce((sum, value) => sum + (value - mean[i]) ** 2, 0) / (values.length - 1))));
    const common = {meta: method.name, visible: shown(method.name), type: "scatter", mode: "lines", connectgaps: false};
    if (runs.length > 1) {
      const low = at.map((values, i) => (mean[i] === null ? null : Math.max(mean[i] - sd[i], Math.min(...values))));
      traces.push({...common, x: axis, y: low, line: {width: 0}, hoverinfo: "skip"});
      traces.push({...common, x: axis, y: mean.map((value, i) => (value === null ? null : value + sd[i])), line: {width: 0}, fill: "tonexty",
        fillcolor: faint(colorOf(method), 0.16), hoverinfo: "skip"});
    }
    traces.push({...common, x: axis, y: mean, name: method.label, line: {color: colorOf(method), dash: method.dash, width: 2.2},
      hovertemplate: "%{fullData.name}: %{y:.4g}<extra></extra>"});
  }
  return {data: traces, layout: layout({hovermode: "x unified", xaxis: {title: "length along the direction"}, yaxis: lossAxis(traces)})};
}

function between() {
  const traces = [];
  const pairs = data.lines.filter((line) => String(line.seed) === state.seed);
  for (const line of pairs) {
    const other = methodNamed(line.b);
    const ends = `${methodNamed(line.a)?.label ?? line.a} → ${other?.label ?? line.b}`;
    for (const [split, dash] of [["train", "solid"], ["test", "dot"]]) {
      if (!line[split]) continue;
      traces.push({x: line.axis, y: line[split], type: "scatter", mode: "lines", connectgaps: false, meta: line.b,
        visible: shown(line.a) && shown(line.b), opacity: line.reestimated ? 1 : 0.6,
        name: `${ends}, ${split}`, line: {color: other ? colorOf(other) : ink().soft, dash, width: 2.2},
        hovertemplate: "%{fullData.name}: %{y:.4g}<extra></extra>"});
    }
  }
  const from = [...new Set(pairs.map((line) => methodNamed(line.a)?.label ?? line.a))];
  const to = [...new Set(pairs.map((line) => methodNamed(line.b)?.label ?? line.b))];
  return {data: traces, layout: layout({
    margin: {l: 46, r: 26, t: 8, b: 40},
    xaxis: {range: [-0.02, 1.02], tickvals: [0, 0.25, 0.5, 0.75, 1], ticktext: [from.length === 1 ? from[0] : "0", "¼", "½", "¾", to.length === 1 ? to[0] : "1"]},
    yaxis: lossAxis(traces),
  })};
}

const lossAxis = (traces) => (state.scale === "log" ? logAxis(traces.map((trace) => trace.y)) : {rangemode: "tozero"});

function throughIt() {
  const profiles = data.runs.some((run) => run.profile);
  byId("profile-figure").hidden = !profiles;
  byId("lines-figure").hidden = !data.lines.length;
  if (profiles) plot(byId("profile"), profile);
  if (!data.lines.length) return;
  plot(byId("lines"), between);
  const about = data.lines.some((line) => line.reestimated)
    ? "Batch norm's statistics were estimated anew at each point of the line. " : "Weights and buffers are mixed as they are. ";
  byId("lines-about").textContent = `Solid: train, dotted: test. ${about}A bump says that two runs ended in basins of their own.`;
}
