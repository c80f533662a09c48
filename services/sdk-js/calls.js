// Calls of other services: the grant `calls`, which lists their topics.
import * as imported from '#calls';
import { Failure } from './failure.js';
import { toJson } from './json.js';

const invalid = (message) => new Failure('INVALID_ANSWER', message);

/**
 * Calls `topic` in a version that is compatible with `version`, with a value that has a JSON form
 * or with bytes, and gives what came back. Throws `{ code, message, origin, details }` as they came.
 */
export function callRaw(topic, version, value = null, timeoutMs = undefined) {
  const payload =
    value instanceof Uint8Array ? { tag: 'binary', val: value } : { tag: 'json', val: toJson(value, `payload for ${topic}`, invalid) };
  let answer;
  try {
    answer = imported.call(topic, version, payload, timeoutMs);
  } catch (error) {
    const { code, message, origin, details } = error?.payload ?? error;
    if (code === undefined) throw error;
    throw { code, message, origin, details: details == null ? undefined : JSON.parse(details) };
  }
  return answer.tag === 'json' ? JSON.parse(answer.val) : answer.val;
}

/** The same; throws the other service's failure, or CALL_FAILED with what the server says. */
export function call(topic, version, value, timeoutMs) {
  try {
    return callRaw(topic, version, value, timeoutMs);
  } catch (error) {
    const { code, message, origin, details } = error;
    if (origin === 'service') throw new Failure(code, message, details);
    if (origin === 'server') throw new Failure('CALL_FAILED', `${code}: ${message}`, details);
    throw error;
  }
}
