// The server's load over the last two minutes, from /metrics.

import { $, el } from './dom.js';
import { api } from './api.js';
import { between, parseMetrics } from './metrics.js';

const INTERVAL_MS = 1000, SHOWN_MS = 120000;
/** Rates that need several requests to mean something are taken over this long. */
const WINDOW_MS = 15000;
/** Readings further apart than this are not joined. */
const GAP_MS = 5000;

const count = (value) => (value >= 100 ? Math.round(value).toLocaleString('en') : String(Number(value.toPrecision(3))));
const percent = (value) => `${Number((value * 100).toFixed(1))} %`;
const duration = (value) => (value < 1 ? `${count(value * 1000)} ms` : `${count(value)} s`);

const CHARTS = [
  { title: 'Requests', format: count, least: 4, series: { running: 'running', waiting: 'waiting' } },
  { title: 'KV cache in use', format: percent, most: 1, series: { used: 'cache' } },
  { title: 'Prefix cache, hit rate', format: percent, most: 1, series: { 'of prompt tokens': 'hitRate' } },
  { title: 'Tokens a second', format: count, least: 10, series: { generated: 'generated', 'of prompts': 'prompt' } },
  { title: 'Time to first token', format: duration, least: 0.01, series: { mean: 'firstMean', '95th percentile': 'firstP95' } },
  { title: 'Time between tokens', format: duration, least: 0.001, series: { mean: 'nextMean', '95th percentile': 'nextP95' } },
];

/** `readings` are what /metrics said, for differences; `points` what the charts show. */
let readings = [], points = [], timer = null, isPolling = false;

/** What is shown of a reading, given those before it. */
function pointOf(now) {
  const get = (name, of = now) => of.values.get(`lowbit:${name}`) ?? 0;
  const last = readings.at(-1), first = readings.find(({ time }) => now.time - time <= WINDOW_MS);
  const point = {
    time: now.time, running: get('num_requests_running'), waiting: get('num_requests_waiting'), cache: get('kv_cache_usage_perc'),
    generated: null, prompt: null, hitRate: null, firstMean: null, firstP95: null, nextMean: null, nextP95: null,
  };
  if (!last || !first) return point;
  const rate = (name) => (get(name) - get(name, last)) / (now.time - last.time) * 1000;
  const queries = get('prefix_cache_queries_total') - get('prefix_cache_queries_total', first);
  const hits = get('prefix_cache_hits_total') - get('prefix_cache_hits_total', first);
  const toFirst = between(first, now, 'lowbit:time_to_first_token_seconds');
  const toNext = between(first, now, 'lowbit:inter_token_latency_seconds');
  return {
    ...point, generated: rate('generation_tokens_total'), prompt: rate('prompt_tokens_total'), hitRate: queries > 0 ? hits / queries : null,
    firstMean: toFirst.mean, firstP95: toFirst.p95, nextMean: toNext.mean, nextP95: toNext.p95,
  };
}

function addReading(text) {
  const now = { time: Date.now(), ...parseMetrics(text) };
  const total = (name, of) => of.values.get(`lowbit:${name}_total`) ?? 0;
  const counters = ['generation_tokens', 'prompt_tokens', 'prefix_cache_queries'];
  // Counters that fell are those of a server that was started anew.
  if (readings.length && counters.some((name) => total(name, now) < total(name, readings.at(-1)))) readings = [];
  points.push(pointOf(now));
  readings.push(now);
  readings = readings.filter(({ time }) => now.time - time <= WINDOW_MS + GAP_MS);
  points = points.filter(({ time }) => now.time - time <= SHOWN_MS + GAP_MS);
  $('totals').textContent = [['Prompt tokens', 'prompt_tokens'], ['generated', 'generation_tokens'], ['preemptions', 'num_preemptions']]
    .map(([label, name]) => `${label} ${total(name, now).toLocaleString('en')}`).join(' · ') + ', since the server was started.';
}

/** An SVG element. */
function svg(tag, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** The least of 1, 2 and 5 times a power of ten that is not less than `value`. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * (1 - 1e-9));
}

function chartNode({ title, format, series, least, most }) {
  const names = Object.entries(series), now = Date.now();
  const latest = names.map(([, key]) => points.at(-1)?.[key] ?? null);
  const top = most ?? roundUp(Math.max(least, ...points.flatMap((point) => names.map(([, key]) => point[key] ?? 0))));
  const shown = names.map(([name], index) => [name, latest[index] === null ? '–' : format(latest[index])]);
  const chart = svg('svg', { viewBox: '0 0 120 100', preserveAspectRatio: 'none', role: 'img', 'aria-label': `${title}: ${shown.map((pair) => pair.join(' ')).join(', ')}` });
  chart.append(svg('path', { class: 'grid', d: 'M0 0H120M0 50H120' }));
  names.forEach(([, key], index) => {
    let path = '', last = null;
    for (const point of points) {
      if (point[key] === null) { last = null; continue; }
      const at = `${(120 - (now - point.time) / 1000).toFixed(2)} ${(100 - point[key] / top * 100).toFixed(2)}`;
      // A point alone is a line of no length, whose round ends are a dot.
      path += last !== null && point.time - last < GAP_MS ? `L${at}` : `M${at}L${at}`;
      last = point.time;
    }
    chart.append(svg('path', { class: `line${index}`, d: path }));
  });
  const legend = shown.map(([name, value]) => el('span', {}, `${name} `, el('b', {}, value)));
  return el('section', { className: 'chart' }, el('h2', {}, title), el('div', { className: 'legend' }, ...legend),
    el('div', { className: 'axis' }, format(top)), chart, el('div', { className: 'axis' }, el('span', {}, '2 min ago'), el('span', {}, 'now')));
}

async function poll() {
  isPolling = true;
  const start = Date.now();
  let status = '', isRefused = false;
  try {
    addReading(await (await api('metrics')).text());
  } catch (error) {
    status = error.message;
    isRefused = error.status === 401;
  }
  isPolling = false;
  $('load-status').textContent = status;
  $('charts').replaceChildren(...CHARTS.map(chartNode));
  // Without a key it would only ask again: opening the tab does.
  if (!isRefused) schedule(Math.max(0, start + INTERVAL_MS - Date.now()));
}

/** Polls while the charts are seen. */
function schedule(delay) {
  clearTimeout(timer);
  if (!$('load').hidden && !document.hidden && !isPolling) timer = setTimeout(poll, delay);
}

/** Takes up or leaves off polling, after the view or the window was shown or hidden. */
export const loadSeen = () => schedule(0);

document.addEventListener('visibilitychange', loadSeen);
