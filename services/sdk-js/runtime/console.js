// `console` writes lines into the server's log, and prints objects as Node.js does.
import { log } from 'wasi:logging/logging@0.1.0-draft';
import { now } from 'wasi:clocks/monotonic-clock@0.2.12';
import { inspect } from 'loupe';
import { isLoading } from './phase.js';
import { stackOf } from './stack.js';

const WIDTH = 4000;
// There is no server while the modules load: these lines come when the service is loaded.
let early = [];
let indent = '';
const counts = new Map();
const begun = new Map();

export function show(value) {
  if (typeof value === 'string') return value;
  if (value instanceof Error) return stackOf(value);
  try {
    return inspect(value, { depth: 4, truncate: WIDTH });
  } catch (error) {
    return `${Object.prototype.toString.call(value)} (can't be shown: ${error.message})`;
  }
}

function format(values) {
  const [first, ...rest] = values;
  if (typeof first !== 'string' || !first.includes('%')) return values.map(show).join(' ');
  const text = first.replace(/%[sdifjoOc%]/g, (mark) => {
    if (mark === '%%') return '%';
    if (rest.length === 0) return mark;
    const value = rest.shift();
    switch (mark) {
      case '%s': return typeof value === 'object' && value !== null ? show(value) : String(value);
      case '%d': return typeof value === 'object' ? 'NaN' : String(Number(value));
      case '%i': return String(parseInt(value, 10));
      case '%f': return String(parseFloat(value));
      case '%j': return JSON.stringify(value);
      case '%c': return '';
      default: return show(value);
    }
  });
  return [text, ...rest.map(show)].join(' ');
}

function write(level, text) {
  for (const line of text.split('\n')) {
    if (line === '') continue;
    if (isLoading()) early.push([level, indent + line]);
    else log(level, '', indent + line);
  }
}

export const warnAtLoad = (text) => {
  if (!early.some(([, line]) => line === text)) early.push(['warn', text]);
};

/** Lines from the time of loading, once there is a log. */
export function writeEarly() {
  for (const [level, line] of early) log(level, '', line);
}

const line = (level) => (...values) => write(level, format(values));
const print = line('info');
const ms = (name) => `${name}: ${((now() - begun.get(name)) / 1e6).toFixed(3)} ms`;

globalThis.console = {
  trace: (...values) => write('trace', `${format(values)}\n${stackOf(new Error('trace'))}`),
  debug: line('debug'),
  log: print,
  info: print,
  warn: line('warn'),
  error: line('error'),
  dir: (value) => write('info', show(value)),
  table: (value) => write('info', show(value)),
  assert: (condition, ...values) => {
    if (!condition) write('error', `Assertion failed${values.length > 0 ? `: ${format(values)}` : ''}`);
  },
  group: (...values) => {
    if (values.length > 0) print(...values);
    indent += '  ';
  },
  groupEnd: () => {
    indent = indent.slice(2);
  },
  count: (name = 'default') => {
    counts.set(name, (counts.get(name) ?? 0) + 1);
    write('info', `${name}: ${counts.get(name)}`);
  },
  countReset: (name = 'default') => counts.delete(name),
  time: (name = 'default') => begun.set(name, now()),
  timeLog: (name = 'default', ...values) => begun.has(name) && write('info', [ms(name), ...values.map(show)].join(' ')),
  timeEnd: (name = 'default') => {
    if (begun.has(name)) write('info', ms(name));
    begun.delete(name);
  },
};
console.groupCollapsed = console.group;
