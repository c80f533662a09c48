// The operator's page: looks every second, changes only with the token, and waits calmly for a server that is gone.
import { amount, bytes, duration, h, logLines, pastCalls, request, sparkline, table } from './draw.mjs';
import { service } from './service.mjs';

const SAMPLES = 60;
const LOOK_EVERY = 2000;
const main = document.querySelector('#main');
const health = document.querySelector('#health');
const said = document.querySelector('#said');
const token = document.querySelector('#token');

const state = { totals: null, calls: [], lines: [], alive: false, before: null, series: {} };
let kept = new Map();

async function read(path) {
  const answer = await fetch(path, { headers: { accept: 'application/json' } });
  const body = await answer.json();
  if (!answer.ok && answer.status !== 503) throw new Error(body.error ?? answer.statusText);
  return body;
}

async function change(method, path, body) {
  try {
    const answer = await fetch(path, { method, headers: { authorization: `Bearer ${sessionStorage.token ?? ''}` }, body: body && JSON.stringify(body) });
    const result = await answer.json();
    notify(answer.ok ? (result.done ?? '') : result.error);
    if (answer.ok) show();
    return answer.ok ? result : undefined;
  } catch (error) {
    notify(`Not reached: ${error.message}`);
    return undefined;
  }
}

let silence;
function notify(text) {
  said.textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => { said.textContent = ''; }, 8000);
}

const mayChange = () => Boolean(sessionStorage.token);

function keep(name, make) {
  if (!kept.has(name)) kept.set(name, make());
  return kept.get(name);
}

/** A number of the totals as its rate since the event before. */
function sample(name, value) {
  const series = (state.series[name] ??= []);
  series.push(value);
  if (series.length > SAMPLES) series.shift();
}

function receive(event) {
  const { totals, calls, lines, accepting } = JSON.parse(event.data);
  const before = state.totals;
  Object.assign(state, { totals, calls, alive: true, lines: [...state.lines, ...lines].slice(-500) });
  const failed = totals.errors.reduce((sum, [, count]) => sum + count, 0);
  if (before && totals.uptimeSeconds > before.uptimeSeconds) {
    const seconds = totals.uptimeSeconds - before.uptimeSeconds;
    const failedBefore = before.errors.reduce((sum, [, count]) => sum + count, 0);
    sample('requests', (totals.messagesIn - before.messagesIn) / seconds);
    sample('errors', (failed - failedBefore) / seconds);
    sample('bytes', (totals.bytesIn + totals.bytesOut - before.bytesIn - before.bytesOut) / seconds);
  }
  sample('connections', totals.connections);
  sample('memory', totals.memory);
  announce(accepting ? 'ready' : 'draining');
  if (['', '#/', '#/calls', '#/log'].includes(location.hash)) show();
}

function announce(word) {
  const words = { ready: 'ready', draining: 'draining', gone: 'unreachable; trying again', asking: 'asking …' };
  if (health.dataset.state === word) return;
  health.dataset.state = word;
  health.textContent = words[word];
}

function listen() {
  const events = new EventSource('/events');
  events.onmessage = receive;
  events.onerror = () => {
    state.alive = false;
    state.totals = null;
    announce('gone');
    events.close();
    setTimeout(listen, LOOK_EVERY);
  };
}

const tile = (title, value, series) => h('section', { class: 'tile' }, h('h2', {}, title), h('strong', {}, value), series && sparkline(series));
const series = (name) => state.series[name] ?? [0];
const last = (name) => state.series[name]?.at(-1) ?? 0;

async function overview() {
  const totals = state.totals;
  const { services } = await read('/services');
  const worst = Math.max(0, ...services.map((row) => row.latency?.p99Ms ?? 0));
  return [
    h('h1', {}, 'Overview'),
    h('div', { class: 'tiles' },
      tile('Requests a second', amount(last('requests')), series('requests')),
      tile('Errors a second', amount(last('errors')), series('errors')),
      tile('Connections', totals ? `${totals.connections} of ${totals.maxConnections}` : '–', series('connections')),
      tile('Shared memory', totals ? `${bytes(totals.memory)} of ${bytes(totals.maxMemory)}` : '–', series('memory')),
      tile('Bytes a second', bytes(Math.round(last('bytes'))), series('bytes')),
      tile('Slowest service, p99', worst ? duration(worst) : '–'),
      tile('Calls that run', state.calls.length),
      tile('Up for', totals ? duration(totals.uptimeSeconds * 1000) : '–')),
    h('h2', {}, 'Services'), serviceTable(services),
    h('h2', {}, 'Errors so far'),
    table('by code', [{ title: 'code' }, { title: 'count', number: true }],
      (totals?.errors ?? []).filter(([, count]) => count).map(([code, count]) => ({ cells: [code, count] })), 'None.'),
  ];
}

