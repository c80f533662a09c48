// One object in, one object out: QuickJS runs it inside of a component.
import { log } from 'wasi:logging/logging@0.1.0-draft';
import { actions, Refusal } from './actions.js';

// QuickJS brings no console: these are lines in the server's log.
const line = (level) => (...values) => log(level, '', values.map(String).join(' '));
globalThis.console = { debug: line('debug'), log: line('info'), info: line('info'), warn: line('warn'), error: line('error') };

// What the service says of itself; the file must be called like it.
const description = {
  name: '{{name}}',
  version: '1.0.0',
  description: 'Greets people',
  actions: [
    {
      name: 'greet',
      description: 'Greets a person.',
      input: { type: 'object', required: ['name'], properties: { name: { type: 'string' } } },
      output: { type: 'object', required: ['text'], properties: { text: { type: 'string' } } },
    },
  ],
};

export const handler = {
  describe() {
    return JSON.stringify(description);
  },

  // The server asks only for the actions above. A payload is { tag: 'json', val: text } or
  // { tag: 'binary', val: Uint8Array }.
  handle(action, payload) {
    try {
      if (payload.tag !== 'json') throw new Refusal('INVALID_ARGUMENTS', 'expected JSON');
      const answer = actions[action](JSON.parse(payload.val));
      return { tag: 'json', val: JSON.stringify(answer) };
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      throw { code: error.code, message: error.message, details: undefined };
    }
  },
};
