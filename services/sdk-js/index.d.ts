// The types of what `index.js` exports.

/** A value that has a JSON form. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** A service's own refusal: the caller gets its code, message and details. */
export class Failure extends Error {
  /** `code` matches `[A-Z][A-Z0-9_]{0,63}`; `details` is any value that has a JSON form. */
  constructor(code: string, message: string, details?: unknown);
  readonly code: string;
  readonly details: unknown;
}

/** What an action does: takes what came as JSON (or, if it is `binary`, bytes), answers a value or a promise of one. */
export type Run = (argument: any) => unknown;

export interface Action {
  run: Run;
  description?: string;
  /** A JSON Schema of what it takes. */
  input?: object;
  /** A JSON Schema of what it answers. */
  output?: object;
  /** Whether it takes bytes: then its argument is a Uint8Array where the payload is binary. */
  binary?: boolean;
}

export interface Handler {
  describe(): string;
  handle(action: string, payload: { tag: 'json'; val: string } | { tag: 'binary'; val: Uint8Array }): unknown;
}

/** The `handler` that a service exports. `about` is what package.json says. */
export function service(
  about: { name: string; version: string; description?: string },
  actions: { [name: string]: Run | Action },
): Handler;

/** Lines in the server's log. */
export namespace log {
  function trace(text: string): void;
  function debug(text: string): void;
  function info(text: string): void;
  function warn(text: string): void;
  function error(text: string): void;
}

/** Values and secrets that the operator gives: the grants `config` and `secrets`. */
export namespace config {
  function get(key: string): string | undefined;
  /** The value of the type that `otherwise` has; CONFIG_FAILED if it is another. */
  function getOr(key: string, otherwise: number): number;
  function getOr(key: string, otherwise: boolean): boolean;
  function getOr(key: string, otherwise: string): string;
}

/** What a service rarely needs to know about the call that it serves. */
export namespace context {
  function requestId(): string | undefined;
  function parentRequestId(): string | undefined;
  function requestedVersion(): string;
  function principal(): string | undefined;
  function connectionId(): string;
  function encrypted(): boolean;
  /** Milliseconds until the deadline. */
  function remaining(): number;
}

/** Durable values of this service by key: the grant `keyvalue`. What goes wrong is STORE_FAILED. */
export class Bucket {
  static open(name: string): Bucket;
  constructor(name: string);
  get(key: string): Uint8Array | undefined;
  getText(key: string): string | undefined;
  exists(key: string): boolean;
  /** It is on the disk when this returns. */
  set(key: string, value: string | Uint8Array): void;
  /** Ends after so many milliseconds: then the key has no value. */
  setFor(key: string, value: string | Uint8Array, milliseconds: number): void;
  delete(key: string): void;
  keys(): IterableIterator<string>;
  keysFrom(prefix: string): IterableIterator<string>;
  /** Adds to a number that begins at 0, safe against other calls, and answers the sum. */
  increment(key: string, delta?: number): number;
  /** Safe against other calls: `change` runs again where another call was quicker. Where it throws, nothing is written. */
  update(key: string, change: (value: Uint8Array | undefined) => string | Uint8Array): void;
  setMany(pairs: Iterable<[string, string | Uint8Array]>): void;
  deleteMany(keys: Iterable<string>): void;
}

/** Calls another service: the grant `calls`. Throws its failure, or CALL_FAILED with what the server says. */
export function call(topic: string, version: string, value?: unknown, timeoutMs?: number): any;

/** The same, but throws `CallError`. */
export function callRaw(topic: string, version: string, value?: unknown, timeoutMs?: number): any;

export interface CallError {
  code: string;
  message: string;
  origin: 'server' | 'service';
  details: unknown;
}
