// Durable values of this service: the grant `keyvalue`.
import * as imported from '#keyvalue';
import { Failure } from './failure.js';
import { reasonOf } from './reason.js';

const REASONS = { 'no-such-store': 'there is no such store', 'access-denied': 'durable values are not granted' };
const encode = (value) => (typeof value === 'string' ? new TextEncoder().encode(value) : value);
const decode = (bytes) => new TextDecoder('utf-8', { fatal: true }).decode(bytes);

function attempt(run) {
  try {
    return run();
  } catch (error) {
    if (error instanceof Failure) throw error;
    const reason = reasonOf(error);
    throw new Failure('STORE_FAILED', REASONS[reason] ?? reason);
  }
}

/** Values by key. Keys are texts of 1 to 1,024 bytes, values texts or bytes, at most 1 MiB. */
export class Bucket {
  #bucket;

  constructor(name) {
    this.#bucket = attempt(() => imported.open(name));
  }

  /** Takes a bucket, which need not be made: each name is one. */
  static open(name) {
    return new Bucket(name);
  }

  /** The bytes under `key`, or undefined. */
  get(key) {
    return attempt(() => this.#bucket.get(key)) ?? undefined;
  }

  /** The text under `key`, or undefined. */
  getText(key) {
    const bytes = this.get(key);
    return bytes === undefined ? undefined : decode(bytes);
  }

  exists(key) {
    return attempt(() => this.#bucket.exists(key));
  }

  /** Writes a text or bytes. It is on the disk when this returns. */
  set(key, value) {
    attempt(() => this.#bucket.set(key, encode(value)));
  }

  /** Writes a text or bytes that end after so many milliseconds: then the key has no value. */
  setFor(key, value, milliseconds) {
    if (!Number.isSafeInteger(milliseconds)) throw new TypeError(`${milliseconds} is no whole number of milliseconds`);
    attempt(() => imported.setFor(this.#bucket, key, encode(value), milliseconds));
  }

  delete(key) {
    attempt(() => this.#bucket.delete(key));
  }

  /** All keys, in order. */
  keys() {
    return this.#pages((cursor) => this.#bucket.listKeys(cursor));
  }

  /** The keys that begin with `prefix`, in order. */
  keysFrom(prefix) {
    return this.#pages((cursor) => imported.keysFrom(this.#bucket, prefix, cursor));
  }

  *#pages(read) {
    let cursor;
    do {
      const page = attempt(() => read(cursor));
      for (const key of page.keys) yield key;
      cursor = page.cursor ?? undefined;
    } while (cursor !== undefined);
  }

  /** Adds to the number under `key`, which begins at 0, and answers the sum. */
  increment(key, delta = 1) {
    if (!Number.isSafeInteger(delta)) throw new TypeError(`${delta} is no whole number below 2^53`);
    return attempt(() => imported.increment(this.#bucket, key, delta));
  }

  /**
   * Sets what `change` makes of the bytes under `key` (or of undefined); again where another call was quicker. Where it
   * throws, nothing is written.
   */
  update(key, change) {
    attempt(() => {
      let seen = imported.Cas.new(this.#bucket, key);
      for (;;) {
        const value = encode(change(seen.current() ?? undefined));
        try {
          imported.swap(seen, value);
          return;
        } catch (error) {
          const reason = error?.payload ?? error;
          if (reason?.tag !== 'cas-failed') throw reason?.tag === 'store-error' ? reason.val : error;
          seen = reason.val;
        }
      }
    });
  }

  /** Writes all pairs `[key, value]` at once, for the cost of one write. */
  setMany(pairs) {
    attempt(() => imported.setMany(this.#bucket, Array.from(pairs, ([key, value]) => [key, encode(value)])));
  }

  deleteMany(keys) {
    attempt(() => imported.deleteMany(this.#bucket, Array.from(keys)));
  }
}
