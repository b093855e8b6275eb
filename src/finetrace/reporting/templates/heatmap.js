"use strict";
// The heat map: queries by training examples for one method. Plotly draws it; every name goes through plain().
const finetraceMap = (() => {
  // Lightness falls all the way from the strongest opponent to the strongest proponent, and the hue changes at 0.
  const SIGNED = [[0, "#ffe04a"], [0.25, "#d8c577"], [0.5, "#aaa8a3"], [0.75, "#4f6a9a"], [1, "#0a2050"]];
  const ONE_SIDED = [[0, "#eeece6"], [0.35, "#b3b8c1"], [0.7, "#4f6fa0"], [1, "#0a2050"]];
  const TEXT = 11; // font size; a character is about 0.56 of it wide

  // Plotly reads tags and entities in its texts; make any text literal, and short enough for an axis.
  const plain = (text, length) => {
    const characters = [...text];
    const short = characters.length > length ? characters.slice(0, length - 1).join("") + "\u2026" : text;
    return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  };
  const name = (label) => (label === null ? "no label" : label);

  // Percentile of each cell within its row: 0 lowest, 100 highest, ties share their mean.
  function percentiles(line) {
    const order = line.map((_, i) => i).filter((i) => line[i] !== null).sort((a, b) => line[a] - line[b]);
    const out = line.map(() => null);
    for (let from = 0; from < order.length;) {
      let to = from;
      while (to + 1 < order.length && line[order[to + 1]] === line[order[from]]) to += 1;
      for (let i = from; i <= to; i += 1) {
        out[order[i]] = order.length > 1 ? (50 * (from + to)) / (order.length - 1) : 50;
      }
      from = to + 1;
    }
    return out;
  }

  // Colour limits from the scores: symmetric about 0 where both signs occur, at the 99th percentile of |score|.
  function scale(cells) {
    const values = cells.flat().filter((value) => value !== null).sort((a, b) => a - b);
    const at = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];
    if (!values.length) return { low: -1, high: 1, signed: true, clipped: false };
    const [min, max] = [values[0], values[values.length - 1]];
    if (min < 0 && max > 0) {
      const sizes = values.map(Math.abs).sort((a, b) => a - b);
      const limit = at(sizes, 0.99) || at(sizes, 1);
      return { low: -limit, high: limit, signed: true, clipped: limit < at(sizes, 1) };
    }
    const [low, high] = [at(values, 0.01), at(values, 0.99)];
    if (low < high) return { low, high, signed: false, clipped: low > min || high < max };
    return min < max ? { low: min, high: max, signed: false, clipped: false }
      : { low: min - 1, high: max + 1, signed: false, clipped: false };
  }

  function draw(node, data, state, format, width) {
    const method = data.methods[state.method];
    const { order, groups: rowGroups } = data.rows;
    const { groups, binned } = data.columns;
    const cells = order.map((query) => method.cells[query]);
    const [m, n] = [cells.length, data.columns.names.length];
    const limits = state.ranks ? { low: 0, high: 100, signed: false } : scale(cells);

    const narrow = width < 700;
    const named = (list) => list.some((group) => group.label !== null);
    const height = Math.max(200, Math.min(620, 15 * m));
    const rowHeight = height / m;
    const rowIds = rowHeight >= 11;
    const idLength = narrow ? 9 : 22;
    const left = rowIds ? 10 + 6.3 * Math.min(idLength, Math.max(...data.queries.map((query) => query.id.length))) : 12;
    const rightNames = named(rowGroups) && !narrow;
    const nameLength = (list) => Math.max(...list.map((group) => name(group.label).length));
    const right = rightNames ? 14 + 6.3 * Math.min(22, nameLength(rowGroups)) : narrow ? 8 : 70;
    const columnWidth = (width - left - right) / n;
    const size = (group, unit) => (group.stop - group.start) * unit;
    const fits = groups.every((group) => name(group.label).length * 6.3 < size(group, columnWidth) - 4);
    const top = !named(groups) ? 12 : fits ? 26 : 14 + 6.3 * Math.min(20, nameLength(groups)) * 0.9;
    const centre = (group) => (group.start + group.stop - 1) / 2;
    const bold = (group, text) => (group.label !== null && group.label === data.target ? `<b>${text}</b>` : text);
    const labelled = groups.filter((group) => named(groups) && size(group, columnWidth) >= TEXT + 1);

    const edge = (position, axis) => ({
      type: "line", xref: axis === "x" ? "x" : "paper", yref: axis === "y" ? "y" : "paper",
      x0: axis === "x" ? position : 0, x1: axis === "x" ? position : 1,
      y0: axis === "y" ? position : 0, y1: axis === "y" ? position : 1,
      line: { width: 2, color: "#000" }, name: "edge",
    });
    const at = order.indexOf(state.query);
    const chosen = {
      type: "rect", xref: "paper", yref: "y", x0: 0, x1: 1, y0: at - 0.5, y1: at + 0.5,
      line: { width: 2, color: "#d1490b" }, fillcolor: "rgba(0,0,0,0)",
    };
    const rowNames = rightNames ? rowGroups.filter((group) => size(group, rowHeight) >= TEXT).map((group) => ({
      text: bold(group, plain(name(group.label), 22)), xref: "paper", yref: "y", x: 1, y: centre(group),
      xanchor: "left", xshift: 6, showarrow: false, font: { size: TEXT },
    })) : [];

    const trace = {
      type: "heatmap", z: state.ranks ? cells.map(percentiles) : cells, zmin: limits.low, zmax: limits.high, zsmooth: false,
      colorscale: limits.signed || state.ranks ? SIGNED : ONE_SIDED, hoverinfo: "none",
      colorbar: {
        orientation: "h", x: 0, xanchor: "left", xref: "paper", y: 0, yanchor: "top", yref: "paper", ypad: 10, xpad: 0,
        len: Math.min(360, width - left - right - 20), lenmode: "pixels", thickness: 10, outlinewidth: 0,
        tickfont: { size: TEXT }, nticks: narrow ? 4 : 6, exponentformat: "power",
      },
    };
    const layout = {
      width, height: height + top + 54, margin: { l: left, r: right, t: top, b: 54, pad: 0 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { size: TEXT, family: "system-ui, sans-serif" },
      xaxis: {
        side: "top", tickvals: labelled.map(centre), ticktext: labelled.map((g) => bold(g, plain(name(g.label), 20))),
        tickangle: fits ? 0 : narrow ? -90 : -60, showgrid: false, zeroline: false, ticks: "", range: [-0.5, n - 0.5], fixedrange: narrow,
      },
      yaxis: {
        range: [m - 0.5, -0.5], fixedrange: true, showgrid: false, zeroline: false, ticks: "",
        tickvals: rowIds ? order.map((_, i) => i) : [],
        ticktext: rowIds ? order.map((query) => plain(data.queries[query].id, idLength)) : [],
      },
      shapes: [
        chosen,
        ...groups.slice(1).map((group) => edge(group.start - 0.5, "x")),
        ...rowGroups.slice(1).map((group) => edge(group.start - 0.5, "y")),
      ],
      annotations: rowNames, dragmode: narrow ? false : "zoom",
    };
    Plotly.react(node, [trace], layout, { displayModeBar: false, responsive: false });

    const colours = state.ranks
      ? "Colour: percentile of the score within the query, 100 = highest; signs are not visible in this view."
      : `Colour: score, ${method.unit}; ` + (limits.signed ? "the scale is centred at 0" : "no score changes sign, so the "
        + `scale runs from ${format(limits.low)} to ${format(limits.high)}`)
        + (limits.clipped ? ", and the most extreme 1% share the end colours." : ".");
    return [
      `${method.name}: ${m} ${m === 1 ? "query" : "queries"} (rows) by ${data.total.toLocaleString("en")} training examples (columns).`,
      binned ? `Columns are binned: ${n} columns, each the mean over training examples of one label.` : "",
      colours,
      labelled.length < groups.length && named(groups) ? "Labels too narrow to name appear on hover." : "",
      "The outlined row is the chosen query; a click on a row chooses it.",
      narrow ? "" : "Drag across columns to zoom, double-click to return.",
    ].filter(Boolean).join(" ");
  }

  // What the pointer is on, in words. `point` is a Plotly event point.
  function describe(data, state, point, format) {
    const [row, column] = point.pointNumber;
    const query = data.rows.order[row];
    const method = data.methods[state.method];
    const group = data.columns.groups.find((candidate) => column < candidate.stop);
    const value = method.cells[query][column];
    return `query ${data.queries[query].id} (${name(data.queries[query].label)})\n`
      + `train ${data.columns.names[column]} (${name(group.label)})\n`
      + `score ${value === null ? "n/a" : format(value)}`
      + (state.ranks && point.z !== null ? `, percentile ${point.z.toFixed(1)}` : "");
  }

  return { draw, describe };
})();
