// The job queue and the timers. `Promise` is a polyfill over this queue, and the build turns `async`
// functions into generators, which use it.
import { now, subscribeDuration } from 'wasi:clocks/monotonic-clock@0.2.12';
import { isLoading } from './phase.js';

let microtasks = [];
let immediates = [];
let timers = [];
let numbers = 0;
let unhandled;
let ends = [];

globalThis.queueMicrotask = (run) => {
  if (typeof run !== 'function') throw new TypeError('queueMicrotask takes a function');
  microtasks.push(run);
};

globalThis.setImmediate = (run, ...values) => {
  numbers += 1;
  immediates.push({ number: numbers, run: () => run(...values) });
  return numbers;
};
globalThis.clearImmediate = (number) => {
  immediates = immediates.filter((immediate) => immediate.number !== number);
};

function start(name, run, delay, values, repeats) {
  if (typeof run !== 'function') throw new TypeError(`${name} takes a function`);
  if (isLoading()) throw new Error(`${name} at the top level of a module: there is no call yet in which it could run`);
  const wait = Math.max(1, Number(delay) || 0) * 1e6;
  numbers += 1;
  timers.push({ number: numbers, due: now() + wait, run: () => run(...values), wait: repeats ? wait : 0 });
  return numbers;
}
const stop = (number) => {
  timers = timers.filter((timer) => timer.number !== number);
};
globalThis.setTimeout = (run, delay, ...values) => start('setTimeout', run, delay, values, false);
globalThis.setInterval = (run, delay, ...values) => start('setInterval', run, delay, values, true);
globalThis.clearTimeout = stop;
globalThis.clearInterval = stop;

// The polyfill says of a rejection that nobody has handled by the end of the microtasks.
globalThis.onunhandledrejection = ({ reason }) => {
  unhandled ??= { reason };
};

function runMicrotasks() {
  while (microtasks.length > 0) {
    const turn = microtasks;
    microtasks = [];
    for (let i = 0; i < turn.length; i += 1) turn[i]();
  }
}

/** Runs all jobs that are ready. */
export function runJobs() {
  runMicrotasks();
  while (immediates.length > 0) {
    immediates.shift().run();
    runMicrotasks();
  }
  if (unhandled !== undefined) throw unhandled.reason;
}

/** Waits for the timer that is due first, and runs it. */
function runTimer() {
  const next = timers.reduce((first, timer) => (timer.due < first.due ? timer : first));
  const left = next.due - now();
  if (left > 0) {
    const pollable = subscribeDuration(left);
    pollable.block();
    pollable[Symbol.dispose]();
  }
  if (next.wait > 0) next.due += next.wait;
  else stop(next.number);
  next.run();
}

const isThenable = (value) =>
  value !== null && (typeof value === 'object' || typeof value === 'function') && typeof value.then === 'function';

/**
 * How an answer ends: `{ value }` or `{ reason }`, once all jobs have run and, of a promise, the
 * timers that it waits for; undefined if nothing is left that could settle it.
 */
export function settle(answer) {
  let settled;
  if (isThenable(answer)) {
    answer.then(
      (value) => (settled = { value }),
      (reason) => (settled = { reason }),
    );
  } else {
    settled = { value: answer };
  }
  for (;;) {
    runJobs();
    if (settled !== undefined || timers.length === 0) return settled;
    runTimer();
  }
}

/** Has `run` called when the call ends. */
export const atEnd = (run) => void ends.push(run);

/** Forgets what an earlier call in this instance has left. */
export function forget() {
  const left = timers.length;
  if (microtasks.length > 0) microtasks = [];
  if (immediates.length > 0) immediates = [];
  if (left > 0) timers = [];
  for (const run of ends) {
    try {
      run();
    } catch {
      // It is gone already.
    }
  }
  if (ends.length > 0) ends = [];
  unhandled = undefined;
  return left;
}