function serviceTable(services) {
  return table('services, and files that failed to load',
    [{ title: 'service' }, { title: 'version' }, { title: 'state' }, { title: 'calls', number: true }, { title: 'failures', number: true }, { title: 'errors', number: true }, { title: 'p50', number: true }, { title: 'p99', number: true }, { title: 'processor time', number: true }, { title: 'bytes in', number: true }, { title: 'bytes out', number: true }, { title: 'host calls', number: true }, { title: 'most memory', number: true }, { title: 'what is wrong', wide: true }],
    services.map((row) => ({
      bad: Boolean(row.error),
      cells: [row.state === 'failed' ? row.name : h('a', { href: `#/services/${encodeURIComponent(row.name)}` }, row.name), row.version ?? '–', row.state, row.calls, row.failures, row.errors, duration(row.latency?.p50Ms), duration(row.latency?.p99Ms), duration((row.cpuSeconds ?? 0) * 1000), bytes(row.bytesIn ?? 0), bytes(row.bytesOut ?? 0), row.hostCalls, bytes(row.peakMemory ?? 0), row.error ?? ''],
    })), 'None. Copy a component into the services folder.');
}

async function connections() {
  const filter = keep('filter', () => h('input', { id: 'filter', placeholder: '127.0.0.1', oninput: () => show() }));
  const sort = keep('sort', () => h('select', { id: 'sort', onchange: () => show() }, ['', 'bytesIn', 'bytesOut', 'messagesIn', 'inFlight', 'errors'].map((key) => h('option', { value: key }, key || 'oldest first'))));
  const query = new URLSearchParams({ peer: filter.value, sort: sort.value, limit: 500 });
  const { connections: rows } = await read(`/connections?${query}`);
  return [
    h('h1', {}, 'Connections'),
    keep('fields', () => h('div', { class: 'fields' }, h('label', {}, 'Address begins with', filter), h('label', {}, 'Order', sort))),
    table(`${rows.length} shown`, [{ title: 'id' }, { title: 'peer' }, { title: 'principal' }, { title: 'state' }, { title: 'messages in', number: true }, { title: 'in flight', number: true }, { title: 'bytes in', number: true }, { title: 'bytes out', number: true }, { title: 'errors', number: true }, { title: 'since' }, { title: '' }],
      rows.map((row) => ({
        cells: [row.id, row.peer, row.principal ?? '–', row.state, row.messagesIn, row.inFlight, bytes(row.bytesIn), bytes(row.bytesOut), row.errors, row.since, button('Close', `Close connection ${row.id}`, () => change('DELETE', `/connections/${row.id}`))],
      })), 'No connections.'),
  ];
}

const button = (text, label, act) => h('button', { type: 'button', disabled: !mayChange(), 'aria-label': label, onclick: act }, text);

async function calls() {
  const { calls: past } = await read('/calls/past?limit=50');
  return [
    h('h1', {}, 'Calls'),
    running(state.calls),
    h('h2', {}, 'Calls that failed or were slow'), pastCalls(past),
  ];
}

function running(calls) {
  return table('running longer than a millisecond or two', [{ title: 'id' }, { title: 'topic' }, { title: 'request' }, { title: 'principal' }, { title: 'connection' }, { title: 'state' }, { title: 'age', number: true }, { title: 'ran', number: true }, { title: 'time left', number: true }, { title: '' }],
    calls.map((call) => ({
      cells: [call.id, call.topic, request(call.requestId), call.principal ?? '–', call.connection, call.killed ? 'being stopped' : call.state, duration(call.ageMs), duration(call.ranMs), duration(call.remainingMs), button('Stop', `Stop call ${call.id}`, () => change('DELETE', `/calls/${call.id}`))],
    })), 'None just now.');
}

