/* The page of the system: what the process uses, what waits, what lies on the disk; live. */

import { byId, h, replace } from "./dom.js";
import { api } from "./api.js";
import { bytes, decimal, duration, integer, isNumber, missing } from "./format.js";
import { stateBadge } from "./kernel_view.js";
import { keepFresh, live, throttle } from "./shell.js";
import { Sparkline } from "./sparkline.js";

const KEPT = 720; // samples: an hour
const READ_EVERY = 15_000; // what no sample holds: disk, threads, totals
const TABLE_EVERY = 60; // samples between two rows of the table: five minutes
let told = null;
let series = null;
let offset = 0; // the server's clock minus this one's, in seconds

const cpu = new Sparkline(byId("spark-cpu"), { title: "CPU of the process", token: "--sea", format: (value) => `${Math.round(value)} %`, floor: 100 });
const memory = new Sparkline(byId("spark-memory"), { title: "Memory of the process", token: "--olive", format: bytes, floor: 100e6 });
const work = new Sparkline(byId("spark-tokens"), { title: "Answers being written", token: "--gold", format: (value) => integer(value), floor: 4 });

const mean = (values) => (values.length === 0 ? null : values.reduce((sum, value) => sum + value, 0) / values.length);
const facts = (rows) => rows.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));

// -- the last hour -----------------------------------------------------------------------------------------------

function renderLoad() {
  const now = Date.now() / 1000 + offset;
  const { at, cpu_percent: own, machine_cpu_percent: whole, rss_bytes: rss, generating, waiting } = series;
  const few = at.length < 2 ? "The first samples are being taken." : null;
  const cores = told.machine.cores;
  cpu.show(at, own, now, few ?? `${Math.round(mean(own))} % of one core on average; the machine's ${integer(cores)} ${cores === 1 ? "core is" : "cores are"} ${Math.round(whole.at(-1))} % busy.`);
  memory.show(at, rss, now, few ?? `Between ${bytes(Math.min(...rss))} and ${bytes(Math.max(...rss))}.`);
  work.show(at, generating, now, few ?? (Math.max(...generating) === 0 ? "Nobody has asked in this time." : `At most ${integer(Math.max(...generating))} at once, and ${integer(Math.max(...waiting))} in line.`));
  if (byId("load-twin").open) renderTable();
  renderLede();
}

function renderLede() {
  const now = Date.now() / 1000 + offset;
  const newest = series.rss_bytes.at(-1) ?? told.process.rss_bytes;
  const busy = series.cpu_percent.at(-1);
  const up = isNumber(told.started_at) ? `Up ${duration(now - told.started_at)}, ` : "";
  byId("system-lede").textContent = `${up}with ${bytes(newest)} of memory${isNumber(busy) ? ` and ${Math.round(busy)} % of a core` : ""}.`;
}

function renderTable() {
  const places = series.at.map((_, index) => index).filter((index) => (series.at.length - 1 - index) % TABLE_EVERY === 0).reverse();
  const columns = [["Time", (i) => new Date(1000 * series.at[i]).toLocaleTimeString()], ["CPU", (i) => `${Math.round(series.cpu_percent[i])} %`], ["Machine", (i) => `${Math.round(series.machine_cpu_percent[i])} %`], ["Memory", (i) => bytes(series.rss_bytes[i])], ["Threads", (i) => integer(series.threads[i])], ["Answering", (i) => integer(series.generating[i])], ["Waiting", (i) => integer(series.waiting[i])]];
  byId("load-table").replaceChildren(
    h("thead", {}, h("tr", {}, columns.map(([name], place) => h("th", { scope: "col", class: place === 0 ? null : "num" }, name)))),
    h("tbody", {}, places.map((index) => h("tr", {}, columns.map(([, format], place) => (place === 0 ? h("th", { scope: "row" }, format(index)) : h("td", { class: "num" }, format(index))))))));
}

// -- queues ------------------------------------------------------------------------------------------------------

