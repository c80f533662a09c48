// What the service says of itself. Its name, version and description are those of package.json.
import { service } from 'mb-service';
import about from './package.json' with { type: 'json' };
import { greet } from './actions.js';

export const handler = service(about, {
  greet: {
    run: greet,
    description: 'Greets a person.',
    input: { type: 'object', required: ['name'], properties: { name: { type: 'string' } } },
    output: { type: 'object', required: ['text'], properties: { text: { type: 'string' } } },
  },
});
