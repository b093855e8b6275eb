"use strict";
// The page's behaviour. Texts are untrusted: they reach the document through textContent and text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const labels = new Map(Object.entries(data.labels));
  const index = new Map(data.methods.map((method, i) => [method.name, i]));
  const state = {
    method: index.get(data.default), query: data.rows.order[0], side: "top", count: 10, ranks: false,
    beside: new Set(data.beside.map((name) => index.get(name))),
  };

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children); // strings become text nodes
    return node;
  }

  // Three digits with a sign; `largest` decides for a whole method whether its scores need an exponent.
  function format(value, largest = Math.abs(value)) {
    if (value === null) return "n/a";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const sign = value < 0 ? "\u2212" : "+";
    if (largest < 0.01 || largest >= 1e5) return sign + size.toExponential(2).replace("-", "\u2212");
    if (largest >= 1000) return sign + Math.round(size).toLocaleString("en");
    return sign + size.toFixed(largest >= 100 ? 1 : largest >= 10 ? 2 : largest >= 0.1 ? 3 : 4);
  }
  const largest = data.methods.map((method) => [...method.top, ...method.bottom].flatMap((list) => list.scores)
    .reduce((most, score) => Math.max(most, Math.abs(score)), 0));

  const chip = (label) => (label === null ? ""
    : element("span", { class: label === data.target ? "chip target" : "chip" }, label));

  // --- words shared with the query -------------------------------------------------------------------------------
  const STOP = new Set(("a about above after again against all also am an and any are aren't as at be because been before "
    + "being below between both but by can can't could couldn't did didn't do does doesn't doing don't down during each "
    + "few for from further had hadn't has hasn't have haven't having he her here hers herself him himself his how i i'd "
    + "i'll i'm i've if in into is isn't it it's its itself just let's like me more most my myself no nor not now of off on "
    + "once only or other our ours ourselves out over own please same she should shouldn't so some such than that that's "
    + "the their theirs them themselves then there there's these they they're this those through to too under until up "
    + "us very was wasn't we we're were weren't what what's when where which while who whom why will with without won't would "
    + "wouldn't you you'd you'll you're you've your yours yourself yourselves s t d ll m re ve").split(" "));
  const segmenter = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
  const pieces = (text) => (segmenter ? Array.from(segmenter.segment(text), (part) => part.segment)
    : text.split(/([\p{L}\p{N}]+(?:['\u2019][\p{L}\p{N}]+)*)/u));
  const key = (word) => word.toLowerCase().replace(/\u2019/g, "'");
  const isWord = (word) => /[\p{L}\p{N}]/u.test(word) && !STOP.has(key(word));
  const words = (text) => new Set(pieces(text).filter(isWord).map(key));

  function marked(text, shared) {
    const out = [];
    let rest = "";
    for (const piece of pieces(text)) {
      if (isWord(piece) && shared.has(key(piece))) {
        out.push(rest, element("mark", {}, piece));
        rest = "";
      } else rest += piece;
    }
    return [...out, rest].filter((part) => part !== "");
  }

  // --- examples ---------------------------------------------------------------------------------------------------
  function passage(title, text, cut, shared) {
    const long = text.length > 300 || text.split("\n").length > 5;
    const body = element("div", { class: long ? "text clamp" : "text" }, ...(text ? marked(text, shared) : ["(empty)"]));
    if (cut) body.append(element("em", {}, ` [${cut.toLocaleString("en")} more characters are not on this page]`));
    const out = [element("h4", {}, title), body];
    if (long) {
      const button = element("button", { type: "button", "aria-expanded": "false" }, "show all");
      button.addEventListener("click", () => {
        const open = !body.classList.toggle("clamp");
        button.setAttribute("aria-expanded", String(open));
        button.textContent = open ? "show less" : "show all";
      });
      out.push(button);
    }
    return out;
  }

  function item(row, score, rank, shared, size) {
    const example = data.examples[row];
    return element("li", { class: "item", "data-id": example.id },
      element("header", {}, element("span", { class: "rank" }, String(rank)),
        element("span", { class: "score" }, format(score, size)), element("span", { class: "id" }, example.id), chip(example.label)),
      ...passage("Prompt", example.prompt, example.prompt_cut, shared),
      ...passage("Response", example.response, example.response_cut, shared));
  }

  // What the list shows at a glance: how many of its rows share the query's label, and what to know about its scores.
  function tally(method, rows, scores, tied) {
    const label = data.queries[state.query].label;
    const out = [];
    if (label !== null && rows.length) {
      const same = rows.filter((row) => data.examples[row].label === label).length;
      const share = (100 * (labels.get(label) || 0)) / data.total;
      out.push(`${same} of ${rows.length} share the query's label; ${share.toFixed(1)}% of the training set does.`);
    }
    const wrong = scores.filter((score) => (state.side === "top" ? score <= 0 : score >= 0)).length;
    if (wrong) {
      out.push(state.side === "top" ? `${wrong} of these highest scores are not positive: no proponents.`
        : `${wrong} of these lowest scores are not negative: no opponents.`);
    }
    if (tied.includes(rows.length - 1)) {
      out.push(`Rank ${rows.length + 1} ties with rank ${rows.length}; ties are in training order.`);
    }
    const missing = method.missing[state.query];
    if (missing) out.push(`${missing.toLocaleString("en")} training examples have no finite score (n/a) and no rank.`);
    return out.join(" ");
  }

  function card(number, shared) {
    const method = data.methods[number];
    const list = method[state.side][state.query];
    const rows = list.rows.slice(0, state.count);
    const scores = list.scores.slice(0, state.count);
    const summary = tally(method, rows, scores, list.tied);
    return element("article", { class: number === state.method ? "card chosen" : "card", "data-method": method.name },
      element("h3", {}, method.name, " ", method.control ? element("span", { class: "chip" }, "control") : ""),
      element("p", {}, method.title),
      element("p", { class: "meta" }, `Score: ${method.unit}`),
      method.note ? element("p", { class: "meta" }, method.note) : "",
      summary ? element("p", { class: "tally" }, summary) : "",
      element("ol", { "aria-label": `${state.side === "top" ? "Proponents" : "Opponents"}, ${method.name}` },
        ...rows.map((row, i) => item(row, scores[i], i + 1, shared, largest[number]))));
  }

  function drawExamples() {
    const query = data.queries[state.query];
    const shared = new Set([...words(query.prompt), ...words(query.response)]);
    find("asked").replaceChildren(
      element("p", { class: "meta" }, "Query ", element("span", { class: "id" }, query.id), " ", chip(query.label)),
      element("div", {}, element("h3", {}, "Prompt"), element("div", { class: "text" }, query.prompt || "(empty)")),
      element("div", {}, element("h3", {}, "Answer"), element("div", { class: "text" }, query.response || "(empty)")));
    const others = data.methods.map((_, i) => i).filter((i) => state.beside.has(i) && i !== state.method);
    find("cards").replaceChildren(...[state.method, ...others].map((number) => card(number, shared)));
    for (const box of find("beside").querySelectorAll("input")) {
      const number = Number(box.value);
      box.disabled = number === state.method;
      box.checked = box.disabled || state.beside.has(number);
    }
  }

  // --- heat map ---------------------------------------------------------------------------------------------------
  const map = find("map");
  const tip = find("tip");

  function drawMap(width = map.clientWidth) {
    const show = (value) => format(value, largest[state.method]);
    find("map-caption").textContent = finetraceMap.draw(map, data, state, show, width);
  }

  function showTip(event) {
    tip.textContent = finetraceMap.describe(data, state, event.points[0], (value) => format(value, largest[state.method]));
    tip.hidden = false;
    const { clientX, clientY } = event.event;
    tip.style.left = `${Math.max(8, Math.min(clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${clientY + 18 + tip.offsetHeight > window.innerHeight ? clientY - tip.offsetHeight - 10 : clientY + 18}px`;
  }

  // --- table ------------------------------------------------------------------------------------------------------
  // Sorts within methods and within controls, so that the controls stay together; missing values go last.
  function sortBy(header) {
    const kind = header.dataset.kind;
    const before = header.getAttribute("aria-sort");
    const direction = before ? (before === "ascending" ? "descending" : "ascending") : kind === "high" ? "descending" : "ascending";
    for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => row.children[header.cellIndex].dataset.sort;
    for (const body of find("methods").tBodies) {
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (kind === "text" ? x.localeCompare(y) : Number(x) - Number(y));
      }));
    }
  }

  // --- wiring -----------------------------------------------------------------------------------------------------
  function update() {
    drawMap();
    drawExamples();
  }

  function chooseQuery(query) {
    state.query = query;
    find("query").value = String(query);
    update();
  }

  function start() {
    const options = (control) => data.methods.map((method, i) => [method, i]).filter(([method]) => method.control === control)
      .map(([method, i]) => element("option", { value: String(i) }, method.name));
    for (const [title, control] of [["Methods", false], ["Controls", true]]) {
      const list = options(control);
      if (list.length) find("method").append(element("optgroup", { label: title }, ...list));
    }
    find("method").value = String(state.method);
    find("query").append(...data.rows.order.map((i) => {
      const { id, label, prompt } = data.queries[i];
      const first = prompt.trim().split(/\s+/).slice(0, 14).join(" ");
      return element("option", { value: String(i) }, `${label === null ? id : `${label} \u00b7 ${id}`} \u00b7 ${first.slice(0, 110)}`);
    }));
    find("beside").append(...data.methods.map((method, i) => element("label", {},
      element("input", { type: "checkbox", value: String(i) }), ` ${method.name}`)));

    find("controls").addEventListener("submit", (event) => event.preventDefault());
    find("method").addEventListener("change", (event) => { state.method = Number(event.target.value); update(); });
    find("query").addEventListener("change", (event) => chooseQuery(Number(event.target.value)));
    find("count").addEventListener("change", (event) => { state.count = Number(event.target.value); drawExamples(); });
    find("ranks").addEventListener("change", (event) => { state.ranks = event.target.checked; drawMap(); });
    for (const radio of document.querySelectorAll("input[name=side]")) {
      radio.addEventListener("change", () => { state.side = radio.value; drawExamples(); });
    }
    find("beside").addEventListener("change", (event) => {
      const number = Number(event.target.value);
      if (event.target.checked) state.beside.add(number); else state.beside.delete(number);
      drawExamples();
    });
    for (const header of document.querySelectorAll("#methods thead th")) {
      header.addEventListener("click", () => sortBy(header));
    }
    for (const option of [...find("count").options].slice(1)) {
      if (option.index && Number(find("count").options[option.index - 1].value) >= data.kept) option.hidden = true;
    }

    update();
    map.on("plotly_hover", showTip);
    map.on("plotly_unhover", () => { tip.hidden = true; });
    map.on("plotly_click", (event) => chooseQuery(data.rows.order[event.points[0].pointNumber[0]]));
    let timer = 0;
    window.addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(() => drawMap(), 120); });
    window.addEventListener("beforeprint", () => drawMap(680)); // the width of a page
    window.addEventListener("afterprint", () => drawMap());
  }

  start();
})();
