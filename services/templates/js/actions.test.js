import assert from 'node:assert';
import { test } from 'node:test';
import { actions } from './actions.js';

test('greets', () => {
  assert.deepStrictEqual(actions.greet({ name: 'Ada' }), { text: 'Hello, Ada!' });
});

test('refuses', () => {
  assert.throws(() => actions.greet({ name: '' }), { code: 'NAME_EMPTY' });
  assert.throws(() => actions.greet(null), { code: 'INVALID_ARGUMENTS' });
});