function gauge({ name, value, most, note }) {
  const share = most ? Math.min(1, value / most) : 0;
  const fill = h("div", { class: "meter-fill" });
  fill.style.width = `${100 * share}%`;
  return h("li", { dataset: { full: String(most !== null && value >= most) } },
    h("span", { class: "gauge-name" }, name),
    h("span", { class: "gauge-value" }, integer(value), most === null ? "" : h("span", { class: "hint" }, ` of ${integer(most)}`)),
    most === null ? h("span", { class: "gauge-line" }) : h("div", { class: "meter", "aria-hidden": "true" }, fill),
    note ? h("span", { class: "hint gauge-note" }, note) : null);
}

function renderQueues() {
  const { queues } = told;
  const last = (name) => series[name].at(-1);
  const refused = (count) => (count > 0 ? `${integer(count)} refused since the start` : "");
  const items = [
    { name: "Answers being written", value: last("generating") ?? told.engine?.active ?? 0, most: queues.max_generating },
    { name: "Answers in line", value: last("waiting") ?? told.engine?.waiting ?? 0, most: queues.max_waiting, note: refused(told.engine?.refused ?? 0) },
    { name: "Chats open", value: last("chats") ?? queues.chats, most: queues.max_chats, note: refused(queues.chats_refused) },
    { name: "Event streams open", value: last("streams") ?? queues.streams, most: queues.max_streams, note: refused(queues.streams_refused) },
    { name: "Kernels training", value: last("training") ?? queues.kernels_training, most: queues.max_training },
    { name: "Kernels in line", value: queues.kernels_queued, most: null },
    { name: "Distillations open", value: queues.distillations_open, most: null, note: queues.distillations_open > 1 ? "one is worked on at a time" : "" },
  ];
  replace(byId("queues"), items, () => items.map(gauge));
}

// -- disk --------------------------------------------------------------------------------------------------------

const PARTS = { kernels: "Checkpoints of kernels", cartridges: "Cartridges", distillation: "Distillation runs", database: "Database" };
const TONES = { kernels: "sea", cartridges: "gold", distillation: "olive", database: "ink" }; // clay is for warnings

function renderDisk() {
  const { disk } = told;
  const ours = Object.entries(disk.parts).sort(([, a], [, b]) => b - a);
  const sum = ours.reduce((total, [, size]) => total + size, 0);
  byId("disk-free").textContent = `${bytes(disk.free_bytes)} free of ${bytes(disk.total_bytes)}`;
  replace(byId("disk-bar"), ours, () => ours.filter(([, size]) => size > 0).map(([name, size]) => {
    const part = h("span", { dataset: { tone: TONES[name] } });
    part.style.width = `${(100 * size) / sum}%`;
    return part;
  }));
  replace(byId("disk-facts"), [disk.parts, disk.kernels_max_bytes], () => ours.map(([name, size]) => h("div", {},
    h("dt", {}, h("span", { class: "swatch", dataset: { tone: TONES[name] }, "aria-hidden": "true" }), PARTS[name] ?? name),
    h("dd", {}, bytes(size), name === "kernels" ? h("span", { class: "hint" }, ` of ${bytes(disk.kernels_max_bytes)}`) : null))));
  const tight = disk.free_bytes < disk.min_free_bytes ? ` Training waits: less than ${bytes(disk.min_free_bytes)} is free.` : "";
  byId("disk-folder").textContent = `In ${disk.folder}.${tight}`;
}

// -- model, threads, machine -------------------------------------------------------------------------------------

const ENDINGS = { stop: "to their end", length: "to their limit", cancelled: "cancelled", error: "with an error" };
const STAGES = { ready: "ok", loading: "queued", failed: "stalled", disabled: "stopped" };

