import assert from 'node:assert';
import { test } from 'node:test';
import { make, slug, unique } from './actions.js';

test('slugs', () => {
  assert.strictEqual(slug('  Hello, World! ', 80), 'hello-world');
  assert.strictEqual(slug('Crème brûlée — Größe 2', 80), 'creme-brulee-grosse-2');
  assert.strictEqual(slug('a b c d', 4), 'a-b');
});

test('refusals', () => {
  assert.throws(() => make({ text: '…' }, 80), { code: 'NOTHING_LEFT' });
  assert.throws(() => make({}, 80), { code: 'INVALID_ARGUMENTS' });
});

test('unique', () => {
  const taken = new Set(['a', 'a-2']);
  assert.strictEqual(unique('a', (candidate) => taken.has(candidate)), 'a-3');
});
