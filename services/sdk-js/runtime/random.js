// Random numbers come from the server within each call. What is taken while the modules load is
// the same in every call, so that is refused, or warned of where packages do it for no secret.
import { getRandomBytes } from 'wasi:random/random@0.2.12';
import { isLoading } from './phase.js';
import { warnAtLoad } from './console.js';

const QUOTA = 65536;
const ownRandom = Math.random;
let state;

// sfc32, by Chris Doty-Humphrey.
function next() {
  const sum = (((state[0] + state[1]) | 0) + state[3]) | 0;
  state[3] = (state[3] + 1) | 0;
  state[0] = state[1] ^ (state[1] >>> 9);
  state[1] = (state[2] + (state[2] << 3)) | 0;
  state[2] = (((state[2] << 21) | (state[2] >>> 11)) + sum) | 0;
  return sum >>> 0;
}

Math.random = function random() {
  if (isLoading()) {
    warnAtLoad('Math.random() was called at the top level of a module: its number is the same in every call');
    return ownRandom();
  }
  state ??= new Int32Array(getRandomBytes(16).slice().buffer);
  return ((next() >>> 5) * 0x4000000 + (next() >>> 6)) / 0x20000000000000;
};

function bytes(size, name) {
  if (isLoading()) throw new Error(`${name} at the top level of a module would be the same in every call: call it in an action`);
  return getRandomBytes(size);
}

const isInteger = (view) => ArrayBuffer.isView(view) && /^(Big)?(Int|Uint)(8|16|32|64)(Clamped)?Array$/.test(view[Symbol.toStringTag]);

const absentSubtle = new Proxy(Object.freeze({}), {
  get(target, name) {
    if (typeof name === 'symbol') return undefined;
    throw new Error(`crypto.subtle is absent (asked for ${name}): take a package in JavaScript, as @noble/hashes`);
  },
});

globalThis.crypto = Object.freeze({
  subtle: absentSubtle,

  getRandomValues(view) {
    if (!isInteger(view)) throw new DOMException('getRandomValues takes a typed array of integers', 'TypeMismatchError');
    if (view.byteLength > QUOTA) {
      throw new DOMException(`getRandomValues gives at most ${QUOTA} bytes, not ${view.byteLength}`, 'QuotaExceededError');
    }
    const random = bytes(view.byteLength, 'crypto.getRandomValues');
    new Uint8Array(view.buffer, view.byteOffset, view.byteLength).set(random);
    return view;
  },

  randomUUID() {
    const random = bytes(16, 'crypto.randomUUID').slice();
    random[6] = (random[6] & 0x0f) | 0x40;
    random[8] = (random[8] & 0x3f) | 0x80;
    const hex = Array.from(random, (byte) => byte.toString(16).padStart(2, '0')).join('');
    return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-');
  },
});
