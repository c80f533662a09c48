import { state } from './state.js';

const fail = (text) => {
  throw { tag: 'other', val: text };
};
const decoder = new TextDecoder();

class MockBucket {
  constructor(values) {
    this.values = values;
  }
  get(key) {
    if (this.values.get(key)?.end <= Date.now()) this.values.delete(key);
    return this.values.get(key)?.slice();
  }
  set(key, value, end = undefined) {
    if (!(value instanceof Uint8Array)) throw new TypeError('a value is a text or a Uint8Array');
    this.values.set(key, Object.assign(value.slice(), { end }));
  }
  // Leaves the end as it is.
  replace(key, value) {
    this.set(key, value, this.get(key) && this.values.get(key).end);
  }
  delete(key) {
    this.values.delete(key);
  }
  exists(key) {
    return this.get(key) !== undefined;
  }
  listKeys() {
    return { keys: [...this.values.keys()].filter((key) => this.exists(key)).sort(), cursor: undefined };
  }
}

export function open(name) {
  if (!state.buckets.has(name)) state.buckets.set(name, new Map());
  return new MockBucket(state.buckets.get(name));
}

export class Cas {
  static new(bucket, key) {
    return Object.assign(new Cas(), { bucket, key });
  }
  current() {
    return this.bucket.get(this.key);
  }
}

export const swap = (cas, value) => cas.bucket.replace(cas.key, value);
export const setFor = (bucket, key, value, milliseconds) => bucket.set(key, value, Date.now() + milliseconds);
export const keysFrom = (bucket, prefix) => ({ keys: bucket.listKeys().keys.filter((key) => key.startsWith(prefix)), cursor: undefined });

export function increment(bucket, key, delta) {
  const text = bucket.exists(key) ? decoder.decode(bucket.get(key)) : '0';
  if (!/^-?\d+$/.test(text)) fail('the value is no whole number');
  const sum = Number(text) + delta;
  bucket.replace(key, new TextEncoder().encode(String(sum)));
  return sum;
}

export const setMany = (bucket, pairs) => pairs.forEach(([key, value]) => bucket.set(key, value));
export const deleteMany = (bucket, keys) => keys.forEach((key) => bucket.delete(key));
