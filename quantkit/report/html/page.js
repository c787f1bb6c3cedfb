"use strict";
// Reads the packed estimates, and shows the cell that the choices name. No memory is computed here: numbers
// are looked up, added and compared.

const COMPONENTS = [
  ["weights", "weights"], ["kv_cache", "KV cache"], ["activations", "activations"],
  ["allocator", "allocator"], ["overhead", "overhead"],
];
const GIB = 2 ** 30;
const $ = (id) => document.getElementById(id);

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// Two decimals, halves to even, as quantkit prints them.
function gib(bytes) {
  const hundredths = Math.abs(bytes) * 100;
  let whole = Math.floor(hundredths / GIB);
  const rest = hundredths - whole * GIB;
  if (rest > GIB / 2 || (rest === GIB / 2 && whole % 2)) whole += 1;
  return (bytes < 0 ? "-" : "") + (whole / 100).toFixed(2);
}

const tokens = (count) => (count % 1024 ? count.toLocaleString("en") : `${count / 1024}k`);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

class Calculator {
  constructor(data) {
    this.data = data;
    this.choice = { model: 0, scheme: 0, kv: 0, context: 0, batch: 0, gpu: -1 };
  }

  get model() { return this.data.models[this.choice.model]; }

  // The platform of a GPU; -1 is none in particular.
  platform(gpu) { return gpu < 0 ? { kind: 0, ...this.data.assumed } : this.data.gpus[gpu]; }

  // The bytes of each component, and their sum, for what is chosen and what is given instead.
  cell(instead = {}) {
    const { scheme, kv, context, batch, gpu } = { ...this.choice, ...instead };
    const { model, data } = this;
    const platform = this.platform(gpu);
    const inner = (kv * data.batches.length + batch) * model.contexts.length + context;
    const each = data.kv_bits.length * data.batches.length * model.contexts.length;
    const cells = model.cells[platform.kind];
    const parts = {
      weights: model.schemes[scheme].weights_bytes,
      kv_cache: model.kv_cache_bytes[inner],
      activations: cells.activations_bytes[scheme * each + inner],
      allocator: cells.allocator_bytes[scheme * each + inner],
      overhead: platform.overhead_bytes,
    };
    parts.total = COMPONENTS.reduce((sum, [name]) => sum + parts[name], 0);
    return parts;
  }

  verdict(total, gpu) {
    const margin = this.data.gpus[gpu].usable_bytes - total;
    const word = margin < 0 ? "no" : margin < Math.ceil(this.data.error_band * total) ? "tight" : "fits";
    return { word, margin };
  }

  // The longest context of the slider with the verdict "fits"; 0 where there is none.
  longest(gpu, instead = {}) {
    for (let context = this.model.contexts.length - 1; context >= 0; context--) {
      if (this.verdict(this.cell({ ...instead, context, gpu }).total, gpu).word === "fits") {
        return this.model.contexts[context];
      }
    }
    return 0;
  }

  // Tokens a second that no decoder exceeds: each step reads the weights and the cache once.
  ceiling(gpu) {
    const { scheme, batch } = this.choice;
    const read = this.model.schemes[scheme].read_bytes[batch] + this.cell({ gpu }).kv_cache;
    return (this.data.batches[batch] * this.data.gpus[gpu].bandwidth_gb_s * 1e9) / read;
  }
}

class Page {
  constructor(calculator, records) {
    this.calculator = calculator;
    this.records = records;
    this.fill();
    this.read();
    for (const id of ["model", "scheme", "kv", "context", "batch", "gpu"]) {
      $(id).addEventListener("input", () => this.choose(id, Number($(id).value)));
    }
    addEventListener("hashchange", () => { this.read(); this.show(); });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const paint = () => {
      document.documentElement.dataset.theme = $("theme").value || (dark.matches ? "dark" : "light");
      this.show();
      this.showRecords();
    };
    dark.addEventListener("change", paint);
    $("theme").addEventListener("input", () => { this.write(); paint(); });
    paint();
  }

  fill() {
    const { data } = this.calculator;
    const options = (id, names) => $(id).replaceChildren(
      ...names.map(([value, name]) => element("option", { value }, name)));
    options("model", data.models.map((model, i) => [i, model.name]));
    options("kv", data.kv_bits.map((bits, i) => [i, `${bits} bits`]));
    options("gpu", [[-1, "none in particular"],
      ...data.gpus.map((gpu, i) => [i, `${gpu.name}, ${gib(gpu.usable_bytes)} GiB`])]);
    $("batch").max = data.batches.length - 1;
    $("band").textContent = `${100 * data.error_band}%`;
    this.fillModel();
  }

