import { service } from 'mb-service';
import about from './package.json' with { type: 'json' };
import { probes } from './probes.js';

export const handler = service(about, {
  run: (number) => probes[number].run(),
});