function renderModel() {
  const { model, engine, workspace } = told;
  replace(byId("model-state"), model.stage, () => stateBadge(STAGES[model.stage] ?? "queued", model.stage));
  const busy = engine?.busy_seconds ?? 0;
  const ended = Object.entries(engine?.finished ?? {}).filter(([, count]) => count > 0).map(([reason, count]) => `${integer(count)} ${ENDINGS[reason] ?? reason}`).join(", ");
  const rows = [
    ["Model", model.name.split("/").at(-1)],
    ["Parameters", isNumber(model.parameters) ? `${model.parameters < 1e6 ? integer(model.parameters) : `${decimal(model.parameters / 1e6, 1)} million`}, ${model.dtype} on ${model.device}` : null],
    ["Context", isNumber(model.context_length) ? `${integer(model.context_length)} tokens` : null],
    ["Fingerprint", model.fingerprint ? h("code", {}, model.fingerprint.slice(0, 12)) : null],
    ["Answers", engine ? (engine.submitted === 0 ? "none yet" : `${integer(engine.submitted)}${ended ? `: ${ended}` : ""}`) : missing("no language model is ready", "no engine")],
    ["Tokens read", engine ? integer(engine.prompt_tokens) : null],
    ["Tokens written", engine ? integer(engine.completion_tokens) : null],
    ["Time in the model", engine ? `${duration(busy)}${engine.completion_tokens > 0 && busy > 0 ? `, ${decimal(engine.completion_tokens / busy, 1)} tokens written a second` : ""}` : null],
    ["Workspace", workspace.available ? "hooked in" : workspace.reason],
  ];
  replace(byId("model-facts"), rows.map(([, value]) => (value instanceof Node ? value.textContent : value)), () => facts(rows));
}

function renderThreads() {
  const { threads } = told;
  byId("threads-count").textContent = `${integer(threads.reduce((sum, item) => sum + item.threads, 0))} in all, the busiest first`;
  replace(byId("threads-table").tBodies[0], threads, () => threads.map((item) => h("tr", {},
    h("th", { scope: "row" }, item.name === "native" ? "of libraries" : item.name), h("td", { class: "num" }, integer(item.threads)), h("td", { class: "num" }, duration(item.cpu_seconds)))));
}

function renderMachine() {
  const { machine, process, versions, version, database, pid } = told;
  const limit = machine.memory_limit_bytes;
  const rows = [
    ["Olympus", version],
    ["Process", `${pid}, niceness ${process.niceness}${isNumber(process.open_files) ? `, ${integer(process.open_files)} open files` : ""}`],
    ["CPU time", duration(process.cpu_seconds)],
    ["Cores", `${integer(machine.cores)}, load ${machine.load.map((value) => decimal(value, 1)).join(" ")}`],
    ["Memory", `${bytes(machine.memory_available_bytes)} available of ${bytes(machine.memory_bytes)}`],
    ["Container's limit", isNumber(limit) ? bytes(limit) : null],
    ["Database", `${{ sqlite: "SQLite", postgresql: "PostgreSQL" }[database.kind] ?? database.kind}, schema ${database.schema}`],
    ...Object.entries(versions).map(([name, value]) => [name, value]),
  ];
  replace(byId("machine-facts"), rows, () => facts(rows));
}

// -- wiring ------------------------------------------------------------------------------------------------------

async function refresh() {
  try {
    told = await api.get("/olympus/system");
    series = told.series;
    offset = told.now - Date.now() / 1000;
    byId("page-error").hidden = true;
  } catch (error) {
    byId("page-error").hidden = false;
    byId("page-error").textContent = `Not up to date: ${error.message}`;
    return;
  }
  renderLoad();
  renderQueues();
  renderDisk();
  renderModel();
  renderThreads();
  renderMachine();
}

live.on("system", (sample) => {
  if (series === null || sample.at <= (series.at.at(-1) ?? 0)) return;
  for (const name of Object.keys(series)) {
    series[name].push(sample[name]);
    if (series[name].length > KEPT) series[name].shift();
  }
  renderLoad();
  renderQueues();
});

const refreshSoon = throttle(refresh, 2000);
window.addEventListener("modelstate", () => told !== null && refreshSoon());
byId("load-twin").addEventListener("toggle", () => series !== null && byId("load-twin").open && renderTable());
keepFresh(refresh);
setInterval(() => !document.hidden && live.state === "live" && refreshSoon(), READ_EVERY);
