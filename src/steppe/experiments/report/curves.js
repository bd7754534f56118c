// What was measured while training, and what it cost.
function curve(field) {
  const quantity = data.quantities[field];
  const extent = data.extents.find((one) => one.field === state.extent);
  const traces = [];
  for (const line of data.curves.filter((one) => one.field === field)) {
    const method = methodNamed(line.method);
    const x = line.x[state.extent];
    const common = {meta: method.name, visible: shown(method.name)};
    if (line.several) {
      traces.push({...common, x: [...x, ...[...x].reverse()], y: [...line.high, ...[...line.low].reverse()],
        type: "scatter", mode: "lines", fill: "toself", fillcolor: faint(colorOf(method), 0.16), line: {width: 0}, hoverinfo: "skip"});
    }
    traces.push({...common, x, y: line.mean, type: "scatter", mode: "lines+markers", name: method.label,
      line: {color: colorOf(method), dash: method.dash, width: line.several ? 2.2 : 1.4}, marker: {size: 5},
      text: line.mean.map((mean, i) => `${short(mean)}${line.sd[i] === null ? "" : ` ± ${short(line.sd[i])}`}`),
      hovertemplate: "%{fullData.name}: %{text}<extra></extra>"});
  }
  const beyond = state.extent === "standardized_epoch" && data.further;
  return {data: traces, layout: layout({
    xaxis: {title: extent.title.split(/ =|,/)[0], rangemode: "tozero"}, hovermode: "x unified",
    yaxis: quantity.log ? logAxis(data.curves.filter((one) => one.field === field).map((one) => [...one.low, ...one.high])) : {},
    shapes: beyond ? [{type: "line", x0: data.epochs, x1: data.epochs, yref: "paper", y0: 0, y1: 1,
      line: {color: ink().soft, width: 1, dash: "dash"}}] : [],
  })};
}

function cost(field) {
  const panel = data.pareto[Number(state.cost)];
  const {values, front} = panel[field];
  const traces = [{x: front.map((i) => panel.cost[i].mean), y: front.map((i) => values[i].mean), type: "scatter",
    mode: "lines", line: {shape: "hv", color: faint("#888888", 0.55), width: 3}, hoverinfo: "skip"}];
  panel.methods.forEach((name, i) => {
    const method = methodNamed(name);
    const bar = (sd) => ({type: "data", array: [sd ?? 0], visible: sd !== null, thickness: 1, width: 4, color: colorOf(method)});
    traces.push({x: [panel.cost[i].mean], y: [values[i].mean], error_x: bar(panel.cost[i].sd), error_y: bar(values[i].sd),
      type: "scatter", mode: "markers+text", text: [method.label], textposition: "top right", name: method.label,
      textfont: {color: ink().ink}, cliponaxis: false, meta: name, visible: shown(name),
      marker: {size: 11, symbol: front.includes(i) ? "circle" : "circle-open", color: colorOf(method), line: {width: 2, color: colorOf(method)}},
      hovertemplate: "%{fullData.name}<br>%{x:.4g}, %{y:.4g}<extra></extra>"});
  });
  const all = panel.cost.flatMap((value) => [value.mean - (value.sd ?? 0), value.mean + (value.sd ?? 0)]);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const room = high - low || 1;
  return {data: traces, layout: layout({
    xaxis: {title: panel.axis, range: [low - 0.12 * room, high + 0.28 * room]}, yaxis: {},
  })};
}

function curves() {
  for (const field of Object.keys(data.quantities)) plot(byId(`curve-${field}`), () => curve(field));
  for (const field of ["test_accuracy", "gap"]) plot(byId(`pareto-${field}`), () => cost(field));
  const when = () => { byId("pareto-when").textContent = data.pareto[Number(state.cost)].when; };
  listeners.push(when);
  when();
}
