import assert from 'node:assert';
import { test } from 'node:test';
import { greet } from './actions.js';

test('greets', () => {
  assert.deepStrictEqual(greet({ name: 'Ada' }), { text: 'Hello, Ada!' });
});

test('refuses', () => {
  assert.throws(() => greet({ name: '' }), { code: 'NAME_EMPTY' });
  assert.throws(() => greet(null), { code: 'INVALID_ARGUMENTS' });
});