  // What depends on the model; a choice that it does not have moves to the nearest that it has.
  fillModel() {
    const { model, choice } = this.calculator;
    $("scheme").replaceChildren(
      ...model.schemes.map((scheme, i) => element("option", { value: i }, scheme.name)));
    $("context").max = model.contexts.length - 1;
    choice.scheme = Math.min(choice.scheme, model.schemes.length - 1);
    choice.context = Math.min(choice.context, model.contexts.length - 1);
  }

  choose(id, value) {
    this.calculator.choice[id] = value;
    if (id === "model") this.fillModel();
    this.write();
    this.show();
  }

  // The address' fragment names the choices, so that a link shows what its sender saw.
  write() {
    const { data, model, choice } = this.calculator;
    const named = new URLSearchParams({
      model: model.name, scheme: model.schemes[choice.scheme].name, kv: data.kv_bits[choice.kv],
      context: model.contexts[choice.context], batch: data.batches[choice.batch],
    });
    if (choice.gpu >= 0) named.set("gpu", data.gpus[choice.gpu].name);
    if ($("theme").value) named.set("theme", $("theme").value);
    history.replaceState(null, "", `#${named}`);
  }

  read() {
    const { data, choice } = this.calculator;
    const named = new URLSearchParams(location.hash.slice(1));
    const find = (values, name, otherwise) => {
      const index = values.map(String).indexOf(named.get(name));
      return index < 0 ? otherwise : index;
    };
    choice.model = find(data.models.map((model) => model.name), "model", 0);
    const { model } = this.calculator;
    const usual = model.schemes.findIndex((scheme) => scheme.name === "int4-g128");
    choice.scheme = find(model.schemes.map((scheme) => scheme.name), "scheme", Math.max(usual, 0));
    choice.kv = find(data.kv_bits, "kv", 0);
    choice.context = find(model.contexts, "context", model.contexts.indexOf(Math.min(8192, model.contexts.at(-1))));
    choice.batch = find(data.batches, "batch", 0);
    choice.gpu = find(data.gpus.map((gpu) => gpu.name), "gpu", -1);
    if (["light", "dark"].includes(named.get("theme"))) $("theme").value = named.get("theme");
    this.fillModel();
  }

  show() {
    const { calculator } = this;
    const { choice, model, data } = calculator;
    for (const [id, value] of Object.entries(choice)) $(id).value = value;
    $("context-text").textContent = tokens(model.contexts[choice.context]);
    $("context").setAttribute("aria-valuetext", `${model.contexts[choice.context]} tokens`);
    $("batch-text").textContent = data.batches[choice.batch];
    $("batch").setAttribute("aria-valuetext", `${data.batches[choice.batch]} sequences`);
    const cell = calculator.cell();
    this.showAnswer(cell);
    this.showSchemes();
    this.showGpus();
    this.showChart();
    const platform = calculator.platform(choice.gpu);
    $("sources").replaceChildren(
      ...[`${model.name}: ${model.parameters.toLocaleString("en")} parameters, a context of ${tokens(model.max_context)}`,
        `quantkit's own runtime on one GPU, prefill in chunks of ${data.prefill_chunk.toLocaleString("en")} tokens, ` +
        `${platform.attention} attention, PyTorch's caching allocator with default segments`,
        ...platform.sources,
        ...(choice.gpu < 0 ? [] : [`memory of the ${platform.name}: ${platform.usable_source}`]),
      ].map((text) => element("li", {}, text)));
  }

