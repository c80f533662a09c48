// Elements and drawings. What services and peers can name goes in as text, never as markup.

const SVG = 'http://www.w3.org/2000/svg';

/** An element with properties, attributes (`aria-…`, `data-…`, `class`) and children, which are nodes or text. */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (key in element && key !== 'list') element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The last values as a line; drawn for the eye only, the number stands beside it. */
export function sparkline(values) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) => `${(index / Math.max(values.length - 1, 1)) * 100},${30 - (value / most) * 28}`);
  return svg('svg', { viewBox: '0 0 100 32', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    svg('polyline', { class: 'line', points: points.join(' ') }));
}

/** Pairs of a bound in seconds and calls at or below it, as bars between two bounds. */
export function histogram(buckets) {
  const counts = buckets.map(([bound, sum], index) => [bound, sum - (index ? buckets[index - 1][1] : 0)]);
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  if (!all) return h('p', {}, 'No call yet.');
  const first = counts.findIndex(([, count]) => count);
  const last = counts.findLastIndex(([, count]) => count);
  const shown = counts.slice(Math.max(first - 1, 0), last + 2);
  const most = Math.max(...shown.map(([, count]) => count));
  const width = 560 / shown.length;
  const bars = shown.flatMap(([bound, count], index) => {
    const height = count ? Math.max((count / most) * 100, 1) : 0;
    const x = index * width;
    const every = Math.ceil(shown.length / 8);
    const bar = svg('rect', { class: 'bar', x: x + 1, y: 110 - height, width: Math.max(width - 2, 1), height });
    const label = index % every ? [] : [Object.assign(svg('text', { x, y: 126 }), { textContent: duration(bound * 1e3) })];
    return [bar, ...label];
  });
  const label = `Latency of ${all} calls: most took at most ${duration(shown.find(([, count]) => count === most)[0] * 1e3)}.`;
  return svg('svg', { viewBox: '0 0 560 132', role: 'img', 'aria-label': label }, ...bars);
}

/** A request id that leads to what is known of that request. */
export function request(id) {
  return !id || id === '-' ? '–' : h('a', { href: `#/calls/${encodeURIComponent(id)}` }, id);
}

/** Calls that failed or were slow; `without` is a column that says the same in every row. */
export function pastCalls(calls, without) {
  const columns = [
    [{ title: 'ended' }, (call) => call.ended],
    [{ title: 'service' }, (call) => call.service],
    [{ title: 'action' }, (call) => call.action],
    [{ title: 'outcome' }, (call) => call.outcome],
    [{ title: 'took', number: true }, (call) => duration(call.elapsedMs)],
    [{ title: 'waited', number: true }, (call) => duration(call.waitedMs)],
    [{ title: 'request' }, (call) => request(call.requestId)],
    [{ title: 'message', wide: true }, (call) => call.message ?? ''],
  ].filter(([{ title }]) => title !== without);
  return table('the newest, failed or over 10 ms', columns.map(([head]) => head),
    calls.map((call) => ({ bad: call.outcome !== 'OK', cells: columns.map(([, cell]) => cell(call)) })), 'None.');
}

/** Lines of the log, newest first. */
export function logLines(caption, lines) {
  const field = ([key, value]) => (['request_id', 'parent_request_id'].includes(key) ? [`${key}=`, request(value), ' '] : [`${key}=${value} `]);
  return table(caption, [{ title: 'time' }, { title: 'level' }, { title: 'message', wide: true }, { title: 'of', wide: true }],
    lines.toReversed().map((line) => ({
      bad: line.level === 'error',
      cells: [line.time, line.level, line.message, Object.entries(line.fields).filter(([, value]) => value && value !== '-').flatMap(field)],
    })), 'No line yet.');
}

/** A table; rows are arrays of nodes or text, with `key` and `bad`. */
export function table(caption, heads, rows, empty) {
  const head = heads.map(({ title, number }) => h('th', { scope: 'col', class: number && 'number' }, title));
  const body = rows.map(({ cells, bad }) =>
    h('tr', { class: bad && 'bad' }, cells.map((cell, index) => h('td', { class: heads[index].number ? 'number' : heads[index].wide && 'wide' }, cell))));
  const none = h('tr', {}, h('td', { colSpan: heads.length }, empty));
  return h('div', { class: 'scroll', tabIndex: 0, role: 'region', 'aria-label': caption },
    h('table', {}, h('caption', {}, caption), h('thead', {}, h('tr', {}, head)), h('tbody', {}, body.length ? body : none)));
}

export function duration(ms) {
  if (ms === undefined || ms === null) return '–';
  if (ms < 1) return `${Math.round(ms * 1000)} µs`;
  if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
  return ms < 120000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 60000)} min`;
}

export function bytes(count) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  for (; count >= 1024 && unit < 4; unit += 1) count /= 1024;
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

export const amount = (count) => (count >= 100 ? Math.round(count) : Math.round(count * 10) / 10).toLocaleString('en');
