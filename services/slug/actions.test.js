import assert from 'node:assert';
import { beforeEach, test } from 'node:test';
import { ask, mock } from 'mb-service/mock';
import { slug } from './actions.js';
import { handler } from './service.js';

beforeEach(mock.reset);

test('slugs', () => {
  assert.strictEqual(slug('  Hello, World! ', 80), 'hello-world');
  assert.strictEqual(slug('Crème brûlée — Größe 2', 80), 'creme-brulee-grosse-2');
  assert.strictEqual(slug('a b c d', 4), 'a-b');
});

test('refusals', async () => {
  await assert.rejects(ask(handler, 'make', { text: '…' }), { code: 'NOTHING_LEFT' });
  await assert.rejects(ask(handler, 'make', {}), { code: 'INVALID_ARGUMENTS' });
  mock.config('longest', 'many');
  await assert.rejects(ask(handler, 'make', { text: 'a' }), { code: 'CONFIG_FAILED' });
});

test('unique', async () => {
  mock.config('longest', 3);
  assert.deepStrictEqual(await ask(handler, 'unique', { text: 'A b c' }), { slug: 'a-b' });
  assert.deepStrictEqual(await ask(handler, 'unique', { text: 'A b c' }), { slug: 'a-b-2' });
  assert.deepStrictEqual(mock.lines(), ['info: gave out a-b', 'info: gave out a-b-2']);
});
