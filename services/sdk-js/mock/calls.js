import { Failure } from '../failure.js';
import { state } from './state.js';

export function call(topic, version, payload) {
  const answer = state.services.get(topic);
  if (answer === undefined) {
    throw { code: 'FORBIDDEN', message: `${topic} is not served: mock.serve('${topic}', …)`, origin: 'server', details: undefined };
  }
  try {
    const value = answer(payload.tag === 'json' ? JSON.parse(payload.val) : payload.val);
    return value instanceof Uint8Array ? { tag: 'binary', val: value } : { tag: 'json', val: JSON.stringify(value) };
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const { code, message, details } = error;
    throw { code, message, origin: 'service', details: details === undefined ? undefined : JSON.stringify(details) };
  }
}
