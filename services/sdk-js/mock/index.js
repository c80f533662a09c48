// A server for tests with plain Node.js: says what is granted, and what came of a test.
import { state } from './state.js';
import { reset } from './state.js';

const decoder = new TextDecoder();

export const mock = {
  /** Forgets everything; call it before each test. */
  reset,
  /** Grants a value. */
  config(key, value) {
    state.config.set(key, String(value));
  },
  /** Has `topic` answer what `answer(value)` gives; a Failure that it throws is the other service's. */
  serve(topic, answer) {
    state.services.set(topic, answer);
  },
  /** The text that is stored in a bucket, or undefined. */
  value(bucket, key) {
    const bytes = state.buckets.get(bucket)?.get(key);
    return bytes === undefined ? undefined : decoder.decode(bytes);
  },
  /** Lines of the log, as `level: text`. */
  lines() {
    return state.lines;
  },
  /** Says who calls: requestId, principal and the others of `context`. */
  context(values) {
    Object.assign(state.context, values);
  },
};

/** Calls an action of a `handler` as the server would: resolves to its answer, rejects with its failure. */
export async function ask(handler, action, value = null) {
  const bytes = value instanceof Uint8Array;
  const answer = await handler.handle(action, bytes ? { tag: 'binary', val: value } : { tag: 'json', val: JSON.stringify(value) });
  return answer.tag === 'json' ? JSON.parse(answer.val) : answer.val;
}