/** What is known of one request: what `mb-server why` prints. */
async function why(id) {
  const query = new URLSearchParams({ requestId: id });
  const [{ calls: past }, { calls: now }, { lines }] = await Promise.all(['/calls/past', '/calls', '/log'].map((path) => read(path === '/calls' ? path : `${path}?${query}`)));
  return [
    h('h1', {}, h('a', { href: '#/calls' }, 'Calls'), ` / ${id}`),
    running(now.filter((call) => call.requestId === id)),
    h('h2', {}, 'It ended'),
    pastCalls(past.filter((call) => call.requestId === id)),
    ...past.filter((call) => call.requestId === id).map((call) => h('section', { class: 'card' },
      h('dl', {}, ...[['connection', call.connection], ['principal', call.principal], ['parent', call.parentRequestId && request(call.parentRequestId)], ['version', call.version], ['memory', bytes(call.peakMemory)], ['details', call.details && JSON.stringify(call.details)], ['backtrace', call.backtrace.join(' < ')]]
        .filter(([, value]) => value).flatMap(([term, value]) => [h('dt', {}, term), h('dd', {}, value)])))),
    h('h2', {}, 'It caused'), pastCalls(past.filter((call) => call.requestId !== id)),
    h('h2', {}, 'Log'), logLines('of this request', lines),
    h('p', {}, 'Calls that were answered within 10 ms are not kept, and newer ones displace older ones.'),
  ];
}

async function services() {
  const { services: rows } = await read('/services');
  return [h('h1', {}, 'Services'),
    h('p', {}, button('Look for changes', 'Look for changes', () => change('POST', '/services/reload'))),
    serviceTable(rows)];
}

async function log() {
  const level = keep('level', () => h('select', { id: 'level', onchange: () => show() }, ['info', 'warn', 'error', 'debug', 'trace'].map((name) => h('option', {}, name))));
  const text = keep('contains', () => h('input', { id: 'contains', oninput: () => show() }));
  const { lines, filter } = await read(`/log?${new URLSearchParams({ level: level.value, contains: text.value, limit: 200 })}`);
  return [
    h('h1', {}, 'Log'),
    keep('log-fields', () => h('div', { class: 'fields' }, h('label', {}, 'At least', level), h('label', {}, 'Holds', text))),
    logLines(`the newest that fit; what is logged: ${filter}`, lines),
  ];
}

const VIEWS = { '': overview, connections, calls, services, log };
let showing = 0;

async function show() {
  const [, first = '', name] = location.hash.replace(/^#/, '').split('/');
  const turn = (showing += 1);
  let nodes;
  try {
    if (first === 'services' && name) nodes = await service(decodeURIComponent(name), { read, change, mayChange: mayChange(), keep, notify });
    else if (first === 'calls' && name) nodes = await why(decodeURIComponent(name));
    else nodes = await (VIEWS[first] ?? overview)();
  } catch (error) {
    if (state.alive) nodes = [h('h1', {}, 'Not found'), h('p', {}, error.message)];
  }
  // What was asked for meanwhile is newer; what is gone stays as it was.
  if (turn !== showing || !nodes) return;
  const focused = document.activeElement?.id || document.activeElement?.getAttribute?.('aria-label');
  const open = [...main.querySelectorAll('details[open] > summary')].map((summary) => summary.textContent);
  const scrolled = [...main.querySelectorAll('.scroll')].map((element) => element.scrollLeft);
  main.replaceChildren(...nodes.filter(Boolean));
  main.querySelectorAll('.scroll').forEach((element, index) => { element.scrollLeft = scrolled[index] ?? 0; });
  for (const summary of main.querySelectorAll('summary')) summary.parentElement.open = open.includes(summary.textContent);
  if (focused && document.activeElement === document.body) {
    [...main.querySelectorAll('[id], [aria-label]')].find((element) => element.id === focused || element.getAttribute('aria-label') === focused)?.focus({ preventScroll: true });
  }
}

function navigate() {
  kept = new Map();
  const [, first = ''] = location.hash.replace(/^#/, '').split('/');
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#/${first}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  show();
}

document.querySelector('#access').onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.token = token.value.trim();
  token.value = '';
  token.placeholder = mayChange() ? 'in use' : 'state_dir/admin.token';
  navigate();
};
if (mayChange()) token.placeholder = 'in use';
document.querySelector('.skip').onclick = (event) => { event.preventDefault(); main.focus(); };
window.onhashchange = navigate;
setInterval(() => { if (state.alive && !['', '#/', '#/calls', '#/log'].includes(location.hash)) show(); }, LOOK_EVERY);
read('/version').then(({ version }) => { document.querySelector('#version').textContent = version; }).catch(() => {});
listen();
navigate();