  showAnswer(cell) {
    const { calculator } = this;
    const { choice, model, data } = calculator;
    $("total").textContent = `${gib(cell.total)} GiB`;
    $("total").dataset.bytes = cell.total;
    const gpu = data.gpus[choice.gpu];
    const room = Math.max(gpu ? gpu.usable_bytes : 0, cell.total);
    $("bar").replaceChildren(...COMPONENTS.map(([name]) =>
      element("i", { style: `width:${(100 * cell[name]) / room}%;background:var(--${name})` })));
    $("bar").setAttribute("aria-label", COMPONENTS.map(([name, label]) => `${label} ${gib(cell[name])} GiB`).join(", "));
    $("parts").tBodies[0].replaceChildren(...COMPONENTS.map(([name, label]) =>
      element("tr", { "data-part": name, "data-bytes": cell[name] },
        element("th", { scope: "row" }, element("span", { class: "key", style: `background:var(--${name})` }), label),
        element("td", {}, gib(cell[name])),
        element("td", {}, `${((100 * cell[name]) / cell.total).toFixed(1)}%`))));
    const facts = [];
    if (gpu) {
      const { word, margin } = calculator.verdict(cell.total, choice.gpu);
      const far = margin < 0 ? `${gib(-margin)} GiB are missing` : `${gib(margin)} GiB to spare`;
      $("verdict").replaceChildren(mark(word), ` on the ${gpu.name}: ${far}`);
      facts.push(["longest context that fits", longestText(calculator.longest(choice.gpu))]);
      if (margin >= 0) {
        facts.push(["decoding", `at most ${calculator.ceiling(choice.gpu).toFixed(1)} tokens/s: its memory's bandwidth, a ceiling and no prediction`]);
      }
    } else {
      const totals = data.gpus.map((_, i) => calculator.cell({ gpu: i }).total);
      const words = totals.map((total, i) => calculator.verdict(total, i).word);
      const least = words.findIndex((word) => word !== "no");
      const smallest = data.gpus[least];
      const name = least < 0 ? "more than any known GPU has" :
        `the smallest known GPU that holds it${words[least] === "tight" ? ", tightly," : ""} is the ${smallest.name}, ` +
        `${gib(totals[least])} of ${gib(smallest.usable_bytes)} GiB there`;
      $("verdict").replaceChildren(name);
    }
    $("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
  }

  showSchemes() {
    const { calculator } = this;
    const { choice, model, data } = calculator;
    const gpu = choice.gpu;
    const names = ["precision", gpu < 0 ? "weights" : "*weights", "total", ...(gpu < 0 ? [] : ["verdict", "longest"])];
    heading("schemes", names);
    const steps = `The longest context is the last step of the slider that fits: every 1k to 32k, every 8k beyond; ` +
      `${model.name} is offered to ${tokens(model.contexts.at(-1))}.`;
    document.querySelector(".steps").textContent = gpu < 0 ? "" : steps;
    $("schemes").tBodies[0].replaceChildren(...model.schemes.map((scheme, i) => {
      const cell = calculator.cell({ scheme: i });
      const row = element("tr", { class: i === choice.scheme ? "chosen" : "", "data-scheme": scheme.name, "data-bytes": cell.total },
        element("th", { scope: "row" }, this.chooser("scheme", i, scheme.name)),
        element("td", { class: gpu < 0 ? "" : "extra" }, gib(scheme.weights_bytes)), element("td", {}, gib(cell.total)));
      if (gpu >= 0) {
        row.append(element("td", {}, mark(calculator.verdict(cell.total, gpu).word)),
          element("td", {}, longestText(calculator.longest(gpu, { scheme: i }))));
      }
      return row;
    }));
  }

  showGpus() {
    const { calculator } = this;
    const { choice, model, data } = calculator;
    heading("gpus", ["GPU", "*memory", "needs", "verdict", "*left", "longest"]);
    $("gpus").tBodies[0].replaceChildren(...data.gpus.map((gpu, i) => {
      const cell = calculator.cell({ gpu: i });
      const { word, margin } = calculator.verdict(cell.total, i);
      const longest = calculator.longest(i);
      return element("tr", {
        class: i === choice.gpu ? "chosen" : "", "data-gpu": gpu.name, "data-bytes": cell.total,
        "data-verdict": word, "data-margin": margin, "data-longest": longest,
      }, element("th", { scope: "row" }, this.chooser("gpu", i, gpu.name)), element("td", { class: "extra" }, gib(gpu.usable_bytes)),
      element("td", {}, gib(cell.total)), element("td", {}, mark(word)), element("td", { class: "extra" }, gib(margin)),
      element("td", {}, longestText(longest)));
    }));
  }

  // A name that chooses itself; the focus stays on it though its table is made anew.
  chooser(id, value, name) {
    const button = element("button", { class: "link", type: "button" }, name);
    button.addEventListener("click", () => {
      this.choose(id, value);
      document.querySelector(`#${id}s tr.chosen button`).focus();
    });
    return button;
  }

  showChart() {
    const { calculator } = this;
    const { choice, model, data } = calculator;
    const paint = colours();
    const cells = model.contexts.map((_, context) => calculator.cell({ context }));
    const traces = [...COMPONENTS].map(([name, label]) => ({
      x: model.contexts, y: cells.map((cell) => cell[name] / GIB), name: label, stackgroup: "memory",
      type: "scatter", mode: "lines", line: { width: 0 }, fillcolor: paint(name),
      hovertemplate: `%{y:.2f} GiB ${label}<extra></extra>`,
    }));
    const now = model.contexts[choice.context];
    const shapes = [{ type: "line", x0: now, x1: now, yref: "paper", y0: 0, y1: 1, line: { color: paint("ink"), width: 1.5 } }];
    const annotations = [];
    if (choice.gpu >= 0) {
      const size = data.gpus[choice.gpu].usable_bytes / GIB;
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: size, y1: size, line: { color: paint("no"), width: 1.5, dash: "dash" } });
      annotations.push({ xref: "paper", x: 0, y: size, xanchor: "left", yanchor: "bottom", showarrow: false, text: data.gpus[choice.gpu].name });
    }
    draw("chart-context", traces, {
      shapes, annotations, hovermode: "x unified", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" },
      xaxis: { title: { text: "context (tokens)" }, ...ticks(model.contexts) },
      yaxis: { title: { text: "GiB" }, rangemode: "tozero" },
    });
  }

  showRecords() {
    const paint = colours();
    for (const record of this.records) {
      if (!$(record.id)) {
        const section = element("section", { "aria-label": record.title },
          element("h2", {}, record.title), element("div", { id: record.id, class: "chart" }),
          element("p", { class: "note" }, record.note));
        $("records").append(section);
      }
      const traces = record.series.map((series) => ({
        type: "scatter", mode: "markers", x: series.x, y: series.y, name: series.name, marker: { size: 10, color: series.color === "#000000" ? paint("ink") : series.color },
        error_y: series.error ? { type: "data", array: series.error, color: paint("faint") } : undefined,
        hovertemplate: `%{x:.4g}, %{y:.5g}<extra>${series.name}</extra>`,
      }));
      if (record.line) {
        traces.push({ type: "scatter", mode: "lines", ...record.line, line: { color: paint("faint"), width: 1 }, hoverinfo: "skip", showlegend: false });
      }
      draw(record.id, traces, {
        showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        xaxis: { title: { text: record.x }, type: record.x_scale }, yaxis: { title: { text: record.y }, type: record.y_scale },
      });
    }
  }
}

