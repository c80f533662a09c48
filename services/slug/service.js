// Texts to URL slugs.
import { service } from 'mb-service';
import about from './package.json' with { type: 'json' };
import { make, unique } from './actions.js';

const input = { type: 'object', required: ['text'], properties: { text: { type: 'string' } } };
const output = { type: 'object', required: ['slug'], properties: { slug: { type: 'string' } } };

export const handler = service(about, {
  make: { run: make, description: 'The slug of a text.', input, output },
  unique: { run: unique, description: 'A slug that was not given out before.', input, output },
});
