// Texts to URL slugs. Reads `longest` from its configuration, and keeps the slugs that it gave out.
import { get } from 'wasi:config/store@0.2.0-rc.1';
import { open } from 'wasi:keyvalue/store@0.2.0-draft2';
import { log } from 'wasi:logging/logging@0.1.0-draft';
import { make, Refusal, unique } from './actions.js';

const text = { type: 'object', required: ['text'], properties: { text: { type: 'string' } } };
const made = { type: 'object', required: ['slug'], properties: { slug: { type: 'string' } } };

const description = {
  name: 'slug',
  version: '1.0.0',
  description: 'Makes URL slugs of texts',
  actions: [
    { name: 'make', description: 'The slug of a text.', input: text, output: made },
    { name: 'unique', description: 'A slug that was not given out before.', input: text, output: made },
  ],
};

const actions = {
  make: (request) => make(request, longest()),

  unique(request) {
    const bucket = open('given');
    const given = unique(make(request, longest()), (candidate) => bucket.exists(candidate));
    bucket.set(given, new Uint8Array());
    log('info', '', `gave out ${given}`);
    return given;
  },
};

function longest() {
  const set = get('longest');
  if (set === undefined) return 80;
  const value = Number(set);
  if (!Number.isInteger(value) || value < 1) throw new Refusal('CONFIG_FAILED', 'longest must be a whole number from 1');
  return value;
}

export const handler = {
  describe() {
    return JSON.stringify(description);
  },

  handle(action, payload) {
    try {
      if (payload.tag !== 'json') throw new Refusal('INVALID_ARGUMENTS', 'expected JSON');
      return { tag: 'json', val: JSON.stringify({ slug: actions[action](JSON.parse(payload.val)) }) };
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      throw { code: error.code, message: error.message, details: undefined };
    }
  },
};