// Columns are told apart by `*`: those that a narrow screen leaves out.
function heading(id, names) {
  $(id).tHead.replaceChildren(element("tr", {}, ...names.map((name) =>
    element("th", { scope: "col", class: name.startsWith("*") ? "extra" : "" }, name.replace("*", "")))));
}

function mark(word) {
  const signs = { fits: "\u2713", tight: "\u2248", no: "\u2717" };
  return element("span", { class: word }, `${signs[word]} ${word}`);
}

const longestText = (longest) => (longest ? tokens(longest) : "none");

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

function ticks(contexts) {
  const last = contexts.at(-1);
  const step = last / 8 >= 1024 ? last / 8 : 1024;
  const values = [];
  for (let value = step; value <= last; value += step) values.push(value);
  return { tickvals: values, ticktext: values.map(tokens), range: [contexts[0], last] };
}

function draw(id, traces, layout) {
  const paint = colours();
  const axis = { gridcolor: paint("line"), zerolinecolor: paint("line"), linecolor: paint("line"), automargin: true };
  const font = { color: paint("ink"), family: "system-ui, sans-serif", size: 13 };
  Plotly.react(id, traces, {
    margin: { l: 50, r: 20, t: 30, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font,
    hoverlabel: { bgcolor: paint("raised"), bordercolor: paint("line"), font },
    ...layout, xaxis: { ...axis, fixedrange: true, ...layout.xaxis }, yaxis: { ...axis, fixedrange: true, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true });
}

(async () => {
  const [data, library] = await Promise.all([unpack("packed-data"), unpack("packed-charts")]);
  document.head.append(element("script", {}, library));
  const { calculator, records } = JSON.parse(data);
  window.page = new Page(new Calculator(calculator), records);
  document.documentElement.dataset.ready = "";
})();
