// What a service is written with: its actions, its failures, and what it may ask the server for.
import { handlerOf } from '#handler';
import { Failure } from './failure.js';
import { toJson } from './json.js';

const invalid = (message) => new Failure('INVALID_ANSWER', message);

export { Failure } from './failure.js';
export * as log from './log.js';
export * as config from './config.js';
export * as context from './context.js';
export { call, callRaw } from './calls.js';
export { Bucket } from './keyvalue.js';

function declare(name, action) {
  const { run = action, ...declared } = typeof action === 'function' ? {} : action;
  if (typeof run !== 'function') throw new TypeError(`the action ${name} has no function: give one, or { run, description, … }`);
  return { run, ...declared };
}

function argumentOf(action, payload) {
  if (payload.tag === 'json') return JSON.parse(payload.val);
  if (!action.binary) throw new Failure('INVALID_ARGUMENTS', 'expected JSON, not bytes');
  return payload.val;
}

/** A payload of what an action has answered. */
function answerOf(value) {
  return value instanceof Uint8Array ? { tag: 'binary', val: value } : { tag: 'json', val: toJson(value, 'answer', invalid) };
}

/** A failure as the contract has it, or undefined for anything else that was thrown, which is a defect. */
function failureOf(thrown) {
  if (!(thrown instanceof Failure)) return undefined;
  const { code, message, details } = thrown;
  if (details === undefined) return { code, message, details };
  try {
    return { code, message, details: toJson(details, `details object of ${code}`, invalid) };
  } catch (wrong) {
    return failureOf(wrong);
  }
}

/**
 * The `handler` that a service exports. `about` has its name, version and description, as
 * package.json has; `actions` a function for each action, or `{ run, description, input, output,
 * binary }`.
 */
export function service(about, actions) {
  const { name, version, description } = about;
  const declared = new Map(Object.entries(actions).map(([action, value]) => [action, declare(action, value)]));
  const described = [...declared].map(([action, { description, input, output }]) => ({ name: action, description, input, output }));
  return handlerOf({
    document: JSON.stringify({ name, version, description, actions: described }),
    run(action, payload) {
      const known = declared.get(action);
      return known.run(argumentOf(known, payload));
    },
    answerOf,
    failureOf,
  });
}
