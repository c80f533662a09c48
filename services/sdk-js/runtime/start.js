// What a module finds when it is loaded: installed before any other module is.
import { exit } from 'wasi:cli/exit@0.2.12';
import { getStderr } from 'wasi:cli/stderr@0.2.12';
import { now } from 'wasi:clocks/monotonic-clock@0.2.12';
import { atEnd, forget, runJobs, settle } from './jobs.js';
import { show, writeEarly } from './console.js';
import './random.js';
import './absent.js';
import { loaded, whenLoaded } from './phase.js';

globalThis.self ??= globalThis;
globalThis.performance = {
  now: () => now() / 1e6,
  get timeOrigin() {
    return Date.now() - now() / 1e6;
  },
};

// Promises that were made while the modules loaded settle then.
whenLoaded(runJobs);

// The server keeps so many bytes for the history of failed calls.
const LONGEST = 2048;
const encode = (text) => Uint8Array.from(unescape(encodeURIComponent(text.toWellFormed())), (c) => c.charCodeAt(0));

/** Ends the call with what is a defect: what is wrong goes to the log, and to the caller as the operator allows. */
function crash(thrown) {
  const text =
    thrown instanceof Error
      ? show(thrown)
      : `thrown was ${show(thrown)}, which is ${thrown === null ? 'null' : `of type ${typeof thrown}`} and no Error: throw new Failure(code, message), or an Error`;
  const stderr = getStderr();
  stderr.blockingWriteAndFlush(encode(text).subarray(0, LONGEST));
  stderr[Symbol.dispose]();
  exit({ tag: 'err' });
}

export { atEnd, crash, forget, loaded, settle, writeEarly };
