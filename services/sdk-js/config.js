// Values and secrets that the operator gives: the grants `config` and `secrets`.
import * as imported from '#config';
import { Failure } from './failure.js';
import { reasonOf } from './reason.js';

const failed = (key, why) => new Failure('CONFIG_FAILED', `${key} ${why}`);

/** The text under `key`, or undefined. */
export function get(key) {
  try {
    return imported.get(key) ?? undefined;
  } catch (error) {
    throw failed(key, `can't be read: ${reasonOf(error)}`);
  }
}

/** The value under `key`, of the type that `otherwise` has, which is taken where there is none. */
export function getOr(key, otherwise) {
  const text = get(key);
  if (text === undefined) return otherwise;
  switch (typeof otherwise) {
    case 'number': {
      const value = text.trim() === '' ? NaN : Number(text);
      if (Number.isNaN(value)) throw failed(key, 'must be a number');
      return value;
    }
    case 'boolean':
      if (text !== 'true' && text !== 'false') throw failed(key, 'must be true or false');
      return text === 'true';
    default:
      return text;
  }
}
